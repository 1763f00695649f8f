"""The index and the retriever: exact search against numpy, and artifacts that do not belong
together.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from invar_ray.answering.retriever import Passages, Retriever, open_retriever
from invar_ray.errors import (
    ArtifactError,
    CorruptArtifactError,
    DataError,
    MixedArtifactsError,
    ModelError,
    RequestError,
)
from invar_ray.index.blocks import column_to_matrix, read_vectors
from invar_ray.index.build import build_index
from invar_ray.index.faiss_index import Index, build_faiss, load_index
from invar_ray.index.probes import check_probes, write_probes
from invar_ray.models.batching import refuse_not_finite
from invar_ray.models.encoder import Encoder, EncoderSpec, open_encoder
from invar_ray.models.precision import made_in
from invar_ray.schema import PASSAGE_SCHEMA, Passage, to_table
from invar_ray.steps.verify import verify_index
from invar_ray.store.artifacts import Building, Plan, open_artifact
from tests.support import ISLANDS, World, world

Floats = Any


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> World:
    return world(tmp_path_factory)


@pytest.fixture(scope="module")
def retriever(small: World) -> Retriever:
    return open_retriever(small.base_index.uri)


def unit(rows: int, width: int, seed: int = 0) -> Floats:
    matrix = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


class Table:
    """An encoder that looks its vectors up: search is tested with vectors of our choice."""

    fingerprint = "table"

    def __init__(self, vectors: dict[str, Floats]) -> None:
        self.vectors = vectors
        self.dimension = len(next(iter(vectors.values())))

    def encode_queries(self, questions: Any) -> Floats:
        return np.stack([self.vectors[question] for question in questions]).astype(np.float32)

    def encode_passages(self, passages: Any) -> Floats:
        return self.encode_queries([text for _, text in passages])


def passages_of(tmp_path: Path, count: int) -> Passages:
    rows = [
        Passage(f"p{row}", f"d{row // 2}", f"title {row}", f"text {row}", 0, 6, f"u{row}")
        for row in range(count)
    ]
    place = tmp_path / "passages.parquet"
    pq.write_table(to_table(rows, PASSAGE_SCHEMA), place)

    class Folder:
        fingerprint = "f"

        def path(self, name: str) -> Path:
            return tmp_path / name

    return Passages(Folder())  # type: ignore[arg-type]


# Search


@pytest.mark.parametrize("top_k", [1, 5, 200])
def test_flat_search_equals_numpy(top_k: int) -> None:
    vectors, queries = unit(200, 24), unit(9, 24, seed=1)
    scores, rows = Index(build_faiss(vectors, "Flat")).search(queries, top_k)
    cosines = queries @ vectors.T
    expected = np.argsort(-cosines, axis=1)[:, :top_k]
    assert np.array_equal(rows, expected)
    assert np.allclose(scores, np.take_along_axis(cosines, expected, 1), atol=1e-5)


def test_search_deeper_than_the_index_gives_all_of_it() -> None:
    index = Index(build_faiss(unit(7, 8), "Flat"))
    scores, rows = index.search(unit(2, 8, seed=1), 50)
    assert scores.shape == rows.shape == (2, 7)
    assert (rows >= 0).all()
    assert (index.size, index.dimension) == (7, 8)


def test_trained_factory_searches_as_numpy_does_when_it_looks_everywhere() -> None:
    vectors, queries = unit(400, 16), unit(5, 16, seed=1)
    exact = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]
    _, rows = Index(build_faiss(vectors, "IVF8,Flat"), depth=8).search(queries, 10)
    assert np.array_equal(rows, exact)
    _, rows = Index(build_faiss(vectors, "IVF8,Flat"), depth=1).search(queries, 10)
    assert not np.array_equal(rows, exact)


@pytest.mark.parametrize("factory", ["Nonsense", "IVF512,Flat"], ids=["unknown", "too few vectors"])
def test_factory_that_cannot_be_built(factory: str) -> None:
    with pytest.raises(
        ArtifactError, match=rf"FAISS cannot build '{factory}' over 20 vectors of 8 dim"
    ) as caught:
        build_faiss(unit(20, 8), factory)
    assert "set index.factory to Flat" in str(caught.value)


def test_queries_of_another_dimension_are_refused() -> None:
    with pytest.raises(MixedArtifactsError, match="queries have 9 dimensions, the index has 8"):
        Index(build_faiss(unit(20, 8), "Flat")).search(unit(1, 9), 3)


# The retriever


def test_ranks_scores_and_passages(tmp_path: Path) -> None:
    axes = np.eye(4, dtype=np.float32)
    tilted = (0.8 * axes[1] + 0.6 * axes[2]).astype(np.float32)
    found = Retriever(
        Table({"q": tilted, "other": axes[3]}),
        Index(build_faiss(axes, "Flat")),
        passages_of(tmp_path, 4),
        "v",
    ).retrieve(["q", "other"], 3)
    assert [(hit.rank, hit.passage_id, round(hit.score, 5)) for hit in found[0][:2]] == [
        (1, "p1", 0.8),
        (2, "p2", 0.6),
    ]
    first = found[0][0]
    assert (first.document_id, first.title, first.text, first.uri) == (
        "d0",
        "title 1",
        "text 1",
        "u1",
    )
    assert [hit.rank for hit in found[1]] == [1, 2, 3]
    assert found[1][0].passage_id == "p3"


def test_ties_keep_the_index_s_order(tmp_path: Path) -> None:
    vectors = np.zeros((9, 4), dtype=np.float32)
    vectors[:, 0] = 1.0
    vectors[4] = [0.0, 1.0, 0.0, 0.0]
    index = Index(build_faiss(vectors, "Flat"))
    retriever = Retriever(Table({"q": vectors[0]}), index, passages_of(tmp_path, 9), "v")
    for top_k in (1, 3, 8):
        (hits,) = retriever.retrieve(["q"], top_k)
        assert [hit.passage_id for hit in hits] == [f"p{row}" for row in range(9) if row != 4][
            :top_k
        ]


def test_places_that_an_approximate_index_leaves_empty_are_left_out(tmp_path: Path) -> None:
    vectors = unit(400, 8)
    built = build_faiss(vectors, "IVF16,Flat")
    built.nprobe = 1
    retriever = Retriever(Table({"q": vectors[0]}), Index(built), passages_of(tmp_path, 400), "v")
    (hits,) = retriever.retrieve(["q"], 400)
    assert 0 < len(hits) < 400
    assert hits[0].passage_id == "p0"
    assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))


@pytest.mark.parametrize("top_k", [0, -1])
def test_top_k_below_one_is_refused(retriever: Retriever, top_k: int) -> None:
    with pytest.raises(RequestError, match=f"top_k is {top_k}. Expected: 1 or more"):
        retriever.retrieve(["Who?"], top_k)


def test_top_k_above_the_size_gives_all(retriever: Retriever) -> None:
    (hits,) = retriever.retrieve(["Who built the lighthouse of Kelda?"], 10_000)
    assert len(hits) == len(retriever.passages)
    assert len({hit.passage_id for hit in hits}) == len(hits)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert retriever.retrieve([], 3) == []


def test_search_through_artifacts_equals_numpy(small: World, retriever: Retriever) -> None:
    questions = [f"Who built the lighthouse of {name}?" for name in ISLANDS]
    ids, matrix = read_vectors(small.base_index.parent("vectors"))
    assert ids == retriever.passages.ids()
    cosines = small.base_encoder.encode_queries(questions) @ matrix.T
    for hits, row in zip(retriever.retrieve(questions, 4), cosines, strict=True):
        assert [hit.passage_id for hit in hits] == [ids[number] for number in np.argsort(-row)[:4]]
        assert [hit.score for hit in hits] == pytest.approx(np.sort(row)[::-1][:4], abs=1e-5)


def test_untrained_base_is_a_usable_retriever(small: World, retriever: Retriever) -> None:
    questions = [f"Who built the lighthouse of {name}?" for name in ISLANDS]
    found = retriever.retrieve(questions, 1)
    right = [
        hits[0].document_id == f"doc-{name.lower()}"
        for hits, name in zip(found, ISLANDS, strict=True)
    ]
    assert sum(right) >= 9


def test_versions_trace_an_answer(small: World, retriever: Retriever) -> None:
    assert retriever.versions == {
        "index": small.base_index.fingerprint,
        "encoder": small.base_spec.fingerprint,
        "passages": small.passages.fingerprint,
    }


def test_passages_by_row(small: World, retriever: Retriever) -> None:
    rows = retriever.passages
    assert [passage.id for passage in rows.rows([3, 0, 3])] == [
        rows.ids()[3],
        rows.ids()[0],
        rows.ids()[3],
    ]
    assert rows.rows([]) == []
    assert [passage.document_id for passage in rows.rows(range(len(rows)))] == rows.document_ids()


# Artifacts


def test_index_artifact_says_what_it_holds(small: World) -> None:
    info = small.base_index.info
    assert EncoderSpec.from_json(info["encoder"]) == small.base_spec
    assert (info["rows"], info["dimension"]) == (len(Passages(small.passages)), 384)
    assert load_index(small.base_index).size == info["rows"]


def test_vectors_shards_are_readable_by_plain_pyarrow(small: World) -> None:
    vectors = small.base_index.parent("vectors")
    shards = sorted(vectors.path("shards").glob("*.parquet"))
    assert len(shards) == 2
    table = pa.concat_tables([pq.read_table(path) for path in shards])
    assert table.schema.field("vector").type == pa.list_(pa.float16(), 384)
    assert table.column("id").to_pylist() == Passages(small.passages).ids()
    matrix = column_to_matrix(table.column("vector"))
    assert np.allclose(np.linalg.norm(matrix, axis=1), 1.0, atol=2.0**-11)
    expected = small.base_encoder.encode_passages(
        [
            (passage.title, passage.text)
            for passage in Passages(small.passages).rows(range(len(matrix)))
        ]
    )
    # a half's rounding, and padding's
    assert (np.abs(matrix - expected) <= 2.0**-11 * np.abs(expected) + 1e-5).all()


@pytest.mark.parametrize("name", ["reordered", "shorter"])
def test_vectors_of_other_passages_are_refused(small: World, name: str) -> None:
    table = pq.read_table(small.passages.path("passages.parquet"))
    other = table.slice(0, 3) if name == "shorter" else table.take(list(range(len(table)))[::-1])
    passages, _ = small.store.get_or_build(
        Plan("passages", name, {"name": name}),
        lambda building: pq.write_table(other, building.path / "passages.parquet"),
    )
    vectors = small.base_index.parent("vectors")
    with pytest.raises(
        MixedArtifactsError, match=r"vectors, which are not those of the .* passages in"
    ) as caught:
        small.store.get_or_build(
            Plan("index", name, {}, {"vectors": vectors, "passages": passages}),
            lambda building: build_index(building, vectors, passages, "Flat"),
        )
    assert "embed these passages (python -m jobs.reindex)" in str(caught.value)


def test_vectors_artifact_without_shards_is_refused(small: World) -> None:
    vectors, _ = small.store.get_or_build(
        Plan("vectors", "none", {}), lambda building: (building.path / "shards").mkdir()
    )
    with pytest.raises(DataError, match="holds no vectors"):
        read_vectors(vectors)


def test_flipped_bit_in_a_shard_is_caught_and_named(small: World, tmp_path: Path) -> None:
    shutil.copytree(small.store.root, tmp_path / "runs")
    vectors = open_artifact(str(tmp_path / "runs" / small.base_index.manifest.parents["vectors"]))
    shard = sorted(vectors.path("shards").glob("*.parquet"))[1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CorruptArtifactError, match=f"shards/{shard.name}"):
        read_vectors(vectors)


def test_damaged_index_is_not_served(small: World, tmp_path: Path) -> None:
    shutil.copytree(small.store.root, tmp_path / "runs")
    copy = str(tmp_path / "runs" / small.base_index.ref)
    for kind, name in {"index": "index.faiss", "passages": "passages.parquet"}.items():
        artifact = (
            open_artifact(copy) if kind == "index" else open_artifact(copy).parent("passages")
        )
        path = artifact.path(name)
        original = path.read_bytes()
        content = bytearray(original)
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(CorruptArtifactError, match=name):
            open_retriever(copy)
        path.write_bytes(original)
    open_retriever(copy)


# Probes and mixed versions


def test_own_encoder_reproduces_the_probes(small: World) -> None:
    for index in (small.base_index, small.adapter_index, small.coarse_index):
        assert (
            check_probes(
                index, open_encoder(EncoderSpec.from_json(index.info["encoder"]), small.store)
            )
            > 1 - 1e-5
        )


def test_bf16_encoder_nearly_reproduces_the_probes_of_fp32(small: World) -> None:
    half = open_encoder(small.base_spec, small.store, precision="bf16")
    assert 1 - 1e-3 < check_probes(small.base_index, half) < 1 - 1e-6


def dtype_of(retriever: Retriever) -> torch.dtype:
    encoder = retriever.encoder
    assert isinstance(encoder, Encoder)
    return encoder.module.base.dtype


def test_an_index_is_read_in_the_precision_that_it_was_made_in(small: World) -> None:
    index = small.half_index
    assert (made_in(index), made_in(small.base_index)) == ("bf16", "fp32")
    stored, full = (read_vectors(each.parent("vectors"))[1] for each in (index, small.base_index))
    assert np.abs(stored - full).max() > 1e-3, "float16 storage alone differs by less"
    opened = open_retriever(index.uri)
    assert dtype_of(opened) == torch.bfloat16
    assert dtype_of(open_retriever(index.uri, precision="fp32")) == torch.float32
    assert dtype_of(open_retriever(small.base_index.uri)) == torch.float32
    assert dtype_of(open_retriever(small.base_index.uri, precision="bf16")) == torch.bfloat16
    assert [hit.rank for hit in opened.retrieve(["Who built the lighthouse of Garsa?"], 3)[0]] == [
        1,
        2,
        3,
    ]
    faults = verify_index(index, samples=8, seed=0).faults
    assert not [fault for fault in faults if fault.startswith(("encoder", "probes", "vectors"))]


def test_the_other_precision_does_not_excuse_another_encoder(small: World) -> None:
    """Probes are checked in the index's precision, whatever questions are encoded in afterwards."""

    def body(building: Building) -> None:
        for name in ("index.faiss", "probes.parquet"):
            (building.path / name).write_bytes(small.base_index.path(name).read_bytes())
        building.info |= small.base_index.info | {"encoder": small.adapter.info["encoder"]}

    parents = {"vectors": small.base_index.parent("vectors"), "passages": small.passages}
    mixed, _ = small.store.get_or_build(Plan("index", "mixed-precision", {}, parents), body)
    for precision in (None, "fp32", "bf16"):
        with pytest.raises(MixedArtifactsError, match="does not reproduce"):
            open_retriever(mixed.uri, precision=precision)  # type: ignore[arg-type]


