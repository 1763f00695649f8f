"""New negatives under another adapter: the artifacts, the part that is searched, and what a stage
makes of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from invar_ray.models.encoder import llm_spec
from invar_ray.steps.passages import load_passages
from invar_ray.steps.refresh import changed_share, refresh_negatives
from invar_ray.store.garbage import remove
from invar_ray.training.batches import Trainset
from invar_ray.training.retriever_stage import RetrieverStage
from tests.support import World, with_retriever, world


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> World:
    return world(tmp_path_factory)


@pytest.fixture(scope="module")
def made(small: World) -> dict[str, Any]:
    return refresh(small)


def refresh(small: World, **settings: Any) -> dict[str, Any]:
    config = with_retriever(small.config, **settings)
    root, first = small.store.root_uri, small.trainset.ref
    return refresh_negatives(config, root, small.adapter.ref, first, first)


def test_a_version_is_a_training_set_under_the_given_adapter(
    small: World, made: dict[str, Any]
) -> None:
    version = small.store.open(made["trainset"], "trainset")
    assert version.ref != small.trainset.ref
    index = version.parent("index")
    assert index.info["encoder"]["adapter_fingerprint"] == small.adapter.fingerprint
    assert index.parent("vectors").parent("adapter").ref == small.adapter.ref
    for role in ("passages", "questions", "teacher"):
        assert version.parent(role).ref == small.trainset.parent(role).ref
    assert made["mining"] == json.loads(version.path("mining.json").read_text(encoding="utf-8"))
    assert made["passages"] == len(load_passages(small.passages))
    assert 0 < made["changed_share"] <= 1, "the adapter of the tests ranks otherwise than the base"


def test_again_it_finds_what_stands(small: World, made: dict[str, Any]) -> None:
    again = refresh(small)
    assert {**again, "seconds": 0} == {**made, "seconds": 0}


def test_share_of_changed_negatives(small: World, made: dict[str, Any]) -> None:
    version = small.store.open(made["trainset"], "trainset")
    assert changed_share(small.trainset, small.trainset) == 0
    old, new = (Trainset(artifact) for artifact in (small.trainset, version))
    ids = [
        pq.read_table(a.path("slots.parquet")).column("passage_id").to_pylist()
        for a in (small.trainset, version)
    ]
    fresh = total = 0
    for row in range(len(new)):
        had = {ids[0][slot] for slot in old.negatives[row]}
        fresh += sum(ids[1][slot] not in had for slot in new.negatives[row])
        total += len(new.negatives[row])
    assert made["changed_share"] == fresh / total


def test_a_part_holds_the_share_and_what_the_training_set_needs(tmp_path: Path) -> None:
    # it begins with the positives alone, 12 of 36 passages
    small = World(tmp_path, "retriever.num_hard_negatives=0")
    found = refresh(small, refresh_share=0.1, num_hard_negatives=2)
    version = small.store.open(found["trainset"], "trainset")
    part = version.parent("index").parent("passages")
    assert part.info == {"passages": found["passages"], "of": len(load_passages(small.passages))}
    rows = load_passages(part)
    held = set(pq.read_table(small.trainset.path("slots.parquet")).column("passage_id").to_pylist())
    everything = load_passages(small.passages)
    assert held <= {row.id for row in rows} < {row.id for row in everything}
    assert rows == [row for row in everything if row in rows], "in the order of the whole"
    assert len(held) + 1 <= len(rows) <= len(held) + 4
    mined = set(pq.read_table(version.path("slots.parquet")).column("passage_id").to_pylist())
    assert held < mined <= {row.id for row in rows}


def test_scratch_can_go(small: World) -> None:
    found = refresh(small, refresh_share=0.1)
    for ref in found["scratch"]:
        assert small.store.open(ref)
        remove(small.store, ref)
        remove(small.store, ref)  # a run that was cut off here comes again
    Trainset(small.store.open(found["trainset"], "trainset"))
    assert {artifact.ref for artifact in small.store.list("vectors")}.isdisjoint(found["scratch"])


def test_a_stage_keeps_its_questions_and_measurements(small: World, made: dict[str, Any]) -> None:
    config = with_retriever(small.config, heldout_share=0.3, global_batch_size=3)
    spec = llm_spec(config.model, small.base, ("retriever/x", "x"))
    inputs = {"trainset": small.trainset.ref, "encoder": spec.to_json()}
    stage = RetrieverStage(config, small.store, inputs, 0, 1)
    before, measured = [stage.describe(step) for step in range(6)], stage._measured
    stage.adopt(made["trainset"])
    after = [stage.describe(step) for step in range(6)]
    for old, new in zip(before, after, strict=True):
        assert [q["id"] for q in old["questions"]] == [q["id"] for q in new["questions"]]
        count = len(old["questions"])
        assert old["candidates"][:count] == new["candidates"][:count], "the positives"
    assert before != after, "other negatives"
    assert stage._measured is measured
    assert stage.trainset.heldout == measured.heldout
