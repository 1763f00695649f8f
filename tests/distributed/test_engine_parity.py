"""DeepSpeed with the real stages: two ranks under ZeRO 0-3 give the gradients of one process
without it.

GradCache and gradient checkpointing go through a Latin square: each of their four combinations
meets each loss and each ZeRO stage.  All combinations, on 1, 2 and 4 ranks, are ``make parity``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.engine_worker import (
    GENERATOR_CASES,
    PLANTED,
    RETRIEVER_CASES,
    ZERO_STAGES,
    cell,
    modes_of,
)
from tests.distributed.parity import CAUGHT, TOLERANCE, flat_gradient, relative_error

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

LOSSES = ["contrastive", "alignment", "invariance_soft", "invariance_hard", "risk_variance", "all"]
CASES = [*RETRIEVER_CASES, *GENERATOR_CASES]
TOTALS = {"tokens", "answer_tokens", "padded_tokens"}  # per rank, hence halved by the mean over two


def gradient(run: dict[str, Tensor], case: str) -> Tensor:
    assert len([name for name in run if name.startswith(f"{case}/grad/")]) == 14, (
        "one layer, seven adapted projections"
    )
    return flat_gradient(run, case)


def label(case: str, zero_stage: int) -> str:
    number = [*(RETRIEVER_CASES if case in RETRIEVER_CASES else GENERATOR_CASES)].index(case)
    return cell(case, modes_of("pairwise", number, zero_stage)[0])


def metrics(run: dict[str, Tensor], case: str) -> dict[str, float]:
    prefix = f"{case}/metric/"
    return {
        name.removeprefix(prefix): float(value)
        for name, value in run.items()
        if name.startswith(prefix)
    }


@pytest.mark.parametrize("zero_stage", ZERO_STAGES)
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_of_one_process(engine_runs: Any, case: str, zero_stage: int) -> None:
    reference = gradient(engine_runs.load("parity-zNone-w1-r0"), case)
    name = label(case, zero_stage)
    ranks = [
        gradient(engine_runs.load(f"parity-z{zero_stage}-w2-r{rank}"), name) for rank in (0, 1)
    ]
    assert torch.equal(*ranks)
    assert reference.abs().max() > 1e-3, (
        "the reference has no gradient to speak of: the case proves nothing"
    )
    assert relative_error(ranks[0], reference) <= TOLERANCE


@pytest.mark.parametrize("zero_stage", ZERO_STAGES)
@pytest.mark.parametrize("stage", ["retriever", "generator"])
def test_zero_3_loads_a_base_in_shards(engine_runs: Any, stage: str, zero_stage: int) -> None:
    runs = [engine_runs.load(f"parity-z{zero_stage}-w2-r{rank}") for rank in (0, 1)]
    for run in runs:
        held, whole = run[f"held/{stage}"].tolist()
        assert whole > 1_000_000
        assert held == (whole // 2 if zero_stage == 3 else whole)


@pytest.mark.parametrize("zero_stage", ZERO_STAGES)
def test_ranks_had_different_numbers_of_chunks(engine_runs: Any, zero_stage: int) -> None:
    """What would hang ZeRO 2 and 3 if each rank ran its own number; and some calls had one chunk,
    others several.
    """
    counts = torch.cat(
        [engine_runs.load(f"parity-z{zero_stage}-w2-r{rank}")["chunks"] for rank in (0, 1)]
    )
    assert (counts[:, 0] < counts[:, 1]).any()
    assert (counts[:, 1] == 1).any()
    assert (counts[:, 1] > 2).any()


@pytest.mark.parametrize("zero_stage", ZERO_STAGES)
@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_wrong_gather_is_caught(engine_runs: Any, case: str, zero_stage: int) -> None:
    reference = gradient(engine_runs.load("parity-zNone-w1-r0"), "all")
    found = gradient(engine_runs.load(f"parity-z{zero_stage}-w2-r0"), case)
    assert relative_error(found, reference) > CAUGHT


@pytest.mark.parametrize("zero_stage", ZERO_STAGES)
@pytest.mark.parametrize("case", CASES)
def test_logged_numbers_do_not_depend_on_the_number_of_ranks(
    engine_runs: Any, case: str, zero_stage: int
) -> None:
    single = metrics(engine_runs.load("parity-zNone-w1-r0"), case)
    ranks = metrics(engine_runs.load(f"parity-z{zero_stage}-w2-r0"), label(case, zero_stage))
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
