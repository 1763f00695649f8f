"""Held-out questions of stage 1: never trained on, measured as a plain search would, and what
follows from it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from invar_ray.errors import DataError
from invar_ray.models.encoder import llm_spec
from invar_ray.training.batches import Trainset
from invar_ray.training.retriever_stage import RetrieverStage
from invar_ray.training.stage import (
    HELDOUT,
    HELDOUT_OVERLAP,
    Chunking,
    best_step,
    is_exhausted,
)
from tests import support

ALONE = Chunking(200, lambda count: count, torch.Tensor.backward)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> support.World:
    return support.world(tmp_path_factory)


def make_stage(world: support.World, **settings: Any) -> RetrieverStage:
    config = support.with_retriever(world.config, **settings)
    spec = llm_spec(config.model, world.base, ("retriever/x", "x"))
    return RetrieverStage(
        config, world.store, {"trainset": world.trainset.ref, "encoder": spec.to_json()}, 0, 1
    )


def test_no_batch_holds_a_heldout_question_or_its_passages(world: support.World) -> None:
    trainset = Trainset(world.trainset)
    trainset.hold_out(0.4, seed=0)
    aside = {trainset.titles[trainset.positives[row]] for row in trainset.heldout}
    assert 0 < len(trainset.heldout) < len(trainset)
    trained: set[int] = set()
    for step in range(20):
        plan = trainset.plan(0, step, 3, 2, 1)
        trained |= set(plan.rows)
        assert not aside & {trainset.titles[slot] for slot in plan.slots}
    assert not trained & set(trainset.heldout)
    again = Trainset(world.trainset)
    again.hold_out(0.4, seed=0)
    assert again.heldout == trainset.heldout


@pytest.mark.parametrize("share", [0.0001, 1.0])
def test_a_share_that_leaves_nothing_is_refused(world: support.World, share: float) -> None:
    with pytest.raises(DataError, match=f"heldout_share {share} sets"):
        Trainset(world.trainset).hold_out(share, seed=0)


def test_what_is_measured_is_the_recall_of_a_plain_search(world: support.World) -> None:
    stage = make_stage(world, heldout_share=0.5)
    trainset = stage.trainset
    found = stage.measure(stage.module, ALONE)
    assert stage.module.training

    # A fresh adapter changes nothing, so the bare base's encoder is the reference.
    encoder = world.base_encoder
    texts = [
        (title, cuts[0]) for title, cuts in zip(trainset.titles, trainset.slot_texts, strict=True)
    ]
    passages = torch.from_numpy(encoder.encode_passages(texts))
    anchor, worst, overlaps = [], [], []
    for row in trainset.heldout:
        gold = texts[trainset.positives[row]][1]
        hits, tops = [], []
        for vector in torch.from_numpy(encoder.encode_queries(trainset.wordings[row])):
            order = (passages @ vector).argsort(descending=True).tolist()
            tops.append(set(order[:10]))
            ranked = list(dict.fromkeys(texts[place][1] for place in order))
            hits.append(gold in ranked[:5])
        anchor.append(hits[0])
        worst.append(all(hits))
        others = [len(tops[0] & top) / len(tops[0] | top) for top in tops[1:]]
        overlaps.append(sum(others) / len(others))
    assert found == {
        "heldout_questions": len(trainset.heldout),
        "heldout_recall_at_5": sum(anchor) / len(anchor),
        HELDOUT: sum(worst) / len(worst),
        HELDOUT_OVERLAP: pytest.approx(sum(overlaps) / len(overlaps)),
    }
    assert 0 < found[HELDOUT_OVERLAP] < 1
    assert 0 < found[HELDOUT] <= found["heldout_recall_at_5"]


def test_off_by_default(world: support.World) -> None:
    stage = make_stage(world)
    assert stage.measure_every == 0
    assert stage.trainset.heldout == []


def test_best_step_and_patience() -> None:
    log = [
        {"step": 1},
        {"step": 2, HELDOUT: 0.5},
        {"step": 3},
        {"step": 4, HELDOUT: 0.7},
        {"step": 6, HELDOUT: 0.7},
    ]
    assert best_step(log[:1]) is None
    assert best_step(log) == 4, "the first of equals"
    assert not is_exhausted(log, None)
    assert not is_exhausted(log, 2)
    assert is_exhausted(log, 1)
    assert is_exhausted([*log, {"step": 8, HELDOUT: 0.1}], 2)
