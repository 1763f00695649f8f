"""What stage 2 reads: hits in all their windows, and the oracles."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from invar_ray.evaluation.measure import FoundFamily
from invar_ray.schema import Passage
from invar_ray.steps.hits import bm25_plan, load_hits
from invar_ray.steps.hits import build_bm25 as build_bm25_hits
from invar_ray.steps.passages import load_documents, load_passages
from invar_ray.steps.readings import READINGS, oracle_of
from invar_ray.steps.readings import build as build_readings
from invar_ray.steps.readings import plan as readings_plan
from invar_ray.store.artifacts import Artifact, Plan
from invar_ray.text.answers import contains_answer
from tests.support import World, changed_windows, world


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> World:
    return world(tmp_path_factory)


@pytest.fixture(scope="module")
def hits(small: World) -> Artifact:
    plan = bm25_plan(small.passages, small.questions, "train", 3)
    return small.get(
        plan, lambda building: build_bm25_hits(building, small.passages, small.questions)
    )


def read(small: World, hits: Artifact, windows: int) -> Artifact:
    plan = readings_plan(changed_windows(small.config, windows), hits, small.passages)
    return small.get(plan, lambda building: build_readings(building, hits, small.passages))


def test_every_hit_comes_in_its_windows(small: World, hits: Artifact) -> None:
    made = read(small, hits, 2)
    documents = load_documents(small.passages)
    passages = {passage.id: passage for passage in load_passages(small.passages)}
    rows = pq.read_table(made.path(READINGS)).to_pylist()
    families = load_hits(hits)
    assert [row["question_id"] for row in rows] == [family.question_id for family in families]
    lengths = set()
    for row, family in zip(rows, families, strict=True):
        assert row["wordings"] == list(family.wordings)
        found = [[hit["passage_id"] for hit in wording] for wording in row["hits"]]
        assert found == [[hit.passage_id for hit in wording] for wording in family.hits]
        for shown in (hit for wording in row["hits"] for hit in wording):
            anchor, *others = shown["texts"]
            assert anchor == passages[shown["passage_id"]].text
            assert all(text in documents[shown["document_id"]].text for text in others)
            assert len({anchor, *others}) == len(shown["texts"]) <= 3
            if contains_answer(anchor, row["answers"]):  # a cut of it teaches the same target
                assert all(contains_answer(text, row["answers"]) for text in others)
            lengths |= {len(text) > len(anchor) for text in others}
    assert lengths == {True, False}, "cuts are both longer and shorter"
    assert made.info["windows_per_passage"] > 1


def test_the_oracle_is_a_gold_passage_that_holds_an_answer(small: World, hits: Artifact) -> None:
    rows = pq.read_table(read(small, hits, 1).path(READINGS)).to_pylist()
    for row in rows:
        assert row["oracle"]["document_id"] in row["positive_ids"]
        assert all(contains_answer(text, row["answers"]) for text in row["oracle"]["texts"])
    assert read(small, hits, 1).info["oracles"] == len(rows)


def test_a_gold_document_without_the_answer_gives_no_oracle() -> None:
    passages = {
        "a": [
            Passage("a:0", "a", "A", "Nothing of use.", 0, 15),
            Passage("a:1", "a", "A", "Mara Voss.", 16, 26),
        ],
        "b": [Passage("b:0", "b", "Mara Voss", "Barley and salt.", 0, 16)],
    }
    family = FoundFamily("q", ("Who?",), ("Mara Voss",), ("gone", "b", "a"), ((),))
    assert oracle_of(family, passages) == passages["a"][1]
    assert oracle_of(FoundFamily("q", ("Who?",), ("nobody",), ("a",), ((),)), passages) is None


def test_only_the_windows_and_the_seed_make_other_readings(small: World, hits: Artifact) -> None:
    def plan(windows: int) -> Plan:
        return readings_plan(changed_windows(small.config, windows), hits, small.passages)

    assert plan(1).fingerprint == plan(1).fingerprint != plan(2).fingerprint
    rows = pq.read_table(read(small, hits, 0).path(READINGS)).to_pylist()
    assert all(len(hit["texts"]) == 1 for row in rows for wording in row["hits"] for hit in wording)
