"""Files that hold a document a row: JSON lines, Parquet, tab-separated tables as DPR's
``psgs_w100.tsv``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from invar_ray.corpus.formats.encodings import decoded
from invar_ray.corpus.formats.parsed import clean_text
from invar_ray.corpus.formats.plain import csv_rows
from invar_ray.corpus.json_places import json_entries
from invar_ray.corpus.rows import id_string, json_row, metadata, string
from invar_ray.corpus.storage import InputFile, read_bytes, read_lines
from invar_ray.corpus.whole import too_large
from invar_ray.errors import DataError
from invar_ray.schema import Document, Place

_TSV_COLUMNS = ("id", "text", "title")
_EXCERPT = 500


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a file.

    Attributes:
        number: its line, or its row in Parquet, from 1.
        place: file and number, for messages.
        found: the document, or what is wrong with the row.
        excerpt: the first characters of a faulty row.
    """

    number: int
    place: str
    found: Document | DataError
    excerpt: str = ""


def read_rows_of(file: InputFile, max_bytes: int, kept: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of a file of a row format, in order.

    Args:
        file: its format is one of :data:`invar_ray.corpus.storage.ROW_FORMATS`.
        max_bytes: a larger row is faulty.
        kept: fields that documents keep beside their own.

    Raises:
        DataError: the file itself cannot be read.
    """
    if file.format == "parquet":
        yield from _parquet(file, max_bytes, kept)
    elif file.format == "tsv":
        yield from _tsv(file, max_bytes, kept)
    elif file.format == "csv":
        yield from _csv(file, kept)
    elif file.format == "json":
        for number, (place, row) in enumerate(json_entries(file), start=1):
            try:
                yield Row(number, place, _document(row, place, file, "entry", number, kept))
            except DataError as error:
                yield Row(number, place, error, str(row)[:_EXCERPT])
    else:
        yield from _jsonl(file, max_bytes, kept)


def has_text_rows(file: InputFile) -> bool:
    """Whether a table or JSON file holds a document a row: a column, or in its first entry a field,
    ``text``; a table parted by tabs may have DPR's columns without their names.
    """
    try:
        if file.format == "tsv":
            _, line = next(iter(read_lines(file)), (0, b""))
            cells = _cells(line, file.uri)
            return _names_text(cells) or _is_dpr(cells)
        if file.format == "csv":
            return "text" in _csv_table(file)[0]
        first = next(iter(json_entries(file)), None)
    except DataError:
        return False  # its parser says what is wrong
    return first is not None and isinstance(first[1].get("text"), str)


def _csv(file: InputFile, kept: Sequence[str]) -> Iterator[Row]:
    names, *rows = _csv_table(file)
    for number, cells in enumerate(rows, start=2):
        place = f"{file.uri}, row {number}"
        try:
            if len(cells) != len(names):
                raise DataError(f"{place}: {len(cells)} columns", expected=f"{len(names)}")
            row = dict(zip(names, cells, strict=True))
            yield Row(number, place, _document(row, place, file, "row", number, kept))
        except DataError as error:
            yield Row(number, place, error, str(cells)[:_EXCERPT])


def _csv_table(file: InputFile) -> list[list[str]]:
    text, _ = decoded(read_bytes(file), file.uri)
    return csv_rows(text) or [[]]


def _jsonl(file: InputFile, max_bytes: int, kept: Sequence[str]) -> Iterator[Row]:
    for number, line in read_lines(file, max_bytes):
        place = f"{file.uri}, line {number}"
        try:
            if len(line) > max_bytes:
                raise too_large(place, len(line), max_bytes)
            yield Row(
                number, place, _document(json_row(line, place), place, file, "L", number, kept)
            )
        except DataError as error:
            yield Row(number, place, error, _excerpt(line))


def _tsv(file: InputFile, max_bytes: int, kept: Sequence[str]) -> Iterator[Row]:
    """``id<TAB>text<TAB>title``, in this order or as a first line names them; cells may be in
    quotes, as CSV writers put them.
    """
    names: tuple[str, ...] | None = None
    for number, line in read_lines(file, max_bytes):
        place = f"{file.uri}, line {number}"
        try:
            if len(line) > max_bytes:
                raise too_large(place, len(line), max_bytes)
            cells = _cells(line, place)
            if names is None:
                names = tuple(cells) if _names_text(cells) else _TSV_COLUMNS
                if _names_text(cells):
                    continue
            if len(cells) != len(names):
                raise DataError(
                    f"{place}: {len(cells)} columns",
                    expected=f"{len(names)}: {', '.join(names)}, parted by tabs",
                )
            row = dict(zip(names, cells, strict=True))
            yield Row(number, place, _document(row, place, file, "L", number, kept))
        except DataError as error:
            yield Row(number, place, error, _excerpt(line))


def _names_text(cells: list[str]) -> bool:
    return "text" in cells and len(cells) < 10


def _is_dpr(cells: list[str]) -> bool:
    """An id, a text and a shorter title; ``train, departs, arrives`` is the head of a table."""
    if len(cells) != len(_TSV_COLUMNS):
        return False
    id, text, title = cells
    return " " in text.strip() and " " not in id.strip() and len(text) > len(title)


def _cells(line: bytes, place: str) -> list[str]:
    try:
        cells = line.decode("utf-8").rstrip("\r\n").split("\t")
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 text", action="convert the file to UTF-8") from error
    return [
        cell[1:-1].replace('""', '"') if len(cell) >= 2 and cell[0] == cell[-1] == '"' else cell
        for cell in cells
    ]


def _parquet(file: InputFile, max_bytes: int, kept: Sequence[str]) -> Iterator[Row]:
    try:
        with file.seekable() as stream:
            table = pq.ParquetFile(stream)
            names = table.schema_arrow.names
            number = 0
            wanted = [
                name for name in ("id", "_id", "title", "text", "uri", *kept) if name in names
            ]
            for batch in table.iter_batches(256, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    place = f"{file.uri}, row {number}"
                    try:
                        document = _document(row, place, file, "row", number, kept)
                        if len(document.text) > max_bytes:
                            raise too_large(place, len(document.text), max_bytes)
                        yield Row(number, place, document)
                    except DataError as error:
                        yield Row(number, place, error, str(row)[:_EXCERPT])
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise DataError(
            f"{file.uri} cannot be read as Parquet ({reason})", action="write it again"
        ) from error


def _excerpt(line: bytes) -> str:
    return line[:_EXCERPT].decode("utf-8", "replace").rstrip("\r\n")


def _document(
    row: dict[str, Any], place: str, file: InputFile, mark: str, number: int, names: Sequence[str]
) -> Document:
    own = f"#{mark}{number}"
    id_name = "id" if "id" in row or "_id" not in row else "_id"  # BEIR's name for it
    title = clean_text(string(row, "title", place)) if row.get("title") is not None else ""
    text = "" if row.get("text", "") is None else clean_text(string(row, "text", place))
    return Document(
        id=id_string(row, id_name, place) if row.get(id_name) is not None else f"{file.name}{own}",
        title=title,
        text=text if text.strip() else title,  # what has a title alone is found by it
        uri=clean_text(string(row, "uri", place))
        if row.get("uri") is not None
        else f"{file.uri}{own}",
        file=file.name,
        places=(Place(0, f"row {number}"),),
        metadata=metadata(row, names, place),
    )
