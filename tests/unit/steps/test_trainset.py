"""What stage 1 trains on: positives that hold the answer, the teacher's document view, and a whole
artifact.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file

from invar_ray.answering.bm25 import Bm25
from invar_ray.answering.retriever import Passages
from invar_ray.errors import DataError
from invar_ray.executor import Here, Work
from invar_ray.losses.masks import contrastive_allowed
from invar_ray.models.encoder import COARSE_MAX_TOKENS
from invar_ray.models.minilm import CoarseEncoder
from invar_ray.pipeline import Pipeline
from invar_ray.schema import Document, Example, Passage
from invar_ray.steps import trainset as trainset_step
from invar_ray.steps.passages import load_documents, load_passages
from invar_ray.steps.questions import load_examples, load_rewrites
from invar_ray.steps.trainset import MineBlock, find_positives
from invar_ray.steps.trainset import build as build_trainset
from invar_ray.steps.trainset import plan as trainset_plan
from invar_ray.store.artifacts import Artifact
from invar_ray.text.answers import contains_answer
from invar_ray.training.batches import Trainset
from tests.support import ISLANDS, World, with_retriever, world


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> World:
    return world(tmp_path_factory)


PASSAGES = [
    Passage("a:0", "a", "A", "Nothing of use.", 0, 15),
    Passage("a:1", "a", "A", "The keeper was Mara Voss.", 16, 40),
    Passage("a:2", "a", "A", "Mara Voss left in spring.", 41, 66),
    Passage("b:0", "b", "B", "Barley and salt.", 0, 16),
    Passage("b:1", "b", "B", "Also Mara Voss.", 17, 32),
]


def example(answers: tuple[str, ...], positive_ids: tuple[str, ...], id: str = "q") -> Example:
    return Example(id, "Who?", answers, positive_ids)


@pytest.mark.parametrize(
    "answers, documents, row",
    [
        (("Mara Voss",), ("a",), 1),  # the first passage that holds it
        (("nobody",), ("a",), 0),  # none does: the first of the document
        (("nobody", "spring"), ("a",), 2),  # any answer will do
        (("salt",), ("a", "b"), 3),  # any of the documents
        (("Mara Voss",), ("b", "a"), 4),  # in the order in which they are named
        (("Mara Voss",), ("gone", "a"), 1),  # one of them is enough
        (("Mara",), ("b",), 4),
        (("bar",), ("b",), 3),  # "Barley" is not "bar"
    ],
)
def test_positive_is_chosen_by_the_answer(
    answers: tuple[str, ...], documents: tuple[str, ...], row: int
) -> None:
    assert find_positives([example(answers, documents)], dict(enumerate(PASSAGES))) == [row]


def test_missing_positives_are_counted_and_the_first_is_named() -> None:
    examples = [
        example(("x",), ("a",), "good"),
        example(("x",), ("c", "d", "e", "f"), "bad"),
        example(("x",), (), "empty"),
    ]
    with pytest.raises(DataError) as caught:
        find_positives(examples, dict(enumerate(PASSAGES)))
    assert str(caught.value) == (
        "2 of 3 train questions have no positive document in the corpus (first: bad, "
        "positive_ids ['c', 'd', 'e']). "
        "Expected: positive_ids that are ids of corpus rows (all but 10%). "
        "To do: use the corpus that the questions were made for, or raise corpus.limit."
    )


# A whole artifact


def test_positives_and_negatives_of_the_artifact(small: World) -> None:
    rows = load_passages(small.passages)
    examples = load_examples(small.questions, "train")
    questions = pq.read_table(small.trainset.path("questions.parquet")).to_pylist()
    slots = pq.read_table(small.trainset.path("slots.parquet")).to_pylist()
    by_id = {passage.id: passage for passage in rows}
    assert [row["question_id"] for row in questions] == [item.id for item in examples]
    wanted = {row["positive"] for row in questions} | {
        slot for row in questions for slot in row["negatives"]
    }
    assert wanted == set(range(len(slots))), "every slot is used, and every slot used is there"
    for item, row, gold in zip(
        examples, questions, find_positives(examples, dict(enumerate(rows))), strict=True
    ):
        assert slots[row["positive"]]["passage_id"] == rows[gold].id
        assert contains_answer(rows[gold].text, item.answers)
        assert (
            len(row["negatives"])
            == len(set(row["negatives"]))
            <= small.config.retriever.num_hard_negatives
        )
        for slot in row["negatives"]:
            negative = by_id[slots[slot]["passage_id"]]
            assert not contains_answer(f"{negative.title} {negative.text}", item.answers)
            assert negative.id != rows[gold].id
    assert sum(len(row["negatives"]) for row in questions) > len(questions)


def test_windows_are_cuts_of_the_document_that_keep_the_answer(small: World) -> None:
    documents = load_documents(small.passages)
    questions = pq.read_table(small.trainset.path("questions.parquet")).to_pylist()
    slots = pq.read_table(small.trainset.path("slots.parquet")).to_pylist()
    cuts = 0
    for row in questions:
        slot = slots[row["positive"]]
        document = documents[slot["document_id"]]
        assert row["positive_texts"][0] == document.text[slot["start"] : slot["end"]]
        assert len(row["positive_texts"]) <= 1 + small.config.rewrites.num_windows
        for text in row["positive_texts"]:
            assert text in document.text
            assert contains_answer(text, row["answers"])
        cuts += len(row["positive_texts"]) - 1
    assert cuts == len(questions)
    for slot in slots:
        assert slot["texts"][0] == documents[slot["document_id"]].text[slot["start"] : slot["end"]]


def test_wordings_are_the_question_s_variants(small: World) -> None:
    rewrites = load_rewrites(small.questions, "train")
    for row in pq.read_table(small.trainset.path("questions.parquet")).to_pylist():
        assert row["wordings"] == [rewrite.text for rewrite in rewrites[row["question_id"]]]
        assert len(row["wordings"]) == 1 + small.config.rewrites.num_rewrites


def test_teacher_vectors_are_minilm_s(small: World) -> None:
    teacher = load_file(str(small.trainset.path("teacher.safetensors")))
    coarse = CoarseEncoder("builtin:minilm", COARSE_MAX_TOKENS, "f")
    examples = load_examples(small.questions, "train")
    assert (
        np.abs(
            teacher["questions"] - coarse.encode_queries([item.question for item in examples])
        ).max()
        < 1e-5
    )
    slots = pq.read_table(small.trainset.path("slots.parquet")).to_pylist()
    rows = load_passages(small.passages)
    vectors = coarse.encode_passages([(passage.title, passage.text) for passage in rows])

    def of_document(name: str) -> list[int]:
        return [row for row, passage in enumerate(rows) if passage.document_id == name]

    place = {passage.id: row for row, passage in enumerate(rows)}
    chosen = [place[slot["passage_id"]] for slot in slots]
    # what a float16 rounds by, and 1e-5 for other paddings
    assert (
        np.abs(teacher["slots"] - vectors[chosen]) <= 2.0**-11 * np.abs(vectors[chosen]) + 1e-5
    ).all()
    means = np.stack(
        [sum(vectors[row] for row in of_document(rows[at].document_id)) for at in range(len(rows))]
    )
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    assert (
        np.abs(teacher["documents"] - means[chosen]).max() < 2.0**-11 * np.abs(vectors).max() + 1e-5
    )


def test_mined_negatives_pass_the_contrastive_mask(small: World) -> None:
    """Mining and the loss's mask follow the same rules: what is mined counts, unless another cut
    holds an answer.
    """
    trainset = Trainset(small.trainset)
    plan = trainset.plan(0, 0, len(trainset), 10, 1)
    allowed = contrastive_allowed(
        trainset.slot_metadata(plan),
        torch.tensor(plan.positive),
        teacher_scores=trainset.teacher_scores(
            plan, small.config.experimental.coarse.document_weight
        ),
        holds_answer=trainset.holds_answer(plan),
        teacher_margin=small.config.experimental.retriever.false_negative_margin,
    )
    place = {slot: column for column, slot in enumerate(plan.slots)}
    own = [(i, place[slot]) for i, row in enumerate(plan.rows) for slot in trainset.negatives[row]]
    assert own
    for i, column in own:
        texts = trainset.slot_texts[plan.slots[column]]
        other_cut = any(contains_answer(text, trainset.answers[plan.rows[i]]) for text in texts[1:])
        assert bool(allowed[i, column]) != other_cut


def test_bm25_joins_and_the_rank_range_is_reported(
    small: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mined(**settings: Any) -> tuple[Artifact, list[set[str]]]:
        config = with_retriever(small.config, **settings)
        parents = (
            small.passages,
            small.questions,
            small.base_index,
            small.coarse_index.parent("vectors"),
        )
        artifact, _ = small.store.get_or_build(
            trainset_plan(config, *parents),
            lambda building: build_trainset(building, config, *parents, executor=Here()),
        )
        ids = pq.read_table(artifact.path("slots.parquet")).column("passage_id").to_pylist()
        rows = pq.read_table(artifact.path("questions.parquet")).column("negatives").to_pylist()
        return artifact, [{ids[slot] for slot in row} for row in rows]

    rows = load_passages(small.passages)
    bm25 = Bm25([f"{row.title} {row.text}" for row in rows])

    def refused(*_: Any) -> None:
        raise AssertionError("the index has its own BM25: the corpus is not read as objects")

    monkeypatch.setattr(Bm25, "__init__", refused)
    rewrites = load_rewrites(small.questions, "train")
    few = {"mining_depth": 8, "num_hard_negatives": 40}
    (plain, dense), (_, both) = mined(**few), mined(**few, mining_bm25=True)
    assert plain.ref != small.trainset.ref
    joined = 0
    for item, old, new in zip(load_examples(small.questions, "train"), dense, both, strict=True):
        lists = bm25.search([rewrite.text for rewrite in rewrites[item.id]], 8)
        by_words = {rows[row].id for found in lists for row, _ in found}
        assert old <= new <= old | by_words
        joined += len(new - old)
    assert joined > 0

    ranged, later = mined(**few, mining_first_rank=2)
    assert all(new <= old for old, new in zip(dense, later, strict=True))
    assert ranged.info["mining"]["dropped"]["rank too high"] >= len(dense)
    assert "rank too high" not in plain.info["mining"]["dropped"]


def test_mining_is_reported(small: World) -> None:
    mined = json.loads(small.trainset.path("mining.json").read_text(encoding="utf-8"))
    assert mined == small.trainset.info["mining"]
    questions = pq.read_table(small.trainset.path("questions.parquet")).to_pylist()
    assert mined["kept"] == sum(len(row["negatives"]) for row in questions)
    assert mined["dropped"]["copy of the positive"] >= 1
    assert small.trainset.info["questions"] == len(questions)


def test_mining_is_work_for_actors_that_have_what_embedding_has(
    small: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base of billions is not opened in the driver, which may have no GPU and little memory."""
    scale = replace(small.config.scale, embed_workers=3, embed_gpus_per_worker=0.5)
    config = replace(small.config, scale=scale)
    seen: list[Work] = []

    class Actors(Here):
        """Actors of another machine: what they make stands already."""

        def run(self, work: Work) -> Iterator[dict[str, Any]]:
            seen.append(work)
            monkeypatch.undo()  # from here on this is an actor
            arguments = {**work.arguments, "device": "cpu"}
            return iter([MineBlock(**arguments)(dict(row)) for row in work.rows])

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the driver opens a model")

    for name in ("open_retriever", "open_encoder"):
        monkeypatch.setattr(trainset_step, name, refuse)
    parents = (
        small.passages,
        small.questions,
        small.base_index,
        small.coarse_index.parent("vectors"),
    )
    plan = replace(trainset_plan(config, *parents), name="by-actors")
    made, _ = small.store.get_or_build(
        plan, lambda building: build_trainset(building, config, *parents, executor=Actors())
    )
    (work,) = seen
    assert (work.workers, work.num_gpus, work.arguments["device"]) == ((3, 3), 0.5, "cuda")
    for name in ("questions.parquet", "slots.parquet"):
        assert pq.read_table(made.path(name)) == pq.read_table(small.trainset.path(name))


def test_of_a_corpus_the_driver_makes_what_the_questions_touch(
    small: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not every passage and document: there may be millions."""
    touched: set[int] = set()
    real = Passages.rows

    def watched(self: Passages, rows: Sequence[int]) -> list[Passage]:
        touched.update(rows)
        return real(self, rows)

    loaded: list[int] = []

    def counted(*arguments: Any) -> dict[str, Document]:
        found = load_documents(*arguments)
        loaded.append(len(found))
        return found

    monkeypatch.setattr(Passages, "rows", watched)
    monkeypatch.setattr(trainset_step, "load_documents", counted)
    questions = replace(small.config.questions, train_limit=1)
    config = with_retriever(replace(small.config, questions=questions), mining_depth=2)
    with Pipeline(config, quiet=True, executor=Here()) as run:
        assert run.trainset.info["questions"] == 1
    assert 0 < len(touched) < small.passages.info["passages"] / 2
    assert len(loaded) == 1
    assert 0 < loaded[0] < len(ISLANDS) / 2