def test_another_encoder_does_not_reproduce_the_probes(small: World) -> None:
    other = open_encoder(EncoderSpec.from_json(small.adapter.info["encoder"]), small.store)
    with pytest.raises(MixedArtifactsError) as caught:
        check_probes(small.base_index, other)
    message = str(caught.value)
    assert other.fingerprint in message
    assert small.base_spec.fingerprint in message
    assert "lowest cosine" in message
    assert "python -m jobs.reindex" in message


def test_encoder_with_other_prompts_does_not_reproduce_the_probes(small: World) -> None:
    with pytest.raises(MixedArtifactsError):
        check_probes(
            small.base_index,
            open_encoder(replace(small.base_spec, passage_prefix="a b c d"), small.store),
        )


def test_encoder_of_another_dimension_does_not_reproduce_the_probes(small: World) -> None:
    with pytest.raises(MixedArtifactsError, match=r"lowest cosine -1\.0000"):
        check_probes(small.base_index, Table({"x": np.ones(8, dtype=np.float32)}))


def test_index_of_an_adapter_is_served_with_it(small: World) -> None:
    retriever = open_retriever(small.adapter_index.uri, adapter_uri=small.adapter.uri)
    assert retriever.versions["index"] == small.adapter_index.fingerprint
    (hits,) = retriever.retrieve(["Who built the lighthouse of Garsa?"], 3)
    assert len(hits) == 3


