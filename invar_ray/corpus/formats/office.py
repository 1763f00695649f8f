"""Slides (.pptx) and spreadsheets (.xlsx).  The only file that imports pptx and openpyxl."""

from __future__ import annotations

import datetime
import io
from collections.abc import Iterable, Iterator
from typing import Any

from invar_ray.corpus.formats.parsed import Parsed, check_zip, joined, one_line, table_lines
from invar_ray.errors import DataError


def parse_pptx(data: bytes, place: str, max_bytes: int) -> Parsed:
    """The text of slides: shapes and tables in the file's order, then the speaker's notes.  Places
    are slides.

    Raises:
        DataError: it is encrypted, damaged, or unpacks to too much.
    """
    import pptx  # here: each library is loaded when its first file comes

    try:
        check_zip(data, place, max_bytes)
        slides = pptx.Presentation(io.BytesIO(data))
        pieces = [
            (f"slide {number}", "\n".join(_shape_lines(slide.shapes)) + _notes(slide))
            for number, slide in enumerate(slides.slides, start=1)
        ]
        title = one_line(slides.core_properties.title or "")
    except DataError:
        raise
    except Exception as error:  # a damaged file makes zipfile, lxml and pptx raise nearly anything
        raise _damaged(place, "slides", error) from error
    if title == "PowerPoint Presentation":
        title = ""
    text, places = joined(pieces)
    return Parsed(title or text.partition("\n")[0][:80], text, places)


def parse_xlsx(data: bytes, place: str, max_bytes: int) -> Parsed:
    """The values of a workbook: each row a paragraph, its values beside the names of their columns.
    Places are sheets; formulas count as what was last computed.

    Raises:
        DataError: it is encrypted, damaged, or unpacks to too much.
    """
    import openpyxl

    try:
        check_zip(data, place, max_bytes)
        book = openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=True)
        pieces = []
        for sheet in book.worksheets:
            rows = [[_value(cell) for cell in row] for row in sheet.iter_rows(values_only=True)]
            while rows and not any(rows[0]):
                del rows[0]
            lines = [line for _, line in table_lines(_trimmed(rows))]
            pieces.append((f'"{one_line(sheet.title)}"', "\n\n".join(lines)))
    except DataError:
        raise
    except Exception as error:  # as above
        raise _damaged(place, "spreadsheet", error) from error
    text, places = joined(pieces)
    return Parsed("", text, places)


def _shape_lines(shapes: Iterable[Any]) -> Iterator[str]:
    for shape in shapes:
        if shape.shape_type is not None and hasattr(shape, "shapes"):  # a group
            yield from _shape_lines(shape.shapes)
        elif getattr(shape, "has_table", False):
            rows = [[cell.text for cell in row.cells] for row in shape.table.rows]
            yield from (line for _, line in table_lines(rows, header=shape.table.first_row))
        elif getattr(shape, "has_text_frame", False):
            yield from filter(
                None, (one_line(paragraph.text) for paragraph in shape.text_frame.paragraphs)
            )


def _notes(slide: Any) -> str:
    if not slide.has_notes_slide or slide.notes_slide.notes_text_frame is None:
        return ""
    text = one_line(slide.notes_slide.notes_text_frame.text)
    return f"\nNotes: {text}" if text else ""


def _value(cell: Any) -> str:
    if cell is None:
        return ""
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    if isinstance(cell, datetime.datetime) and cell.time() == datetime.time():
        return cell.date().isoformat()
    return one_line(str(cell))


def _trimmed(rows: list[list[str]]) -> list[list[str]]:
    """Without the columns on the left that are empty in every row."""
    first = min(
        (next((i for i, cell in enumerate(row) if cell), len(row)) for row in rows), default=0
    )
    return [row[first:] for row in rows]


def _damaged(place: str, kind: str, error: Exception) -> DataError:
    return DataError(
        f"{place} cannot be read as {kind} ({type(error).__name__}: {one_line(str(error))[:120]})",
        action="open it in an office program and save it again, without a password",
    )
