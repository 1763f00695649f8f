"""The vector index.  The only file that imports FAISS.

An index artifact holds ``index.faiss`` (inner product over unit vectors, i.e. cosine), row i being passage i of its
``passages`` parent, and ``probes.parquet``: texts with the vectors that the index's own encoder gave them.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from invar_ray.artifacts import Artifact, Building
from invar_ray.errors import ArtifactError, MixedArtifactsError
from invar_ray.models.encoder import EncoderSpec, TextEncoder
from invar_ray.retrieval.vectors import read_vectors
from invar_ray.schema import vector_schema

INDEX_FILE = "index.faiss"
PROBE_TOLERANCE = 1e-3
"""A probe's cosine with its stored vector must be at least 1 minus this (bf16 and other batch shapes stay well
within).
"""

Vectors = npt.NDArray[np.float32]


class Index:
    """A loaded FAISS index: unit vectors in, (scores, rows) out."""

    def __init__(self, index: Any, num_lists_searched: int = 1) -> None:
        self._index = index
        with contextlib.suppress(RuntimeError):  # only IVF indexes have lists
            faiss.extract_index_ivf(index).nprobe = num_lists_searched

    @property
    def size(self) -> int:
        """Number of vectors."""
        return int(self._index.ntotal)

    @property
    def dimension(self) -> int:
        """D."""
        return int(self._index.d)

    def search(self, queries: Vectors, top_k: int) -> tuple[Vectors, npt.NDArray[np.int64]]:
        """The nearest rows.

        Args:
            queries: [N, D] unit rows.
            top_k: how many; where the index holds fewer, fewer come back.

        Returns:
            cosines [N, k] falling (ties by row), and row numbers [N, k]; -1 marks a place that an approximate index
            left empty.

        Raises:
            MixedArtifactsError: if D differs.
        """
        if queries.shape[1] != self.dimension:
            raise MixedArtifactsError(
                f"queries have {queries.shape[1]} dimensions, the index has {self.dimension}",
                expected="the encoder that made the index",
            )
        scores, rows = self._index.search(np.ascontiguousarray(queries, dtype=np.float32), min(top_k, self.size))
        # FAISS returns ties in no useful order; empty places (-1) have the lowest score and stay last.
        order = np.lexsort((rows, -scores), axis=1)
        return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def build_faiss(vectors: Vectors, factory: str) -> Any:
    """A FAISS index of unit vectors, inner product.

    Raises:
        ArtifactError: if FAISS does not know the factory string or there are too few vectors to train it.
    """
    try:
        index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            index.train(vectors)
        index.add(vectors)
    except RuntimeError as error:
        raise ArtifactError(
            f"FAISS cannot build {factory!r} over {vectors.shape[0]} vectors of {vectors.shape[1]} dimensions "
            f"({str(error).splitlines()[0]})",
            action="set index.factory to Flat, or to one that fits the corpus (IVF needs some 39 vectors per list)",
        ) from error
    return index


def build_index(
    building: Building, vectors: Artifact, passages: Artifact, factory: str, num_lists_searched: int = 1
) -> None:
    """Fill an index artifact from a ``vectors`` artifact, in the order of its ``passages``.

    Raises:
        MixedArtifactsError: if the vectors are not those of the passages.
    """
    ids, matrix = read_vectors(vectors)
    expected = pq.read_table(passages.path("passages.parquet"), columns=["id"]).column("id").to_pylist()
    if ids != expected:
        raise MixedArtifactsError(
            f"{vectors.uri} holds {len(ids)} vectors, which are not those of the {len(expected)} passages in "
            f"{passages.uri}",
            action="embed these passages (python -m jobs.reindex)",
        )
    faiss.write_index(build_faiss(matrix, factory), str(building.path / INDEX_FILE))
    building.info |= {"encoder": vectors.info["encoder"], "rows": len(ids), "dimension": int(matrix.shape[1])}
    building.info["num_lists_searched"] = num_lists_searched
    probes = vectors.path("probes.parquet")
    (building.path / "probes.parquet").write_bytes(probes.read_bytes())


def column_to_matrix(column: Any) -> Vectors:
    """[N, D] float32 from an Arrow FixedSizeList column."""
    chunk = column.combine_chunks()
    dimension = chunk.type.list_size
    return np.asarray(chunk.flatten().to_numpy(zero_copy_only=False), dtype=np.float32).reshape(-1, dimension)


def load_index(artifact: Artifact) -> Index:
    """Load and verify an ``index`` artifact; errors as :meth:`Artifact.verify`."""
    artifact.verify()
    return Index(faiss.read_index(str(artifact.path(INDEX_FILE))), int(artifact.info.get("num_lists_searched", 1)))


def write_probes(path: Path, encoder: TextEncoder, texts: list[tuple[str, str]]) -> None:
    """Store (title, text) probes with the vectors that ``encoder`` gives them."""
    import pyarrow as pa

    matrix = encoder.encode_passages(texts)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1])
    titles, bodies = [title for title, _ in texts], [text for _, text in texts]
    schema = vector_schema(matrix.shape[1])
    table = pa.table({"title": titles, "text": bodies, "vector": vectors.cast(schema.field("vector").type)})
    pq.write_table(table, path)


def check_probes(artifact: Artifact, encoder: TextEncoder) -> float:
    """Encode the probes again and compare.

    Returns:
        The lowest cosine between a probe's vector and its stored one.

    Raises:
        MixedArtifactsError: if the encoder does not reproduce them.
    """
    table = pq.read_table(artifact.path("probes.parquet"))
    stored = column_to_matrix(table.column("vector"))
    texts = list(zip(table.column("title").to_pylist(), table.column("text").to_pylist(), strict=True))
    made_by = EncoderSpec.from_json(artifact.info["encoder"]).fingerprint
    if encoder.dimension != stored.shape[1]:
        lowest = -1.0
    else:
        lowest = float((encoder.encode_passages(texts) * stored).sum(axis=1).min())
    if lowest < 1.0 - PROBE_TOLERANCE:
        raise MixedArtifactsError(
            f"encoder {encoder.fingerprint} does not reproduce the probe vectors of {artifact.uri}, which encoder "
            f"{made_by} made (lowest cosine {lowest:.4f})",
            expected=f"cosines of at least {1.0 - PROBE_TOLERANCE}",
            action="serve the index with its own encoder, or reindex with this one (python -m jobs.reindex)",
        )
    return lowest
