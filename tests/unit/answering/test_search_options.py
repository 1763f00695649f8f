"""Searches with conditions, without near-duplicates, from a mapped index; and the command line of
versions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from invar_ray.answering.bm25 import Bm25Retriever
from invar_ray.answering.duplicates import distinct, shingles, similarity
from invar_ray.answering.filters import Where, allowed_rows
from invar_ray.answering.fusion import fuse_lists
from invar_ray.answering.retriever import Passages, Retriever, open_retriever
from invar_ray.cli.main import app
from invar_ray.errors import RequestError
from invar_ray.index.build import build_index
from invar_ray.index.faiss_index import Index, build_faiss
from invar_ray.schema import PASSAGE_SCHEMA, Hit, Mode, Passage, to_table
from invar_ray.store.artifacts import Plan
from invar_ray.store.published import open_published
from serve.replicas.retriever import load_retriever
from tests.support import ISLANDS, World, world

Floats = Any


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> World:
    return world(tmp_path_factory)


def table_of(**columns: Any) -> pa.Table:
    return pa.table(columns)


# Conditions


def test_conditions_by_hand() -> None:
    table = table_of(
        id=["p0", "p1", "p2", "p3"],
        tenant=["a", "b", "a", None],
        uri=["s3://x/1", "s3://x/2", "s3://y/3", "s3://x/4"],
        start=[0, 1, 2, 3],
    )
    rows = lambda **given: np.flatnonzero(allowed_rows(table, Where.of(**given))).tolist()  # noqa: E731
    assert rows() == [0, 1, 2, 3]
    assert rows(equals={"tenant": "a"}) == [0, 2]
    assert rows(equals={"tenant": ["a", "b"]}) == [0, 1, 2], "a missing value meets no condition"
    assert rows(starts={"uri": "s3://x/"}) == [0, 1, 3]
    assert rows(starts={"uri": ["s3://y/", "s3://x/2"]}) == [1, 2]
    assert rows(equals={"tenant": "a"}, starts={"uri": "s3://x/"}) == [0]
    assert rows(without=["p0", "p3"]) == [1, 2]
    assert rows(equals={"tenant": []}) == []
    for name in ("nobody", "start"):
        with pytest.raises(
            RequestError, match=f"no text column '{name}'. Expected: one of id, tenant, uri"
        ):
            rows(equals={name: "x"})


def test_equal_conditions_are_equal() -> None:
    assert Where.of({"b": "1", "a": ["2"]}) == Where.of({"a": "2", "b": ("1",)})
    assert hash(Where.of({"a": "2"})) == hash(Where.of({"a": ["2"]}))


def test_search_of_one_tenant(small: World) -> None:
    retriever = open_retriever(small.base_index.uri)
    question = "Who built the lighthouse of Kelda?"
    documents = [f"doc-{name.lower()}" for name in ISLANDS[:3]]
    where = Where.of({"document_id": documents})
    (hits,) = retriever.retrieve([question], 5, where=where)
    (everywhere,) = retriever.retrieve([question], 1000)
    expected = [hit.passage_id for hit in everywhere if hit.document_id in documents][:5]
    assert [hit.passage_id for hit in hits] == expected
    assert [hit.rank for hit in hits] == [1, 2, 3, 4, 5]
    assert retriever.passages.allowed(where) is retriever.passages.allowed(
        Where.of({"document_id": documents})
    )
    assert retriever.retrieve([question], 5, where=Where.of({"document_id": "nobody"})) == [[]]
    (without,) = retriever.retrieve(
        [question], 1, where=Where.of(without=[everywhere[0].passage_id])
    )
    assert without[0].passage_id == everywhere[1].passage_id
    with pytest.raises(RequestError, match="no text column 'tenant'"):
        retriever.retrieve([question], 5, where=Where.of({"tenant": "a"}))


def test_mapped_retriever_finds_the_same(small: World) -> None:
    questions = [f"Who built the lighthouse of {name}?" for name in ISLANDS]
    loaded, mapped = (
        open_retriever(small.base_index.uri, mode="hybrid"),
        load_retriever(small.base_index.uri, memory_map=True),
    )
    assert loaded.retrieve(questions, 3) == mapped.retrieve(questions, 3)


# Modes


def ids(hits: list[Hit]) -> list[str]:
    return [hit.passage_id for hit in hits]


def test_hybrid_fuses_the_list_by_vectors_with_the_list_by_words(small: World) -> None:
    retriever = open_retriever(small.base_index.uri, mode="hybrid")
    questions = [f"What grows on the terraces of {name}?" for name in ISLANDS[:4]]
    dense, by_words, hybrid = (
        retriever.retrieve(questions, 20, mode=mode) for mode in ("dense", "bm25", "hybrid")
    )
    assert hybrid == retriever.retrieve(questions, 20), "what it was opened with"
    assert dense == open_retriever(small.base_index.uri).retrieve(questions, 20)
    baseline = Bm25Retriever(Passages(small.passages)).retrieve(questions, 20)
    assert [ids(hits) for hits in by_words] == [ids(hits) for hits in baseline]
    deep = [retriever.retrieve(questions, 100, mode=mode) for mode in ("dense", "bm25")]
    for number, hits in enumerate(hybrid):
        assert ids(hits) == ids(fuse_lists(deep[0][number], deep[1][number], 20))
        assert [hit.rank for hit in hits] == list(range(1, 21))
    assert [ids(hits) for hits in hybrid] not in ([ids(h) for h in dense], baseline)


def test_conditions_and_duplicates_hold_in_every_mode(small: World) -> None:
    retriever = open_retriever(small.base_index.uri)
    question = "Who built the lighthouse of Kelda?"
    documents = [f"doc-{name.lower()}" for name in ISLANDS[:3]]
    modes: tuple[Mode, ...] = ("dense", "bm25", "hybrid")
    for mode in modes:
        where = Where.of({"document_id": documents})
        (some,) = retriever.retrieve([question], 50, where=where, mode=mode)
        assert {hit.document_id for hit in some} == set(documents)
        (best, *_), *_ = retriever.retrieve([question], 1, mode=mode)
        without = Where.of(without=[best.passage_id])
        (others,) = retriever.retrieve([question], 50, where=without, mode=mode)
        assert best.passage_id not in ids(others)
        (apart,) = retriever.retrieve([question], 6, mode=mode, collapse=True)
        assert distinct(apart, 6) == list(range(6))


def test_an_index_without_bm25_is_searched_densely_and_says_so_once(
    small: World, capsys: pytest.CaptureFixture[str]
) -> None:
    old = small.get(
        Plan(
            "index",
            "old",
            {},
            {"passages": small.passages, "vectors": small.base_index.parent("vectors")},
        ),
        lambda made: build_index(made, small.base_index.parent("vectors"), small.passages, "Flat"),
    )
    retriever = open_retriever(old.uri, mode="hybrid")
    assert capsys.readouterr().err.count("has no BM25") == 1
    assert retriever.retrieve(["a"], 3) == open_retriever(small.base_index.uri).retrieve(["a"], 3)
    with pytest.raises(RequestError, match="no BM25, mode is 'hybrid'"):
        retriever.retrieve(["a"], 3, mode="hybrid")
    assert "BM25" not in capsys.readouterr().err


# Near-duplicates


def test_resemblance_by_hand() -> None:
    first, second = shingles("The cat sat on the mat."), shingles("the CAT sat on the rug")
    # 4 runs of three words each; 3 are common: 3 / 5.
    assert (len(first), len(second), similarity(first, second)) == (4, 4, 3 / 5)
    assert similarity(shingles("one two"), shingles("One, two!")) == 1.0
    assert similarity(shingles(""), shingles("a")) == 0.0


def hit(number: int, text: str) -> Hit:
    return Hit(f"p{number}", f"d{number}", number + 1, 1.0 - number / 100, "", text)


def test_distinct_keeps_the_best_of_each() -> None:
    long = (
        "the lighthouse was built by Ada Morvane after the great storm and its lamp burned oil for "
        "a century"
    )
    hits = [
        hit(0, long),
        hit(1, long.upper() + "."),
        hit(2, "the ferry leaves at six in the morning"),
        hit(3, long),
    ]
    assert distinct(hits, 10) == [0, 2]
    assert distinct(hits, 1) == [0]
    assert distinct(hits, 10, same=1.1) == [0, 1, 2, 3]
    assert distinct([], 3) == []


class Table:
    fingerprint = "table"
    dimension = 4

    def encode_queries(self, questions: Any) -> Floats:
        return np.tile(np.eye(4, dtype=np.float32)[0], (len(questions), 1))


def test_collapsed_search_fills_up(tmp_path: Path) -> None:
    """20 copies of the best passage stand before the second and the third: the search goes on until
    it has them.
    """
    texts = ["the lamp of the tower burned oil for a century"] * 20 + [
        f"passage {n} about the ferry" for n in range(5)
    ]
    rows = [Passage(f"p{n}", f"d{n}", "", text, 0, len(text)) for n, text in enumerate(texts)]
    pq.write_table(to_table(rows, PASSAGE_SCHEMA), tmp_path / "passages.parquet")

    class Folder:
        fingerprint = "f"

        def path(self, name: str) -> Path:
            return tmp_path / name

    angles = np.linspace(0.1, 1.0, len(texts))
    vectors = np.stack([np.cos(angles), np.sin(angles), 0 * angles, 0 * angles], axis=1).astype(
        np.float32
    )
    retriever = Retriever(Table(), Index(build_faiss(vectors, "Flat")), Passages(Folder()), "v")  # type: ignore[arg-type]
    for first, second in zip(*[retriever.retrieve(["a", "b"], 3, collapse=True)] * 2, strict=True):
        assert [(h.rank, h.passage_id) for h in first] == [(1, "p0"), (2, "p20"), (3, "p21")]
        assert first == second
    (all_of_it,) = retriever.retrieve(["a"], 50, collapse=True)
    assert [h.passage_id for h in all_of_it] == ["p0", "p20", "p21", "p22", "p23", "p24"]
    told = Retriever(retriever.encoder, retriever.index, retriever.passages, "v", collapse=True)
    assert told.retrieve(["a"], 3) == retriever.retrieve(["a"], 3, collapse=True)
    assert told.retrieve(["a"], 3, collapse=False) == retriever.retrieve(["a"], 3)
    (plain,) = retriever.retrieve(["a"], 3)
    assert [h.passage_id for h in plain] == ["p0", "p1", "p2"]
    (some,) = retriever.retrieve(["a"], 2, where=Where.of(without=["p0", "p20"]), collapse=True)
    assert [h.passage_id for h in some] == ["p1", "p21"]


# Versions by the command line, and what a service follows


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["index-versions", *arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_command_line_of_versions(small: World) -> None:
    root, first, second = small.store.root_uri, small.base_index.uri, small.adapter_index.uri
    place = f"{root}/published/main"
    assert "nothing has been published" in run("list", "--root", root)
    assert "version 1: index/base-" in run("publish", first, "--note", "nightly", "--expected", "0")
    assert f"index_uri: {place}" in run("publish", second)
    versions = open_published(place)
    assert versions.uris() == (second,)
    lines = Path(place, "CURRENT").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [second]
    assert "is at version 2, not at 1" in run("publish", first, "--expected", "1", code=1)
    assert "version 3 is version 1 again" in run("rollback", "--root", root, "--note", "worse")
    assert versions.uris() == (first,)
    lines = run("list", "--root", root).splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2", "*"]
    assert "rollback -> 1" in lines[2]
    assert "nightly" in lines[0]
    assert "would be removed" not in run(
        "gc", "--root", root, "--keep", "2", "--min-age-hours", "0", "--dry-run"
    )
    assert f"would be removed: {small.adapter_index.ref}" not in run(
        "gc", "--root", root, "--keep", "1", "--dry-run"
    )
    open_retriever(versions.uris()[0])


def test_the_weight_of_a_recipe_is_its_trained_retriever_s(tmp_path: Path) -> None:
    world = World(tmp_path, "search.dense_weight=0.9")
    trained, bare = open_retriever(world.adapter_index.uri), open_retriever(world.base_index.uri)
    assert (trained.dense_weight, bare.dense_weight) == (0.9, 0.4)
    question = "Who built the lighthouse?"
    ((best, *_),) = trained.retrieve([question], 3, mode="hybrid")
    ((first, *_),) = trained.retrieve([question], 3, mode="dense")
    assert best.passage_id == first.passage_id
