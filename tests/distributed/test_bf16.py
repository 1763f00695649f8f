"""bf16 on two ranks: the gradients of fp32 in one process, and the same bits after a resumption.

Both stages, ZeRO 1-3 (0 is refused in bf16), GradCache and gradient checkpointing on and off, a
projection on the retriever.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tests.distributed.engine_worker import (
    BF16_STATE_CASES,
    BF16_ZERO_STAGES,
    GENERATOR_CASES,
    MODES,
    PLANTED,
    RETRIEVER_CASES,
    cell,
)
from tests.distributed.parity import flat_gradient
from tests.distributed.test_engine_state import differing

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1800)]

ALIKE = 0.999
# Which slots count as hard patterns is a choice at a limit, and rounding takes some across it.
ALIKE_OF = {"invariance_hard": 0.998}
RANKS = (0, 1)


def cosine(found: Tensor, wanted: Tensor) -> float:
    assert torch.isfinite(found).all()
    assert wanted.abs().max() > 1e-3, "the reference has no gradient to speak of"
    return float(cosine_similarity(found, wanted, dim=0))


@pytest.mark.parametrize("zero_stage", BF16_ZERO_STAGES)
@pytest.mark.parametrize("case", [*RETRIEVER_CASES, *GENERATOR_CASES])
def test_gradients_are_those_of_fp32(bf16_runs: Any, case: str, zero_stage: int) -> None:
    wanted = flat_gradient(bf16_runs.load("parity-zNone-w1-r0"), case)
    runs = [bf16_runs.load(f"parity-z{zero_stage}-w2-r{rank}") for rank in RANKS]
    for mode in MODES:
        one, other = (flat_gradient(run, cell(case, mode)) for run in runs)
        assert torch.equal(one, other)
        assert not torch.equal(one, wanted), "the same bits as fp32: this is no bf16"
        assert cosine(one, wanted) > ALIKE_OF.get(case, ALIKE), mode


@pytest.mark.parametrize("zero_stage", BF16_ZERO_STAGES)
@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_wrong_gather_is_caught(bf16_runs: Any, case: str, zero_stage: int) -> None:
    wanted = flat_gradient(bf16_runs.load("parity-zNone-w1-r0"), "all")
    found = flat_gradient(bf16_runs.load(f"parity-z{zero_stage}-w2-r0"), case)
    assert cosine(found, wanted) < 0.95


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("zero_stage", BF16_ZERO_STAGES)
@pytest.mark.parametrize("case", BF16_STATE_CASES)
def test_a_resumed_run_is_bit_equal(bf16_runs: Any, case: str, zero_stage: int, rank: int) -> None:
    run = bf16_runs.load(f"state-{case}-z{zero_stage}-w2-r{rank}")

    def part(name: str) -> dict[str, Tensor]:
        return {
            key.removeprefix(f"{name}/"): value
            for key, value in run.items()
            if key.startswith(f"{name}/")
        }

    half, loaded, whole, resumed = map(part, ("half", "loaded", "whole", "resumed"))
    # Seven projections of two matrices each, with two moments, and Adam's step; stage 1 has a
    # projection of its vectors, too.
    assert len(whole) == 43 + 3 * case.startswith("retriever")
    assert differing(half, loaded) == [], "what was loaded is not what was saved"
    assert differing(whole, resumed) == []
    assert torch.equal(run["norms/whole"][3:], run["norms/resumed"])
    assert (run["norms/whole"] > 0).all()
    parameters = {key: value for key, value in whole.items() if key.startswith("parameter/")}
    assert differing(parameters, half) == [*parameters], "the later steps changed nothing"
    # Master weights: what Adam adds is far below bf16's grid.
    for key, value in parameters.items():
        assert value.dtype == torch.float32
        assert not torch.equal(value, value.bfloat16().float()), key
    assert run["inv_freq"].dtype == torch.float32
    assert not torch.equal(run["inv_freq"], run["inv_freq"].bfloat16().float())
