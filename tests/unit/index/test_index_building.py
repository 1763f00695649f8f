"""Building an index in parts, on a sample, measured against exact search; and searching it with
filters, or mapped.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest

from invar_ray.config import IndexConfig, load_config
from invar_ray.errors import (
    ArtifactError,
    ConfigError,
    MixedArtifactsError,
    RequestError,
    ResourceError,
)
from invar_ray.index import faiss_index as index_module
from invar_ray.index.blocks import VectorBlocks, of_matrix, vector_blocks
from invar_ray.index.build import (
    Limits,
    Trial,
    build_index,
    fill,
    index_settings,
    measure_recall,
    sampled_trial,
    tune,
)
from invar_ray.index.faiss_index import (
    Index,
    add,
    add_all,
    build_faiss,
    exact_best,
    load_index,
    merge,
    mergeable,
    new_index,
    open_index,
    save_index,
    train,
)
from invar_ray.index.planner import Need, candidates
from invar_ray.store.artifacts import Artifact, Plan
from tests.support import World, world

Floats = Any
TYPES = ["Flat", "IVF16,Flat", "IVF16,SQ8", "OPQ4,IVF16,PQ4x8np", "HNSW16,Flat"]
ROWS, WIDTH = 2000, 16


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> World:
    return world(tmp_path_factory)


def unit(rows: int, width: int, seed: int = 0) -> Floats:
    """Clustered, as embeddings are."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(20, width))
    matrix = (
        centres[random.integers(0, 20, rows)] + 0.5 * random.normal(size=(rows, width))
    ).astype(np.float32)
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def vectors() -> Floats:
    return unit(ROWS, WIDTH)


@pytest.fixture(scope="module")
def built(vectors: Floats) -> dict[str, Any]:
    return {factory: fill(of_matrix(vectors, 300), factory, 2000) for factory in TYPES}


def everything(index: Any, queries: Floats, top_k: int = 10) -> Any:
    found = Index(index)
    return found.search(queries, top_k, depth=max(1, found.most_depth))


# Blocks


def test_blocks_samples_and_rows(vectors: Floats) -> None:
    blocks = of_matrix(vectors, 300)
    assert (len(blocks), blocks.rows, blocks.dimension) == (7, ROWS, WIDTH)
    assert [start for start, _ in blocks.some()] == [0, 300, 600, 900, 1200, 1500, 1800]
    assert np.array_equal(np.concatenate([rows for _, rows in blocks.some()]), vectors)
    assert [start for start, _ in blocks.some(2, 4)] == [600, 900]
    sample, rows = blocks.sample(50, seed=3)
    assert np.array_equal(sample, vectors[rows])
    assert len(set(rows.tolist())) == 50
    assert np.array_equal(rows, np.sort(rows))
    assert np.array_equal(blocks.sample(50, seed=3)[1], rows)
    assert not np.array_equal(blocks.sample(50, seed=4)[1], rows)
    assert len(blocks.sample(10**6, seed=0)[0]) == ROWS


def test_blocks_of_an_artifact_are_its_shards(small: World) -> None:
    artifact = small.base_index.parent("vectors")
    blocks = vector_blocks(artifact)
    tables = [pq.read_table(path) for path in sorted(artifact.path("shards").glob("*.parquet"))]
    assert blocks.edges == (0, len(tables[0]), len(tables[0]) + len(tables[1]))
    _, last = list(blocks.some())[1]
    assert np.allclose(last[0], tables[1].column("vector")[0].as_py(), atol=1e-3), (
        "halves, scaled to length 1"
    )
    sample, rows = blocks.sample(blocks.rows - 1, seed=0)
    whole = np.concatenate([rows for _, rows in blocks.some()])
    assert np.array_equal(sample, whole[rows])


# Building in parts


