"""The ``passages`` artifact: exact cuts of the documents, and a stated part of a large corpus."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from invar_ray.config import PASSAGE_FIELDS, Config
from invar_ray.errors import ConfigError, DataError
from invar_ray.executor import Here
from invar_ray.models.base import BaseRef
from invar_ray.schema import PASSAGE_SCHEMA, Passage
from invar_ray.steps.passages import build as build_passages
from invar_ray.steps.passages import load_documents, load_passages
from invar_ray.steps.passages import plan as passages_plan
from invar_ray.steps.questions import build as build_questions
from invar_ray.steps.questions import plan as questions_plan
from invar_ray.store.artifacts import Artifact, Store
from tests.support import documents, small_config, tiny_base, write_lines

BASE = BaseRef("x", None, "0" * 16)


def questions_of(config: Config) -> Artifact:
    store = Store(config.storage.root_uri)
    return store.get_or_build(
        questions_plan(config), lambda building: build_questions(building, config)
    )[0]


def build(config: Config, questions: Artifact | None = None) -> Artifact:
    store = Store(config.storage.root_uri)
    return store.get_or_build(
        passages_plan(config, BASE, questions),
        lambda building: build_passages(
            building, config, tiny_base()[1], questions, executor=Here()
        ),
    )[0]


def test_passages_are_exact_cuts_in_document_order(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    artifact = build(config)
    found, passages = load_documents(artifact), load_passages(artifact)
    assert list(found) == [row["id"] for row in documents()]
    assert len(passages) > len(found)
    for passage in passages:
        document = found[passage.document_id]
        assert document.text[passage.start : passage.end] == passage.text
        assert (passage.title, passage.uri) == (document.title, document.uri)
        assert len(tiny_base()[1](passage.text)["input_ids"]) <= config.corpus.chunk_tokens
    order = [(list(found).index(passage.document_id), passage.start) for passage in passages]
    assert order == sorted(order)
    assert len({passage.id for passage in passages}) == len(passages)
    assert artifact.info == {
        "source": config.corpus.uri,
        "files": 1,
        "documents": len(found),
        "passages": len(passages),
        "skipped": 0,
        "quarantined": 0,
    }
    assert passages[-1].place == f"{Path(config.corpus.uri).name}, row {len(found)}"


def test_same_corpus_same_files(tmp_path: Path) -> None:
    rows = documents()
    first, second = (
        build(
            small_config(
                tmp_path / name, f"corpus.uri={write_lines(tmp_path / 'shared.jsonl', rows)}"
            )
        )
        for name in ("one", "two")
    )
    assert first.fingerprint == second.fingerprint
    assert first.manifest.files == second.manifest.files


def test_shorter_chunks_give_more_passages(tmp_path: Path) -> None:
    long = build(small_config(tmp_path))
    short = build(small_config(tmp_path, "corpus.chunk_tokens=16", "corpus.chunk_stride=16"))
    overlapping = build(small_config(tmp_path, "corpus.chunk_tokens=16", "corpus.chunk_stride=8"))
    assert len(load_passages(long)) < len(load_passages(short)) < len(load_passages(overlapping))


def test_limit_keeps_the_first_documents(tmp_path: Path) -> None:
    artifact = build(small_config(tmp_path, "corpus.limit=3"))
    assert list(load_documents(artifact)) == [row["id"] for row in documents()[:3]]


def test_limit_holds_for_the_builtin_corpus_too(tmp_path: Path) -> None:
    artifact = build(small_config(tmp_path, "corpus.uri=builtin:facts", "corpus.limit=3"))
    assert len(load_documents(artifact)) == 3


@pytest.mark.parametrize("text", ["", "   \n "])
def test_corpus_without_text_is_refused(tmp_path: Path, text: str) -> None:
    place = write_lines(tmp_path / "empty.jsonl", [{"id": "a", "title": "", "text": text}])
    with pytest.raises(DataError) as caught:
        build(small_config(tmp_path, f"corpus.uri={place}"))
    assert str(caught.value) == (
        f"the corpus {place} gave no passage (1 documents read). Expected: at least one document "
        "with text. "
        "To do: check corpus.uri, corpus.format and corpus.limit."
    )


def test_corpus_without_documents_is_refused(tmp_path: Path) -> None:
    place = write_lines(tmp_path / "empty.jsonl", [])
    with pytest.raises(DataError, match="is empty"):
        build(small_config(tmp_path, f"corpus.uri={place}"))


def test_corpus_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file or folder"):
        build(small_config(tmp_path, f"corpus.uri={tmp_path / 'missing.jsonl'}"))


# A stated part of a corpus

LIMITS = ("questions.train_limit=2", "questions.dev_limit=2")


@pytest.mark.parametrize("distractors", [0, 3, 100])
def test_distractors_keep_what_questions_need_and_the_first_others(
    tmp_path: Path, distractors: int
) -> None:
    config = small_config(tmp_path, *LIMITS, f"corpus.distractors={distractors}")
    questions = questions_of(config)
    from invar_ray.steps.questions import load_examples

    needed = {
        document_id
        for split in ("train", "dev")
        for example in load_examples(questions, split)  # type: ignore[arg-type]
        for document_id in example.positive_ids
    }
    assert 2 <= len(needed) <= 4
    kept = list(load_documents(build(config, questions)))
    order = [row["id"] for row in documents()]
    others = [id for id in order if id not in needed][:distractors]
    assert kept == [id for id in order if id in needed or id in others]


def test_distractors_of_none_keep_all(tmp_path: Path) -> None:
    config = small_config(tmp_path, *LIMITS)
    assert len(load_documents(build(config, questions_of(config)))) == len(documents())


def test_distractors_without_questions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"corpus\.distractors is set but the run has no questions"):
        build(small_config(tmp_path, "corpus.distractors=1"))


def test_limit_counts_before_distractors(tmp_path: Path) -> None:
    """``limit`` is a prefix of the corpus; what lies beyond it is not there, needed or not."""
    config = small_config(tmp_path, "corpus.limit=4", "corpus.distractors=0")
    kept = list(load_documents(build(config, questions_of(config))))
    assert kept == [row["id"] for row in documents()[:4]]


def test_questions_are_parents_only_where_they_count(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    questions = questions_of(config)
    assert passages_plan(config, BASE, questions).parents == {}
    with_distractors = small_config(tmp_path, "corpus.distractors=1")
    assert set(passages_plan(with_distractors, BASE, questions).parents) == {"questions"}


TENANT_ROWS = [
    {
        "id": "a",
        "title": "A",
        "text": "The harbour was dug by hand.",
        "tenant": "north",
        "year": 1841,
        "public": True,
    },
    {"id": "b", "title": "B", "text": "The mill grinds oats.", "tenant": "south", "year": None},
    {"id": "c", "title": "C", "text": "The orchard is old.", "tenant": ["north", "south"]},
]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_passages_keep_the_metadata_that_is_named(tmp_path: Path, form: str) -> None:
    uri = write_lines(tmp_path / "rows.jsonl", TENANT_ROWS[:2])
    if form == "parquet":
        uri = tmp_path / "rows.parquet"
        pq.write_table(pa.Table.from_pylist(TENANT_ROWS[:2]), uri)
    plain = build(small_config(tmp_path / "plain", f"corpus.uri={uri}"))
    named = build(
        small_config(
            tmp_path / "named", f"corpus.uri={uri}", "corpus.metadata=[tenant,year,public]"
        )
    )
    assert named.fingerprint != plain.fingerprint
    table = pq.read_table(named.path("passages.parquet"))
    assert table.column_names == [*PASSAGE_SCHEMA.names, "tenant", "year", "public"]
    assert table.column("tenant").to_pylist() == ["north", "south"]
    assert table.column("year").to_pylist() == ["1841", None]
    assert table.column("public").to_pylist() == ["true", None]
    assert load_passages(named)[0].metadata == (
        ("tenant", "north"),
        ("year", "1841"),
        ("public", "true"),
    )
    assert load_passages(named)[1].metadata == (("tenant", "south"),)
    assert pq.read_table(plain.path("passages.parquet")).column_names == PASSAGE_SCHEMA.names
    assert [passage.id for passage in load_passages(plain)] == [
        passage.id for passage in load_passages(named)
    ]


def test_a_document_that_moves_to_another_tenant_moves_in_the_next_version(tmp_path: Path) -> None:
    """Its text is unchanged, so it is cut where it was; its tenant must not be what it was."""
    options = ("corpus.metadata=[tenant]", f"corpus.uri={tmp_path / 'rows.jsonl'}")
    write_lines(tmp_path / "rows.jsonl", TENANT_ROWS[:2])
    config = small_config(tmp_path, *options)
    before = build(config)
    write_lines(tmp_path / "rows.jsonl", [{**TENANT_ROWS[0], "tenant": "south"}, TENANT_ROWS[1]])
    after, _ = Store(config.storage.root_uri).get_or_build(
        passages_plan(config, BASE, None),
        lambda building: build_passages(
            building, config, tiny_base()[1], None, executor=Here(), earlier=before
        ),
    )
    assert after.info["changes"]["unchanged"] == 2
    assert [dict(passage.metadata)["tenant"] for passage in load_passages(after)] == [
        "south",
        "south",
    ]


def test_a_row_whose_metadata_is_no_value_is_malformed(tmp_path: Path) -> None:
    uri = write_lines(tmp_path / "rows.jsonl", TENANT_ROWS)
    options = (f"corpus.uri={uri}", "corpus.metadata=[tenant]")
    with pytest.raises(DataError, match="'tenant' is a list"):
        build(small_config(tmp_path, *options))
    kept = build(small_config(tmp_path, *options, "corpus.max_malformed_share=0.5"))
    assert [passage.document_id for passage in load_passages(kept)] == ["a", "b"]
    assert "'tenant' is a list" in kept.path("quarantine.jsonl").read_text()


def test_metadata_may_not_take_a_field_s_name(tmp_path: Path) -> None:
    assert (
        set(PASSAGE_FIELDS)
        == {*PASSAGE_SCHEMA.names, "metadata"}
        == {each.name for each in fields(Passage)}
    )
    for wrong in ("[uri]", "[metadata]", "[a b]", "[tenant,tenant]", "['']"):
        with pytest.raises(ConfigError, match=r"corpus\.metadata"):
            small_config(tmp_path, f"corpus.metadata={wrong}")
