"""The vectors of an index in the order of its passages, some at a time: never all of them in
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from invar_ray.errors import DataError, MixedArtifactsError
from invar_ray.index.vectors import unit_rows, vector_store
from invar_ray.store.artifacts import Artifact

Vectors = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
Take = Callable[[Rows], Vectors]
_BLOCK_ROWS = 65_536


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
        """[n, D] and row numbers of a random sample without repeats, in row order; all where there
        are fewer.
        """
        if rows >= self.rows:
            chosen = np.arange(self.rows)
        else:
            chosen = np.sort(
                np.random.default_rng(seed).choice(self.rows, size=rows, replace=False)
            )
        return self.reader()(chosen), chosen.astype(np.int64)


def vector_blocks(vectors: Artifact) -> VectorBlocks:
    """The vectors of a ``vectors`` artifact as blocks, in the order of its passages.

    Raises:
        DataError: if there is nothing in it.
    """
    store = vector_store(vectors)
    places = store.passage_rows()
    if not len(places):
        raise DataError(f"{vectors.uri} holds no vectors", expected="one per passage")
    if store.row_map is None:
        edges = (*store.starts, store.size)
    else:
        edges = (*range(0, len(places), _BLOCK_ROWS), len(places))

    def reader() -> Take:
        own = vector_store(vectors)  # it keeps the shard that was read last: one for each thread
        return lambda rows: unit_rows(own.take(places[rows]))

    dimension = store.take(places[:1]).shape[1]
    return VectorBlocks(vectors.uri, dimension, edges, reader)


def of_matrix(matrix: Vectors, block_rows: int = _BLOCK_ROWS) -> VectorBlocks:
    """A matrix in memory as blocks."""
    edges = (*range(0, len(matrix), block_rows), len(matrix))
    return VectorBlocks("a matrix", matrix.shape[1], edges, lambda: lambda rows: matrix[rows])


def passage_ids(vectors: Artifact) -> Iterator[list[str]]:
    """The passage of each row, some at a time."""
    yield from vector_store(vectors).passage_ids()


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
            f"{vectors.uri} holds {blocks.rows} vectors, which are not those of the "
            f"{len(expected)} passages in "
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
    return np.asarray(chunk.flatten().to_numpy(zero_copy_only=False), dtype=np.float32).reshape(
        -1, dimension
    )