@pytest.mark.parametrize("factory", TYPES)
@pytest.mark.parametrize("workers", [1, 3, 50])
def test_parts_give_the_index_of_a_build_in_order(
    vectors: Floats, factory: str, workers: int
) -> None:
    queries = unit(20, WIDTH, seed=1)
    blocks = of_matrix(vectors, 300)
    parts, whole = (
        fill(blocks, factory, 2000, workers),
        fill(of_matrix(vectors, ROWS), factory, 2000),
    )
    assert parts.ntotal == ROWS
    scores, rows = everything(parts, queries)
    expected_scores, expected = everything(whole, queries)
    assert np.array_equal(rows, expected)
    assert np.allclose(scores, expected_scores, atol=1e-6)


@pytest.mark.parametrize("factory", TYPES[:3])
def test_looking_everywhere_is_exact(vectors: Floats, built: dict[str, Any], factory: str) -> None:
    queries = unit(20, WIDTH, seed=1)
    exact = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :10]
    assert np.array_equal(exact_best(queries, of_matrix(vectors, 300).some(), 10), exact)
    _, rows = everything(built[factory], queries)
    overlap = np.mean(
        [len(set(a) & set(b)) / 10 for a, b in zip(rows.tolist(), exact.tolist(), strict=True)]
    )
    assert overlap == 1.0 if factory != "IVF16,SQ8" else overlap > 0.95


def test_only_flat_and_ivf_can_be_merged(built: dict[str, Any]) -> None:
    assert [mergeable(built[factory]) for factory in TYPES] == [True, True, True, True, False]
    with pytest.raises(ArtifactError, match="parts that are to be merged"):
        merge([faiss.clone_index(built["HNSW16,Flat"]), faiss.clone_index(built["HNSW16,Flat"])])


@pytest.mark.parametrize("factory", ["IVF16,Flat", "IVF16,SQ8", "OPQ4,IVF16,PQ4x8np"])
def test_lists_found_by_another_quantizer_give_the_same_index(
    vectors: Floats, factory: str
) -> None:
    """What a GPU does with its copy of the quantizer; here the copy is on the CPU."""
    index = new_index(WIDTH, factory, ROWS)
    train(index, vectors, factory)
    other = faiss.clone_index(index)
    assigner = faiss.IndexFlatIP(WIDTH)
    assigner.add(faiss.extract_index_ivf(index).quantizer.reconstruct_n(0, 16))
    add(index, vectors[:900], 0)
    add(index, vectors[900:], 900)
    add(other, vectors[:900], 0, assigner)
    add(other, vectors[900:], 900, assigner)
    queries = unit(20, WIDTH, seed=1)
    assert other.ntotal == ROWS
    assert np.array_equal(
        Index(other, 3).search(queries, 5)[1], Index(index, 3).search(queries, 5)[1]
    )


def test_training_does_not_make_polysemous_codes() -> None:
    """They cost minutes (docs/design/indexes.md) and nothing reads them; neither does a factory
    string without np.
    """
    for factory in ("IVF4,PQ4x8", "PQ4x8", "IVF4,PQ4x8np", "OPQ4,IVF4,PQ4x8"):
        index = new_index(WIDTH, factory, ROWS)
        assert index_module._core(index).do_polysemous_training is False
    assert faiss.index_factory(WIDTH, "IVF4,PQ4x8").do_polysemous_training is True, (
        "FAISS's own default"
    )


def test_too_few_vectors_to_train(vectors: Floats) -> None:
    with pytest.raises(
        ArtifactError, match="FAISS cannot build 'IVF64,Flat' over 20 vectors of 16 dim"
    ):
        fill(of_matrix(vectors[:20]), "IVF64,Flat", 20)


# Recall


