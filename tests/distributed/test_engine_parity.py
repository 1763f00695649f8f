"""DeepSpeed with the real stages: two ranks under ZeRO 0, 2 and 3 give the gradients of one process without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

TOLERANCE = 2e-5  # of the largest gradient entry, float32
ZERO_STAGES = [0, 2, 3]
LOSSES = ["contrastive", "alignment", "invariance_soft", "invariance_hard", "risk_variance", "all"]
CASES = [*LOSSES, "all_odd", "answer", "answer_odd", "answer_single"]
TOTALS = {"tokens", "answer_tokens"}  # per rank, hence halved by the mean over two


def gradient(run: dict[str, Tensor], case: str) -> Tensor:
    names = sorted(name for name in run if name.startswith(f"{case}/grad/"))
    assert len(names) == 14, "one layer with seven adapted projections"
    return torch.cat([run[name].flatten() for name in names])


def metrics(run: dict[str, Tensor], case: str) -> dict[str, float]:
    prefix = f"{case}/metric/"
    return {name.removeprefix(prefix): float(value) for name, value in run.items() if name.startswith(prefix)}


@pytest.mark.parametrize("zero_stage", ZERO_STAGES)
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_of_one_process(engine_runs: Any, case: str, zero_stage: int) -> None:
    reference = gradient(engine_runs.load("parity-zNone-w1-r0"), case)
    ranks = [gradient(engine_runs.load(f"parity-z{zero_stage}-w2-r{rank}"), case) for rank in (0, 1)]
    assert torch.equal(*ranks)
    assert reference.abs().max() > 1e-3, "the reference has no gradient to speak of: the case proves nothing"
    assert float((ranks[0] - reference).abs().max() / reference.abs().max()) <= TOLERANCE


@pytest.mark.parametrize("zero_stage", ZERO_STAGES)
@pytest.mark.parametrize("case", CASES)
def test_logged_numbers_do_not_depend_on_the_number_of_ranks(engine_runs: Any, case: str, zero_stage: int) -> None:
    single = metrics(engine_runs.load("parity-zNone-w1-r0"), case)
    ranks = metrics(engine_runs.load(f"parity-z{zero_stage}-w2-r0"), case)
    assert single.keys() == ranks.keys()
    assert "loss" in single
    for name in single.keys() - TOTALS:
        assert ranks[name] == pytest.approx(single[name], rel=1e-4, abs=1e-5), name
    if "answer_tokens" in single:
        assert 2 * ranks["answer_tokens"] == single["answer_tokens"]


@pytest.mark.parametrize("case", LOSSES[1:])
def test_each_loss_has_a_gradient_of_its_own(engine_runs: Any, case: str) -> None:
    """Otherwise the parity of its case would be the contrastive loss's."""
    run = engine_runs.load("parity-zNone-w1-r0")
    alone, with_it = gradient(run, "contrastive"), gradient(run, case)
    assert float((with_it - alone).abs().max() / alone.abs().max()) > 0.05
