"""Reading a ``vectors`` artifact.

``shards/part-<n>.parquet`` hold ids, content hashes and float16 vectors; n counts the rows before.
In a full or a compact version row n is passage n.  A version that took over the files of the one
before has ``rows.parquet`` beside them: a line a passage, in the order of the ``passages``, with
its id and the row that holds its vector.  Rows that no passage points to are tombstones: vectors of
what was deleted or changed.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from invar_ray.errors import CorruptArtifactError
from invar_ray.models.batching import Vectors
from invar_ray.store.artifacts import Artifact

SHARDS = "shards"
ROWS_FILE = "rows.parquet"
ROWS_SCHEMA = pa.schema([("id", pa.string()), ("row", pa.int64())])
_READ_ROWS = 65536

Halves = npt.NDArray[np.float16]
Rows = npt.NDArray[np.int64]


def shard_name(start: int) -> str:
    """File name of the shard whose first row is ``start``, without its ending."""
    return f"part-{start:010d}"


class VectorStore:
    """The shards below a folder, as one long table.

    Args:
        filesystem: of the folder.
        folder: holds ``shards/`` and perhaps ``rows.parquet``.
    """

    def __init__(self, filesystem: fs.FileSystem, folder: str) -> None:
        self._filesystem, self._folder = filesystem, folder
        entries = filesystem.get_file_info(
            fs.FileSelector(f"{folder}/{SHARDS}", allow_not_found=True)
        )
        names = [entry.base_name for entry in entries]
        self._paths = sorted(
            f"{folder}/{SHARDS}/{name}"
            for name in names
            if name.startswith("part-") and name.endswith(".parquet")
        )
        self.starts = [
            int(path.rpartition("-")[2].removesuffix(".parquet")) for path in self._paths
        ]
        self._last: tuple[int, Halves] | None = None

    @cached_property
    def size(self) -> int:
        """Rows, tombstones included."""
        if not self._paths:
            return 0
        return self.starts[-1] + int(self._metadata(self._paths[-1]).num_rows)

    @cached_property
    def row_map(self) -> pa.Table | None:
        """``rows.parquet``; ``None`` where passage n is row n."""
        path = f"{self._folder}/{ROWS_FILE}"
        if self._filesystem.get_file_info(path).type != fs.FileType.File:
            return None
        return self._read(path, ["id", "row"])

    def passage_rows(self) -> Rows:
        """For each passage the row of its vector."""
        if self.row_map is None:
            return np.arange(self.size, dtype=np.int64)
        return np.asarray(self.row_map.column("row").to_numpy(), dtype=np.int64)

    def contents(self) -> Iterator[tuple[int, pa.ChunkedArray]]:
        """First row and content hashes of each shard."""
        for start, path in zip(self.starts, self._paths, strict=True):
            yield start, self._read(path, ["content"]).column("content")

    def take(self, rows: Rows) -> Halves:
        """[N, D] vectors of these rows.

        Raises:
            CorruptArtifactError: there is no such row.
        """
        found: Halves | None = None
        order = np.argsort(rows, kind="stable")
        ascending = rows[order]
        at = 0
        while at < len(order):
            shard = bisect.bisect_right(self.starts, int(ascending[at])) - 1
            matrix = self._matrix(shard)
            stop = self.starts[shard] + len(matrix)
            upto = int(np.searchsorted(ascending, stop))
            if upto <= at:
                raise CorruptArtifactError(
                    f"{self._folder} holds no row {ascending[at]}", action="embed again"
                )
            here = order[at:upto]
            if found is None:
                found = np.empty((len(rows), matrix.shape[1]), np.float16)
            found[here] = matrix[rows[here] - self.starts[shard]]
            at = upto
        return found if found is not None else np.empty((0, 0), np.float16)

    def passage_ids(self) -> Iterator[list[str]]:
        """Ids of the passages, in their order, some at a time."""
        if self.row_map is None:
            for path in self._paths:
                yield self._read(path, ["id"]).column("id").to_pylist()
            return
        ids = self.row_map.column("id")
        for start in range(0, len(ids), _READ_ROWS):
            yield ids.slice(start, _READ_ROWS).to_pylist()

    def _matrix(self, shard: int) -> Halves:
        if self._last is None or self._last[0] != shard:
            self._last = shard, halves(self._read(self._paths[shard], ["vector"]).column("vector"))
        return self._last[1]

    def _read(self, path: str, columns: list[str]) -> pa.Table:
        with self._filesystem.open_input_file(path) as stream:
            return pq.read_table(stream, columns=columns)

    def _metadata(self, path: str) -> pq.FileMetaData:
        with self._filesystem.open_input_file(path) as stream:
            return pq.read_metadata(stream)


def halves(column: pa.ChunkedArray) -> Halves:
    """[N, D] float16 from a FixedSizeList column."""
    array = column.combine_chunks()
    flat = array.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat, dtype=np.float16).reshape(-1, array.type.list_size)


def unit_rows(matrix: Halves) -> Vectors:
    """[N, D] float32 rows of length 1: rounding to halves changes a length by some 1e-5."""
    rows = matrix.astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def vector_store(vectors: Artifact) -> VectorStore:
    """The shards of a ``vectors`` artifact."""
    return VectorStore(vectors.store.filesystem, vectors.store.location(vectors.ref))
