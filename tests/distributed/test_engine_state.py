"""The engine's state through a checkpoint on disk: three steps, a fresh engine, three more,
bit-equal to six.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

ZERO_STAGES = [0, 2, 3]


def part(run: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    found = {
        key.removeprefix(f"{name}/"): value
        for key, value in run.items()
        if key.startswith(f"{name}/")
    }
    # One layer, seven adapted projections of two matrices each; value and two moments; Adam's step.
    assert len(found) == (15 if name == "begin" else 43)
    return found


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return [key for key in one if not torch.equal(one[key], other[key])]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("zero_stage", ZERO_STAGES)
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(
    engine_runs: Any, zero_stage: int, rank: int
) -> None:
    run = engine_runs.load(f"state-retriever-z{zero_stage}-w2-r{rank}")
    begin, half, loaded, whole, resumed = (
        part(run, name) for name in ("begin", "half", "loaded", "whole", "resumed")
    )
    assert differing(half, loaded) == [], "what was loaded is not what was saved"
    assert differing(whole, resumed) == []
    assert [int(state["adam_step"]) for state in (begin, half, whole, resumed)] == [0, 3, 6, 6]
    moved = [
        key
        for key in half
        if key.startswith("parameter/") and not torch.equal(half[key], whole[key])
    ]
    assert len(moved) == 14, "the three later steps changed nothing: the test proves nothing"


@pytest.mark.parametrize("zero_stage", ZERO_STAGES)
def test_the_gradient_norm_is_a_number_and_resumes(engine_runs: Any, zero_stage: int) -> None:
    run = engine_runs.load(f"state-retriever-z{zero_stage}-w2-r0")
    norms, later = run["norms/whole"], run["norms/resumed"]
    assert torch.isfinite(norms).all()
    assert (norms > 0).all()
    torch.testing.assert_close(norms[3:], later, rtol=0, atol=0)


def test_zero_stages_train_alike(engine_runs: Any) -> None:
    """Sharding says where state lies, not what is computed (up to the order of sums)."""
    ends = [
        part(engine_runs.load(f"state-retriever-z{stage}-w2-r0"), "whole") for stage in ZERO_STAGES
    ]
    norms = [
        engine_runs.load(f"state-retriever-z{stage}-w2-r0")["norms/whole"] for stage in ZERO_STAGES
    ]
    for end, norm in zip(ends[1:], norms[1:], strict=True):
        torch.testing.assert_close(norm, norms[0], rtol=1e-3, atol=0)
        for key, value in end.items():
            torch.testing.assert_close(value, ends[0][key], rtol=1e-2, atol=2e-4, msg=key)
