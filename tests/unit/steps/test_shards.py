"""A corpus cut into shards: nothing lost, nothing twice, what did not change stays, and the shards
together find what one index finds.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from invar_ray.answering.retriever import Retriever, open_retriever
from invar_ray.config import IndexConfig
from invar_ray.errors import ArtifactError, ConfigError, ConflictError, ResourceError
from invar_ray.executor import Here
from invar_ray.index.blocks import read_vectors
from invar_ray.index.faiss_index import centroids_of, load_index
from invar_ray.pipeline import Pipeline
from invar_ray.steps.centroids import load_centroids
from invar_ray.steps.shards import largest, number
from invar_ray.store.artifacts import Artifact, Store
from invar_ray.store.earlier import shard_of
from invar_ray.store.garbage import collect
from invar_ray.store.published import Published
from jobs import reindex
from serve.records import Found
from serve.service import merge
from tests.support import small_config, write_lines
from tests.unit.index.test_incremental import corpus

COUNT = 48


def run(root: Path, rows: list[dict[str, str]], *overrides: str) -> Pipeline:
    place = write_lines(root / "islands.jsonl", rows)
    config = small_config(
        root,
        f"corpus.uri={place}",
        "index.encoder=base",
        "corpus.chunk_tokens=48",
        "corpus.chunk_stride=48",
        *overrides,
    )
    return Pipeline(config, quiet=True, executor=Here())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("s") / "run"
    reindex.main(run(root, corpus(COUNT), "index.shards=4"))
    return root


def current(root: Path) -> list[Artifact]:
    return Published(Store(str(root / "runs"))).open()


def rows_of(passages: Artifact) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(passages.path("passages.parquet")).to_pylist()
    return rows


def test_each_passage_is_in_the_shard_of_its_document(store: Path) -> None:
    whole = run(store, corpus(COUNT)).passages
    expected = rows_of(whole)
    shards = [rows_of(index.parent("passages")) for index in current(store)]
    assert sorted(row["id"] for shard in shards for row in shard) == sorted(
        row["id"] for row in expected
    )
    for at, shard in enumerate(shards):
        assert shard == [row for row in expected if shard_of(row["document_id"], 4) == at]


def test_shards_find_what_one_index_finds(store: Path, tmp_path: Path) -> None:
    [whole] = run(tmp_path / "whole", corpus(COUNT)).reindexed
    one = open_retriever(whole.uri)
    shards = [open_retriever(index.uri) for index in current(store)]
    questions = [f"Who built the lighthouse of copy {copy}?" for copy in range(20)]
    for question in questions:
        assert asked(shards, question) == [
            (hit.passage_id, round(hit.score, 5)) for hit in one.retrieve([question], 10)[0]
        ]
    ids, matrix = read_vectors(whole.parent("vectors"))
    expected = dict(zip(ids, matrix, strict=True))
    for index in current(store):
        for id, row in zip(*read_vectors(index.parent("vectors")), strict=True):
            assert row @ expected[id] > 0.999


def asked(shards: list[Retriever], question: str) -> list[tuple[str, float]]:
    found = [
        Found(tuple(shard.retrieve([question], 10)[0]), shard.versions, (), "dense")
        for shard in shards
    ]
    hits = merge(found, 10, (), shards[0].versions).hits
    return [(hit.passage_id, round(hit.score, 5)) for hit in hits]


def test_a_change_touches_its_own_shard_only(store: Path) -> None:
    before = {index.ref for index in current(store)}
    rows = corpus(COUNT)
    rows[7] = {**rows[7], "text": rows[7]["text"].replace("terraces", "slopes")}
    pipeline = run(store, rows, "index.shards=4")
    reindex.main(pipeline)
    after = current(store)
    [changed] = [index for index in after if index.ref not in before]
    assert changed.manifest.name == f"base-{shard_of(rows[7]['id'], 4) + 1}of4"
    vectors = changed.parent("vectors").info
    assert 0 < vectors["embedded"] <= 3 < vectors["reused"]
    assert len(Published(pipeline.store).history()) == 2
    reindex.main(run(store, rows, "index.shards=4"))  # nothing to do, nothing to publish
    assert len(Published(pipeline.store).history()) == 2
    reindex.main(run(store, corpus(COUNT), "index.shards=4"))
    assert {index.ref for index in current(store)} == before, "the old corpus is the old index"


def test_what_stands_beside_a_text_makes_another_shard(store: Path, tmp_path: Path) -> None:
    rows = [{**row, "tenant": "a"} for row in corpus(COUNT)]
    first = run(tmp_path, rows, "index.shards=2", 'corpus.metadata=["tenant"]').reindexed
    rows[7]["tenant"] = "b"
    second = run(tmp_path, rows, "index.shards=2", 'corpus.metadata=["tenant"]').reindexed
    differ = [old.ref != new.ref for old, new in zip(first, second, strict=True)]
    assert differ == [shard_of(rows[7]["id"], 2) == shard for shard in range(2)]


def test_twice_the_shards_embed_nothing(store: Path) -> None:
    for count, share in ((2, 1), (8, 0)):  # four stand: two hold more than any of them
        for index in run(store, corpus(COUNT), f"index.shards={count}").reindexed:
            vectors = index.parent("vectors").info
            assert vectors["embedded"] == share * vectors["rows"]
    whole = run(store, corpus(COUNT)).reindexed[0].parent("vectors").info
    assert whole["reused"] == 0, "a shard does not hold the corpus"


def test_centroids_are_trained_once_and_stay(tmp_path: Path) -> None:
    settings = ("index.shards=2", "index.factory=IVF8,SQ8", "index.recall_target=0.5")
    settings += ("index.num_lists_searched=8",)
    first = run(tmp_path, corpus(COUNT), *settings).reindexed
    [trained] = {index.manifest.parents["centroids"] for index in first}
    centroids = load_centroids(Store(str(tmp_path / "runs")).open(trained))
    assert centroids.shape == (8, 384)
    for index in first:
        assert np.array_equal(centroids_of(load_index(index)._index), centroids)
        assert index.info["recall_at_10"] > 0.9
    rows = corpus(COUNT)
    rows[7] = {**rows[7], "text": rows[7]["text"].replace("terraces", "slopes")}
    second = run(tmp_path, rows, *settings).reindexed
    assert {index.manifest.parents["centroids"] for index in second} == {trained}
    assert sum(old.ref == new.ref for old, new in zip(first, second, strict=True)) == 1
    anew = run(tmp_path, rows, *settings, "scale.incremental=false").reindexed
    assert trained not in {index.manifest.parents["centroids"] for index in anew}
    published = Published(anew[0].store)
    published.publish(first)
    published.publish(anew)
    gone = collect(published, 1, parents=True).removed
    assert {index.ref for index in first} <= set(gone)
    assert trained not in gone, "an index that is not published stays, and so do its centroids"


def test_another_corpus_gets_centroids_of_its_own(tmp_path: Path) -> None:
    settings = ("index.shards=2", "index.factory=IVF8,SQ8", "index.num_lists_searched=8")
    first = run(tmp_path, corpus(COUNT), *settings).reindexed
    other = write_lines(tmp_path / "others.jsonl", corpus(COUNT + 1))
    second = run(tmp_path, corpus(COUNT), *settings, f"corpus.uri={other}").reindexed
    trained = [{index.manifest.parents["centroids"] for index in made} for made in (first, second)]
    assert [len(refs) for refs in trained] == [1, 1]
    assert trained[0] != trained[1]


def test_one_index_takes_the_place_of_shards(tmp_path: Path) -> None:
    """Else the service would stay with the old shards, and the job would say that all is well."""
    reindex.main(run(tmp_path, corpus(COUNT), "index.shards=2"))
    pipeline = run(tmp_path, corpus(COUNT - 1))
    reindex.main(pipeline)
    assert Published(pipeline.store).need().index == tuple(i.ref for i in pipeline.reindexed)
    alone = run(tmp_path / "alone", corpus(12))
    reindex.main(alone)
    assert Published(alone.store).current() is None


def test_damage_is_found_where_an_index_is_built_and_nothing_is_published(
    tmp_path: Path,
) -> None:
    pipeline = run(tmp_path, corpus(COUNT), "index.shards=2")
    reindex.main(pipeline)
    before = Published(pipeline.store).need()
    place = pipeline.reindexed[1].parent("vectors").path("probes.parquet")
    content = bytearray(place.read_bytes())
    content[len(content) // 2] ^= 1
    place.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"probes\.parquet differs"):
        reindex.main(run(tmp_path, corpus(COUNT), "index.shards=2"))
    assert Published(pipeline.store).need() == before


def test_of_two_jobs_the_slower_changes_nothing(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = run(store, corpus(COUNT), "index.shards=2")
    faster = run(store, corpus(COUNT - 1), "index.shards=4").reindexed
    indexes = slow.reindexed

    def overtaken(pipeline: Pipeline) -> tuple[Artifact, ...]:
        Published(pipeline.store).publish(faster)
        return indexes

    monkeypatch.setattr(reindex, "report", overtaken)
    with pytest.raises(ConflictError, match="nothing was changed"):
        reindex.main(slow)
    assert Published(slow.store).need().index == tuple(index.ref for index in faster)


def test_more_shards_than_documents_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"index\.shards is 64: shard .* is empty"):
        _ = run(tmp_path, corpus(12), "index.shards=64").reindexed


def unasked() -> int:
    raise AssertionError("the vectors' size decides nothing here")


PLANNED = IndexConfig(factory="auto", max_memory_mb=20_000.0)


@pytest.mark.parametrize(
    ("settings", "rows", "dimension", "expected"),
    [
        (IndexConfig(), 10**9, None, 1),
        (IndexConfig(shards=3), 10, None, 3),
        (PLANNED, 100_000, 384, 1),
        (PLANNED, 1_000_000_000, 768, 64),  # 780 GB of 8-bit codes
        (IndexConfig(factory="auto"), 21_000_000, 4096, 16),  # IVF that answers in 50 ms
        (replace(PLANNED, factory="Flat"), 21_000_000, 768, 4),  # 64.5 GB
    ],
)
def test_auto_takes_as_few_as_the_limits_allow(
    settings: IndexConfig, rows: int, dimension: int | None, expected: int
) -> None:
    size = unasked if dimension is None else lambda: dimension
    assert number(settings, rows, size, lambda count: -(-rows // count)) == expected


def test_auto_goes_by_the_largest_shard(tmp_path: Path) -> None:
    """A limit that the mean keeps to and the largest does not: that one could not be built."""
    passages = run(tmp_path, corpus(COUNT)).passages
    rows = passages.info["passages"]
    counted = {
        count: max(
            sum(shard_of(row["document_id"], count) == shard for row in rows_of(passages))
            for shard in range(count)
        )
        for count in (2, 4)
    }
    assert {count: largest(passages, count) for count in (2, 4)} == counted
    assert counted[2] > -(-rows // 2)
    limit = 4 * 384 * (counted[2] - 1) / 1e6
    settings = IndexConfig(factory="Flat", max_memory_mb=limit)
    assert number(settings, rows, lambda: 384, lambda count: -(-rows // count)) == 2
    assert number(settings, rows, lambda: 384, lambda count: largest(passages, count)) == 4


def test_limits_that_no_number_of_shards_keeps_to_are_refused() -> None:
    with pytest.raises(ResourceError, match=r"index\.max_memory_mb"):
        number(IndexConfig(factory="Flat", max_memory_mb=0.001), 1000, lambda: 384, lambda _: 1)