class Canned:
    """An index that returns what it is told to."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = np.asarray(rows)

    def search(self, queries: Floats, top_k: int, *, depth: int) -> Any:
        assert self.rows.shape[1] <= top_k
        return np.zeros(self.rows.shape), self.rows


def test_recall_by_hand() -> None:
    exact = np.asarray([[1, 2, 3, 4, -1, -1, -1, -1, -1, -1], list(range(10, 20))])
    # The first query is row 0 itself: it does not count. 2 of its 4; of the second's ten, 10..14.
    found = [[0, 1, 2, 9, 8, 7, 6, 5, 50, 51, 3], [10, 11, 12, 13, 14, 0, 1, 2, 3, 4, 15]]
    trial = Trial(np.zeros((2, 4), np.float32), exact, np.asarray([0, -1]))
    # Without itself, row 3 is the tenth of the first: 3 of 4. Row 15 is the eleventh of the second:
    # it is too late.
    assert measure_recall(Canned(found), trial, 1) == pytest.approx((3 / 4 + 5 / 10) / 2)  # type: ignore[arg-type]


def test_trial_leaves_the_query_out(vectors: Floats) -> None:
    trial = sampled_trial(of_matrix(vectors, 300), 40)
    assert np.array_equal(trial.queries, vectors[trial.own])
    cosines = trial.queries @ vectors.T
    cosines[np.arange(40), trial.own] = -9
    assert np.array_equal(trial.exact, np.argsort(-cosines, axis=1, kind="stable")[:, :10])
    assert measure_recall(Index(build_faiss(vectors, "Flat")), trial, 1) == 1.0


def test_tuning_takes_the_least_depth_that_does() -> None:
    scattered = np.random.default_rng(0).normal(size=(ROWS, 32)).astype(np.float32)
    blocks = of_matrix(scattered / np.linalg.norm(scattered, axis=1, keepdims=True), 300)
    (candidate,) = [c for c in candidates(Need(ROWS, 32, 0.9)) if c.kind == "IVF-Flat"]
    index, trial = (
        Index(fill(blocks, candidate.factory, candidate.training_rows)),
        sampled_trial(blocks, 100),
    )
    depth, recall, _ = tune(index, candidate, trial, 0.9)
    assert recall == measure_recall(index, trial, depth) >= 0.9
    lower = [each for each in candidate.depths if each < depth]
    assert lower
    assert all(measure_recall(index, trial, each) < 0.9 for each in lower)
    assert tune(index, candidate, trial, 1.1)[1] == 1.0, "beyond reach: the best there is"


# The step


def build(
    small: World, name: str, factory: str, limits: Limits | None = None, **more: Any
) -> Artifact:
    vectors = small.base_index.parent("vectors")
    plan = Plan("index", name, {"name": name}, {"vectors": vectors, "passages": small.passages})
    return small.store.get_or_build(
        plan,
        lambda building: build_index(
            building, vectors, small.passages, factory, limits=limits, **more
        ),
    )[0]


def test_planned_index_says_what_was_chosen_and_measured(small: World) -> None:
    lines: list[str] = []
    index = build(small, "planned", "auto", Limits(recall_target=0.9), workers=2, say=lines.append)
    info = index.info
    assert info["factory"] == "Flat"
    assert info["recall_at_10"] == 1.0
    assert info["recall_target"] == 0.9
    assert info["plan"]["chosen"]["memory_bytes"] == info["rows"] * 384 * 4
    assert info["measured"]["file_bytes"] == index.path("index.faiss").stat().st_size
    assert lines[0].startswith("index plan:"), "the plan comes before the work"
    assert "recall@10 1.000" in lines[1]
    queries = small.base_encoder.encode_queries(["Who built the lighthouse of Arvon?"])
    assert np.array_equal(
        load_index(index).search(queries, 5)[1], load_index(small.base_index).search(queries, 5)[1]
    )


def test_index_below_its_target_is_not_published(small: World) -> None:
    with pytest.raises(ArtifactError) as caught:
        build(small, "low", "IVF8,Flat", Limits(recall_target=0.99))
    message = str(caught.value)
    assert "the index IVF8,Flat finds 0." in message
    assert "not published. Expected: 0.990 or more" in message
    assert not [
        artifact for artifact in small.store.list("index") if artifact.manifest.name == "low"
    ]
    assert (
        build(small, "low enough", "IVF8,Flat", Limits(recall_target=0.1)).info["recall_at_10"]
        > 0.1
    )
    assert "recall_at_10" not in build(small, "unmeasured", "IVF8,Flat").info


def test_limits_that_cannot_be_met(small: World) -> None:
    with pytest.raises(ResourceError, match="no index type fits"):
        build(small, "none", "auto", Limits(max_memory_bytes=1000))


def test_next_type_is_tried_where_the_first_finds_too_little(
    small: World, monkeypatch: pytest.MonkeyPatch, vectors: Floats
) -> None:
    """Random vectors of many dimensions: few lists hold the neighbours, and only a deep search
    finds them.
    """
    hard = np.random.default_rng(0).normal(size=(3000, 64)).astype(np.float32)
    hard /= np.linalg.norm(hard, axis=1, keepdims=True)
    blocks = of_matrix(hard)
    monkeypatch.setattr("invar_ray.index.build.vector_blocks", lambda vectors: blocks)
    monkeypatch.setattr("invar_ray.index.build.check_ids", lambda *arguments: None)
    lines: list[str] = []
    # Flat is too slow at this latency, and an IVF of floats may visit 16 of its 64 lists only.
    limits = Limits(recall_target=0.9, max_latency_ms=0.05)
    index = build(small, "hard", "auto", limits, say=lines.append)
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["IVF64,Flat", "IVF64,SQ8"]
    assert 0.3 < float(lines[1].partition("recall@10 ")[2].split()[0]) < 0.9
    assert index.info["factory"] == "IVF64,SQ8"
    assert index.info["recall_at_10"] >= 0.9
    assert load_index(index).depth == index.info["search_depth"]


def test_index_without_a_plan_is_opened(small: World) -> None:
    assert "search_depth" not in small.base_index.info
    assert load_index(small.base_index).size == small.base_index.info["rows"]


def test_settings_that_do_not_act_are_in_no_plan() -> None:
    flat = index_settings(IndexConfig())
    assert flat == {"factory": "Flat"} | dict.fromkeys(flat.keys() - {"factory"})
    assert flat == index_settings(IndexConfig(num_lists_searched=5))
    lists = index_settings(IndexConfig(factory="IVF8,Flat"))
    assert lists == flat | {"factory": "IVF8,Flat", "num_lists_searched": 16}
    planned = index_settings(IndexConfig(factory="auto", max_memory_mb=5.0))
    assert planned == {
        "factory": "auto",
        "num_lists_searched": None,
        "recall_target": None,
        "max_memory_mb": 5.0,
        "max_latency_ms": None,
    }


def test_faults_of_the_settings() -> None:
    overrides = [
        "index.recall_target=1.5",
        "index.max_memory_mb=-1",
        "index.max_latency_ms=3",
        "scale.cpu_workers=-1",
    ]
    with pytest.raises(ConfigError) as caught:
        load_config("tiny", overrides)
    message = str(caught.value)
    assert "index.recall_target: must be in (0, 1]" in message
    assert "index.max_memory_mb: must be above 0" in message
    assert (
        "index.max_latency_ms: only the planner keeps to it; set index.factory to auto" in message
    )
    assert "scale.cpu_workers: must be 0 or more (got -1)" in message


# Searching


def test_plan_names_the_graph_before_codes_only_without_a_memory_limit() -> None:
    assert [c.kind for c in candidates(Need(10**6, 64))][:4] == [
        "Flat",
        "IVF-Flat",
        "IVF-SQ8",
        "HNSW",
    ]


@pytest.mark.parametrize("factory", TYPES)
def test_mapped_index_finds_the_same(tmp_path: Path, built: dict[str, Any], factory: str) -> None:
    save_index(built[factory], tmp_path / "index.faiss")
    queries = unit(20, WIDTH, seed=1)
    loaded = open_index(tmp_path / "index.faiss", 4).search(queries, 10)
    mapped = open_index(tmp_path / "index.faiss", 4, memory_map=True).search(queries, 10)
    assert np.array_equal(loaded[1], mapped[1])
    assert np.array_equal(loaded[0], mapped[0])


@pytest.mark.parametrize("factory", TYPES)
@pytest.mark.parametrize("share", [0.5, 0.05, 0.001, 0.0])
def test_filter_finds_only_what_is_allowed(
    vectors: Floats, built: dict[str, Any], factory: str, share: float
) -> None:
    queries = unit(10, WIDTH, seed=1)
    allowed = np.random.default_rng(5).random(ROWS) < share
    _, rows = Index(built[factory], 4).search(queries, 10, allowed=allowed)
    found = [[row for row in line if row >= 0] for line in rows.tolist()]
    assert all(allowed[row] for line in found for row in line)
    cosines = np.where(allowed, queries @ vectors.T, -np.inf)
    most = min(10, int(allowed.sum()))
    exact = np.argsort(-cosines, axis=1, kind="stable")[:, :most]
    if most:
        shares = [len(set(a) & set(b)) / most for a, b in zip(found, exact.tolist(), strict=True)]
        floor = 0.4 if "PQ" in factory else 0.9
        assert np.mean(shares) > floor, "a filter does not cost recall: the index looks deeper"
    else:
        assert found == [[]] * 10


def test_graph_too_large_to_compare_walks_with_the_filter(
    vectors: Floats, built: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "_FEW", 0)
    allowed = np.random.default_rng(5).random(ROWS) < 0.1
    _, rows = Index(built["HNSW16,Flat"], 32).search(unit(10, WIDTH, seed=1), 5, allowed=allowed)
    assert allowed[rows[rows >= 0]].all()
    assert (rows >= 0).all()


def test_filter_of_another_length_is_refused(built: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"the filter has shape \(3,\). Expected: \(2000,\)"):
        Index(built["Flat"]).search(unit(1, WIDTH), 3, allowed=np.ones(3, bool))


def test_batch_equals_one_by_one(built: dict[str, Any]) -> None:
    queries = unit(30, WIDTH, seed=1)
    for factory in TYPES:
        index = Index(built[factory], 4)
        together = index.search(queries, 10)[1]
        assert np.array_equal(
            together, np.concatenate([index.search(query[None], 10)[1] for query in queries])
        )


def test_depth_decides_how_much_is_found(vectors: Floats, built: dict[str, Any]) -> None:
    trial = sampled_trial(of_matrix(vectors), 100)
    for factory in ("IVF16,Flat", "HNSW16,Flat"):
        shallow, deep = (measure_recall(Index(built[factory]), trial, depth) for depth in (1, 16))
        assert shallow < deep


def test_vectors_of_other_passages_are_refused(small: World) -> None:
    table = pq.read_table(small.passages.path("passages.parquet"))
    passages, _ = small.store.get_or_build(
        Plan("passages", "reversed", {"name": "reversed"}),
        lambda building: pq.write_table(
            table.take(list(range(len(table)))[::-1]), building.path / "passages.parquet"
        ),
    )
    vectors = small.base_index.parent("vectors")
    with pytest.raises(MixedArtifactsError, match="which are not those of"):
        small.store.get_or_build(
            Plan("index", "reversed", {}, {"vectors": vectors, "passages": passages}),
            lambda building: build_index(building, vectors, passages, "auto"),
        )


def test_reader_is_opened_for_each_worker(vectors: Floats) -> None:
    """Sources with a cache of their own do not bear two threads."""
    opened = []

    def reader() -> Any:
        opened.append(1)
        return lambda rows: vectors[rows]

    blocks = VectorBlocks("m", WIDTH, tuple(range(0, ROWS + 1, 250)), reader)
    index = new_index(WIDTH, "Flat", ROWS)

    def some(first: int, last: int) -> Iterator[tuple[int, Floats]]:
        return blocks.some(first, last)

    assert add_all(index, [some(0, 4), some(4, 8)]).ntotal == ROWS
    assert len(opened) == 2
