"""Parquet files whose row groups depend on the records alone."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from invar_ray.schema import to_table

GROUP_ROWS = 8192
_GROUP_CHARS = 64_000_000


class GroupWriter:
    """Writes records to a Parquet file in row groups whose borders depend on the records alone.

    Args:
        path: of the file.
        schema: of its rows.

    Attributes:
        rows: records added.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.rows = 0
        self._schema = schema
        self._writer = pq.ParquetWriter(path, schema)
        self._waiting: list[Any] = []
        self._chars = 0

    def add(self, record: Any, chars: int) -> None:
        """Add a record; ``chars`` bounds how much a group holds."""
        self._waiting.append(record)
        self.rows += 1
        self._chars += chars
        if len(self._waiting) >= GROUP_ROWS or self._chars >= _GROUP_CHARS:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(to_table(self._waiting, self._schema), row_group_size=GROUP_ROWS)
        self._waiting, self._chars = [], 0

    def __enter__(self) -> GroupWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and (self._waiting or not self.rows):
            self._flush()
        self._writer.close()


class TableWriter:
    """As :class:`GroupWriter`, of tables: where no row becomes an object.

    Args:
        path: of the file, which has the columns of the first table.

    Attributes:
        rows: how many were added.
    """

    def __init__(self, path: Path) -> None:
        self.rows = 0
        self._path = path
        self._writer: pq.ParquetWriter | None = None
        self._waiting: list[pa.Table] = []

    def add(self, table: pa.Table) -> None:
        """Add rows."""
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, table.schema)
        self.rows += table.num_rows
        self._waiting.append(table)
        while sum(part.num_rows for part in self._waiting) >= GROUP_ROWS:
            self._flush(GROUP_ROWS)

    def _flush(self, rows: int) -> None:
        whole = pa.concat_tables(self._waiting)
        if self._writer is not None:
            self._writer.write_table(whole.slice(0, rows), row_group_size=rows)
        self._waiting = [whole.slice(rows)]

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        left = sum(part.num_rows for part in self._waiting)
        if kind is None and left:
            self._flush(left)
        if self._writer is not None:
            self._writer.close()
