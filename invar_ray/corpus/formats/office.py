"""Slides (.pptx) and spreadsheets (.xlsx).  The only file that imports pptx and openpyxl."""

from __future__ import annotations

import datetime
import io
import re
import zipfile
from collections.abc import Iterator
from typing import Any

from invar_ray.corpus.formats.parsed import (
    Parsed,
    check_zip,
    drawing_lines,
    joined,
    local_name,
    office_children,
    one_line,
    table_lines,
)
from invar_ray.errors import DataError

_RELATION = "{http://schemas.openxmlformats.org/officeDocument/2006/relationships}"


def parse_pptx(data: bytes, place: str, max_bytes: int) -> Parsed:
    """The text of slides: shapes, tables, diagrams and charts in the file's order, then the
    speaker's notes.  Places are slides.

    Raises:
        DataError: it is encrypted, damaged, or unpacks to too much.
    """
    import pptx  # here: each library is loaded when its first file comes

    try:
        check_zip(data, place, max_bytes)
        slides = pptx.Presentation(io.BytesIO(data))
        pieces = [
            (f"slide {number}", "\n".join(_shape_lines(slide.element, slide.part)) + _notes(slide))
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
    Places are sheets; formulas count as what was last computed.  Text boxes and charts come last,
    comments are left out.

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
        pieces.append(("drawings", "\n\n".join(_drawn(data))))
    except DataError:
        raise
    except Exception as error:  # as above
        raise _damaged(place, "spreadsheet", error) from error
    text, places = joined(pieces)
    return Parsed("", text, places)


def _shape_lines(element: Any, part: Any) -> Iterator[str]:
    """The text below an element of a slide, whatever wraps it; diagrams and charts are parts of
    their own.
    """
    from pptx.oxml import parse_xml

    for child in office_children(element):
        name = local_name(child)
        if name == "tbl":
            rows = [
                [" ".join(_paragraphs(cell)) for cell in row.iter() if local_name(cell) == "tc"]
                for row in child
                if local_name(row) == "tr"
            ]
            marks = next((each for each in child if local_name(each) == "tblPr"), None)
            header = marks is not None and marks.get("firstRow") in {"1", "true"}
            yield from (line for _, line in table_lines(rows, header=header))
        elif name == "txBody":
            yield from _paragraphs(child)
        elif name in {"chart", "relIds"}:
            id = child.get(_RELATION + ("id" if name == "chart" else "dm"))
            if id in part.rels:
                yield from drawing_lines(parse_xml(part.related_part(id).blob))
        else:
            yield from _shape_lines(child, part)


def _paragraphs(element: Any) -> list[str]:
    texts = (_text(each) for each in element.iter() if local_name(each) == "p")
    return [text for text in map(one_line, texts) if text]


def _text(element: Any) -> str:
    """The text of runs, fields and formulas below an element."""
    parts = []
    for child in office_children(element):
        name = local_name(child)
        parts.append((child.text or "") if name == "t" else " " if name == "br" else _text(child))
    return "".join(parts)


def _drawn(data: bytes) -> Iterator[str]:
    """The text of a workbook's text boxes, diagrams and charts."""
    from openpyxl.xml.functions import fromstring

    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for name in sorted(archive.namelist()):
            if re.match(r"xl/(drawings/drawing|charts/chart|diagrams/data)\d*\.xml$", name):
                yield from drawing_lines(fromstring(archive.read(name)))


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
