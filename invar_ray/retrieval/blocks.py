"""The vectors of an index in the order of its passages, some at a time: never all of them in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from invar_ray.artifacts import Artifact
from invar_ray.errors import DataError, MixedArtifactsError

Vectors = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
Take = Callable[[Rows], Vectors]


@dataclass(frozen=True)
class VectorBlocks:
    """Rows 0 .. of an index, cut into blocks.

    Attributes:
        uri: for messages.
        dimension: D.
        edges: first row of each block, and the number of all rows at the end; no block is empty.
        reader: opens the source for one thread: row numbers in, [n, D] out.
    """

    uri: str
    dimension: int
    edges: tuple[int, ...]
    reader: Callable[[], Take]

    @property
    def rows(self) -> int:
        """N."""
        return self.edges[-1]

    def __len__(self) -> int:
        return len(self.edges) - 1

    def some(self, first: int = 0, last: int | None = None) -> Iterator[tuple[int, Vectors]]:
        """First row and matrix of the blocks ``first`` .. ``last`` (exclusive), in order."""
        take = self.reader()
        for number in range(first, len(self) if last is None else last):
            start, stop = self.edges[number], self.edges[number + 1]
            yield start, take(np.arange(start, stop))

    def sample(self, rows: int, seed: int) -> tuple[Vectors, Rows]:
        """[n, D] and row numbers of a random sample without repeats, in row order; all where there are fewer."""
        if rows >= self.rows:
            chosen = np.arange(self.rows)
        else:
            chosen = np.sort(np.random.default_rng(seed).choice(self.rows, size=rows, replace=False))
        return self.reader()(chosen), chosen.astype(np.int64)


def vector_blocks(vectors: Artifact) -> VectorBlocks:
    """The shards of a ``vectors`` artifact as blocks.

    Raises:
        DataError: if there is nothing in it.
    """
    paths = sorted(vectors.path("shards").glob("part-*.parquet"))
    counts = [pq.ParquetFile(path).metadata.num_rows for path in paths]
    paths = [path for path, count in zip(paths, counts, strict=True) if count]
    edges = (0, *np.cumsum([count for count in counts if count], dtype=int).tolist())
    if not paths:
        raise DataError(f"{vectors.uri} holds no vectors", expected="one per passage")

    def matrix(number: int) -> Vectors:
        return column_to_matrix(pq.read_table(paths[number], columns=["vector"]).column("vector"))

    def take(rows: Rows) -> Vectors:
        where = np.searchsorted(edges, rows, side="right") - 1
        found = np.empty((len(rows), dimension), dtype=np.float32)
        for number in np.unique(where).tolist():
            inside = where == number
            found[inside] = matrix(number)[rows[inside] - edges[number]]
        return found

    dimension = int(pq.read_schema(paths[0]).field("vector").type.list_size)
    return VectorBlocks(vectors.uri, dimension, edges, lambda: take)


def of_matrix(matrix: Vectors, block_rows: int = 65_536) -> VectorBlocks:
    """A matrix in memory as blocks."""
    edges = (*range(0, len(matrix), block_rows), len(matrix))
    return VectorBlocks("a matrix", matrix.shape[1], edges, lambda: lambda rows: matrix[rows])


def passage_ids(vectors: Artifact) -> Iterator[list[str]]:
    """The passage of each row, a shard at a time."""
    for path in sorted(vectors.path("shards").glob("part-*.parquet")):
        yield pq.read_table(path, columns=["id"]).column("id").to_pylist()


def check_ids(blocks: VectorBlocks, vectors: Artifact, passages: Artifact) -> None:
    """Compare the vectors' ids with those of their passages.

    Raises:
        MixedArtifactsError: if they are others, or in another order.
    """
    expected = pq.read_table(passages.path("passages.parquet"), columns=["id"]).column("id")
    at, same = 0, blocks.rows == len(expected)
    for ids in passage_ids(vectors) if same else ():
        same = same and expected.slice(at, len(ids)).to_pylist() == ids
        at += len(ids)
    if not same:
        raise MixedArtifactsError(
            f"{vectors.uri} holds {blocks.rows} vectors, which are not those of the {len(expected)} passages in "
            f"{passages.uri}",
            action="embed these passages (python -m jobs.reindex)",
        )


def read_vectors(vectors: Artifact) -> tuple[list[str], Vectors]:
    """Ids and the [N, D] matrix of a ``vectors`` artifact, shards in order.

    Raises:
        CorruptArtifactError: if a shard differs from its manifest.
        DataError: if there is nothing in it.
    """
    vectors.verify()
    blocks = vector_blocks(vectors)
    ids = [name for some in passage_ids(vectors) for name in some]
    return ids, np.concatenate([matrix for _, matrix in blocks.some()])


def column_to_matrix(column: Any) -> Vectors:
    """[N, D] float32 from an Arrow FixedSizeList column."""
    chunk = column.combine_chunks()
    dimension = chunk.type.list_size
    return np.asarray(chunk.flatten().to_numpy(zero_copy_only=False), dtype=np.float32).reshape(-1, dimension)