def test_index_made_by_another_adapter_is_refused(small: World) -> None:
    with pytest.raises(MixedArtifactsError) as caught:
        open_retriever(small.adapter_index.uri, adapter_uri=small.other_adapter.uri)
    message = str(caught.value)
    assert (
        f"was made by adapter {small.adapter.fingerprint}, not by adapter "
        f"{small.other_adapter.fingerprint}" in message
    )
    assert small.adapter_index.uri in message
    assert "reindex with this adapter (python -m jobs.reindex)" in message


def test_index_of_the_bare_base_is_refused_for_an_adapter(small: World) -> None:
    with pytest.raises(
        MixedArtifactsError, match="was made by the base without an adapter, not by adapter"
    ):
        open_retriever(small.base_index.uri, adapter_uri=small.adapter.uri)


def test_manifest_that_names_another_encoder_is_refused(small: World, tmp_path: Path) -> None:
    """Someone edits an index's manifest to use another adapter: the probes tell."""
    shutil.copytree(small.store.root, tmp_path / "runs")
    index = open_artifact(str(tmp_path / "runs" / small.adapter_index.ref))
    small.other_adapter.verify()
    shutil.copytree(
        small.other_adapter.path(), tmp_path / "runs" / small.other_adapter.ref, dirs_exist_ok=True
    )
    manifest = json.loads(index.path("manifest.json").read_text(encoding="utf-8"))
    manifest["info"]["encoder"] = small.other_adapter.info["encoder"]
    index.path("manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(MixedArtifactsError, match="does not reproduce the probe vectors"):
        open_retriever(index.uri)


def test_other_kinds_are_refused(small: World) -> None:
    with pytest.raises(ArtifactError, match="is an artifact of kind 'passages'"):
        open_retriever(small.passages.uri)
    with pytest.raises(ArtifactError, match="Expected: kind 'retriever'"):
        open_retriever(small.base_index.uri, adapter_uri=small.base_index.uri)


def test_vectors_that_are_not_finite_are_refused_everywhere(small: World, tmp_path: Path) -> None:
    bad = np.eye(3, 4, dtype=np.float32)
    bad[1, 2] = np.nan
    with pytest.raises(ModelError, match=r"1 of 3 vectors are not finite \(first: passage b\)"):
        refuse_not_finite(bad, ["passage a", "passage b", "passage c"])
    with pytest.raises(ModelError, match="the probe 'T'"):
        write_probes(tmp_path / "p.parquet", [("", "x"), ("T", "y"), ("", "z")], bad)
    index = load_index(small.base_index)
    query = np.full((1, index.dimension), np.inf, dtype=np.float32)
    with pytest.raises(ModelError, match="first: question 1"):
        index.search(query, 2)
    width = index.dimension
    nothing = np.full(width, np.nan, dtype=np.float32)
    texts = pq.read_table(small.base_index.path("probes.parquet")).to_pylist()
    with pytest.raises(MixedArtifactsError, match="lowest cosine nan"):
        check_probes(small.base_index, Table({row["text"]: nothing for row in texts}))
