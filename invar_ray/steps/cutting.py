"""Cutting documents in batches, here or on Ray tasks, and writing what comes out in row groups."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from invar_ray.schema import Document, Passage, to_table
from invar_ray.text.chunking import chunk_document, passages_at

GROUP_ROWS = 8192
_GROUP_CHARS = 64_000_000

Spans = Sequence[list[tuple[int, int]] | None]
Pair = tuple[list[Document], Spans]


class Cutter:
    """Cuts documents, those with known spans there and the others with the tokenizer."""

    def __init__(self, tokenizer: Any, tokens: int, stride: int) -> None:
        self._tokenizer, self._tokens, self._stride = tokenizer, tokens, stride

    def pair(self, batch: Pair) -> tuple[list[Document], list[list[Passage]]]:
        """The documents of a batch with their passages."""
        documents, spans = batch
        return documents, [
            chunk_document(document, self._tokenizer, tokens=self._tokens, stride=self._stride)
            if known is None
            else passages_at(document, known)
            for document, known in zip(documents, spans, strict=True)
        ]


def cut_on_ray(
    batches: Iterable[Pair], cutter: Cutter, workers: int
) -> Iterator[tuple[list[Document], list[list[Passage]]]]:
    """As ``map(cutter.pair, batches)``, in the same order, on ``workers`` Ray tasks at a time."""
    shared = ray.put(cutter)
    task = ray.remote(num_cpus=1)(_cut).options(max_retries=3)
    running: deque[Any] = deque()
    for batch in batches:
        running.append(task.remote(shared, batch))
        while len(running) > 2 * workers:  # one each at work and one waiting
            yield ray.get(running.popleft())
    while running:
        yield ray.get(running.popleft())


def _cut(cutter: Cutter, batch: Pair) -> tuple[list[Document], list[list[Passage]]]:
    return cutter.pair(batch)


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
