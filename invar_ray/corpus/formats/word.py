"""Word files (.docx).  The only file that imports docx (python-docx).

A .docx is a zip of XML.  python-docx resolves no entities and lxml keeps its limits on depth and
text size; what is checked here, before anything is unpacked, is how much the zip says it unpacks to
(zipfile reads no more than that).
"""

from __future__ import annotations

import io
import zipfile

import docx
from docx.table import Table

from invar_ray.corpus.formats.parsed import Parsed, one_line
from invar_ray.errors import DataError
from invar_ray.schema import Place

_OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
_MAX_PARTS = 10_000
_XML_TIMES, _ALL_TIMES = 2, 8
"""How much larger than the largest file its XML parts, and all its parts (pictures too), may
unpack. [ours]
"""


def parse_docx(data: bytes, place: str, max_bytes: int) -> Parsed:
    """The text of a Word file: paragraphs and, as one paragraph each, the rows of tables, in
    reading order.

    Places are headings; paragraphs (those that hold text) are counted from 1.  Headers, footers,
    footnotes, comments and text boxes are left out.

    Args:
        data: the file.
        place: its name, for messages.
        max_bytes: the largest file that is read; it also bounds what the file may unpack to.

    Raises:
        DataError: it is encrypted, damaged, no Word file, holds no text, or unpacks to too much.
    """
    if data.startswith(_OLE):
        raise DataError(
            f"{place} is encrypted, or an old .doc file under a new name",
            action="save it as .docx without a password",
        )
    try:
        _check_size(data, place, max_bytes)
        document = docx.Document(io.BytesIO(data))
        paragraphs = _paragraphs(document)
        title = one_line(document.core_properties.title or "")
    except DataError:
        raise
    except Exception as error:  # a damaged file makes zipfile, lxml and docx raise nearly anything
        raise DataError(
            f"{place} cannot be read as Word file ({type(error).__name__}: "
            f"{one_line(str(error))[:120]})",
            action="open it in a word processor and save it again",
        ) from error
    if not paragraphs:
        raise DataError(
            f"{place} holds no text", action="remove it, or save its pictures' text with OCR"
        )
    places, length = [], 0
    for text, is_heading in paragraphs:
        if is_heading:
            places.append(Place(length, f'"{text}"'))
            title = title or text
        length += len(text) + 2
    return Parsed(
        title, "\n\n".join(text for text, _ in paragraphs), tuple(places), unit="paragraph"
    )


def _check_size(data: bytes, place: str, max_bytes: int) -> None:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        parts = archive.infolist()
    xml = sum(part.file_size for part in parts if part.filename.endswith((".xml", ".rels")))
    everything = sum(part.file_size for part in parts)
    if (
        len(parts) > _MAX_PARTS
        or xml > _XML_TIMES * max_bytes
        or everything > _ALL_TIMES * max_bytes
    ):
        raise DataError(
            f"{place} would unpack to {everything / 2**20:,.0f} MB in {len(parts):,} parts",
            expected=f"at most {_XML_TIMES} times corpus.max_file_mb of XML and {_ALL_TIMES} times "
            "in all",
            action="split it, or raise corpus.max_file_mb if you trust it",
        )


def _paragraphs(document: docx.document.Document) -> list[tuple[str, bool]]:
    """Text and whether it is a heading, of each paragraph that holds text."""
    found: list[tuple[str, bool]] = []
    for block in document.iter_inner_content():
        if isinstance(block, Table):
            for row in block.rows:
                cells = [one_line(cell.text) for cell in row.cells]
                # A merged cell comes once per column that it covers.
                kept = [
                    text
                    for at, text in enumerate(cells)
                    if text and (at == 0 or text != cells[at - 1])
                ]
                if kept:
                    found.append((" | ".join(kept), False))
            continue
        text = one_line(block.text)
        if text:
            name = (block.style.name if block.style is not None else None) or ""
            found.append((text, name == "Title" or name.startswith("Heading")))
    return found
