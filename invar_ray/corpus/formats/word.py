"""Word files (.docx).  The only file that imports docx (python-docx).

A .docx is a zip of XML.  python-docx resolves no entities and lxml keeps its limits on depth and
text size.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import docx
from docx.oxml import parse_xml
from docx.oxml.ns import qn

from invar_ray.corpus.formats.encodings import decoded
from invar_ray.corpus.formats.parsed import (
    Parsed,
    check_zip,
    drawing_lines,
    local_name,
    office_children,
    one_line,
    table_lines,
)
from invar_ray.errors import DataError
from invar_ray.schema import Place

_OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
# What wraps text without being part of it: content controls, insertions, smart tags ..
_DROPPED = frozenset("del moveFrom rPr pPr rt instrText delText sectPr tblPr tblGrid".split())
_DIAGRAM = "{http://schemas.openxmlformats.org/officeDocument/2006/relationships}dm"
_SPACES = {"tab": " ", "br": " ", "cr": " ", "noBreakHyphen": "-", "ptab": " "}


def parse_docx(data: bytes, place: str, max_bytes: int, *, within: bool = False) -> Parsed:
    """The text of a Word file: paragraphs and, as one paragraph each, the rows of tables, in
    reading order; text boxes, diagrams and charts after their paragraph, footnotes at the end.

    The XML is walked, so that what wraps text (content controls, tracked insertions, smart tags,
    nested tables, files within the file) loses none of it.  Places are headings; paragraphs (those
    that hold text) are counted from 1.  Deletions, hidden text, headers, footers and comments are
    left out.

    Args:
        data: the file.
        place: its name, for messages.
        max_bytes: the largest file that is read; it also bounds what the file may unpack to, and
            the text of the files within it.
        within: it stands within another one; Word files within it are not read.

    Raises:
        DataError: it is encrypted, damaged, no Word file, holds no text, or unpacks to too much.
    """
    if data.startswith(_OLE):
        raise DataError(
            f"{place} is encrypted, or an old .doc file under a new name",
            action="save it as .docx without a password",
        )
    try:
        check_zip(data, place, max_bytes)
        document = docx.Document(io.BytesIO(data))
        paragraphs, unread = _paragraphs(document, _inner_files(place, max_bytes, within))
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
    whole = "\n\n".join(text for text, _ in paragraphs)
    note = f"{place}: {unread} files within it are not read" if unread else ""
    return Parsed(title, whole, tuple(places), unit="paragraph", note=note)


def _paragraphs(
    document: docx.document.Document, text_of: Callable[[Any], str | None]
) -> tuple[list[tuple[str, bool]], int]:
    """Text and whether it is a heading, of each paragraph that holds text; how many files within
    the file could not be read.
    """
    names = {style.style_id: style.name or "" for style in document.styles}
    walk = _Walk(names, document.part, text_of)
    walk.blocks(document.element.body)
    for relation in document.part.rels.values():
        if not relation.is_external and relation.reltype.endswith(("/footnotes", "/endnotes")):
            for note in parse_xml(relation.target_part.blob):
                if note.get(qn("w:type")) is None:  # not the line above the notes
                    walk.blocks(note)
    return [(text, is_heading) for text, is_heading in walk.found if text], walk.unread


def _inner_files(place: str, max_bytes: int, within: bool) -> Callable[[Any], str | None]:
    """Reads the files within a Word file, each once however often it stands in the text: a few
    kilobytes that name themselves a thousand times would fill any memory.
    """
    known: dict[str, str | None] = {}
    length = 0

    def text_of(part: Any) -> str | None:
        nonlocal length
        name = str(part.partname)
        if name not in known:
            known[name] = _inner_text(part, place, max_bytes, within)
        length += len(known[name] or "")
        if length > max_bytes:
            raise DataError(
                f"{place}: the files within it hold more than {max_bytes / 2**20:g} MB of text",
                action="split it, or raise corpus.max_file_mb",
            )
        return known[name]

    return text_of


def _inner_text(part: Any, place: str, max_bytes: int, within: bool) -> str | None:
    """The text of a file that stands within a Word file as a part of its text; ``None`` if it is of
    a kind that is not read.
    """
    kind = part.content_type
    if "html" in kind:
        from invar_ray.corpus.formats.html import parse_html  # only when such a file comes

        return parse_html(part.blob, place).text
    if "wordprocessingml" in kind:
        return None if within else parse_docx(part.blob, place, max_bytes, within=True).text
    return decoded(part.blob, place)[0] if kind == "text/plain" else None


class _Walk:
    """Collects paragraphs from the XML of a Word file."""

    def __init__(
        self, style_names: dict[str, str], part: Any, text_of: Callable[[Any], str | None]
    ) -> None:
        self.found: list[tuple[str, bool]] = []
        self.unread = 0
        self._names = style_names
        self._part = part
        self._text_of = text_of
        self._joined = ""

    def blocks(self, parent: Any) -> None:
        """Paragraphs and tables below an element, whatever they are wrapped in."""
        for child in office_children(parent):
            name = local_name(child)
            if name == "p":
                text = f"{self._joined}{self._text(child)}"
                self._joined = ""
                if child.find(f"{qn('w:pPr')}/{qn('w:rPr')}/{qn('w:del')}") is not None:
                    self._joined = text  # its end is deleted: the next one goes on with it
                    continue
                self.found.append((one_line(text), self._is_heading(child)))
                self.found += [(line, False) for line in self._drawn(child)]
                for box in self._boxes(child):
                    self.blocks(box)
            elif name == "tbl":
                rows, header = self._rows(child)
                self.found += [(line, False) for _, line in table_lines(rows, header=header)]
            elif name == "altChunk":
                inner = self._text_of(self._part.related_parts[child.get(qn("r:id"))])
                self.unread += inner is None
                self.found += [(one_line(block), False) for block in (inner or "").split("\n\n")]
            elif name not in _DROPPED:
                self.blocks(child)

    def _drawn(self, paragraph: Any) -> Iterator[str]:
        """The text of the diagrams and charts of a paragraph, which are parts of their own."""
        for element in paragraph.iter():
            name = local_name(element)
            id = element.get(qn("r:id") if name == "chart" else _DIAGRAM)
            if name in {"chart", "relIds"} and id in self._part.related_parts:
                yield from drawing_lines(parse_xml(self._part.related_parts[id].blob))

    def _text(self, element: Any) -> str:
        """The text of runs below an element, without that of text boxes."""
        parts: list[str] = []
        for child in office_children(element):
            name = local_name(child)
            if name == "t":
                parts.append(child.text or "")
            elif name in _SPACES:
                parts.append(_SPACES[name])
            elif name == "textpath":  # text along a line
                parts.append(child.get("string") or "")
            elif name == "ddList":  # a list to choose from, of an old form
                chosen = child.find(qn("w:result"))
                entries = child.findall(qn("w:listEntry"))
                at = int(chosen.get(qn("w:val"), 0)) if chosen is not None else 0
                parts += [each.get(qn("w:val")) or "" for each in entries[at : at + 1]]
            elif name not in _DROPPED and name != "txbxContent" and not _is_hidden(child):
                parts.append(self._text(child))
        return "".join(parts)

    def _boxes(self, element: Any) -> Iterator[Any]:
        for child in office_children(element):
            if local_name(child) == "txbxContent":
                yield child
            elif local_name(child) not in _DROPPED:
                yield from self._boxes(child)

    def _is_heading(self, paragraph: Any) -> bool:
        style = paragraph.find(f"{qn('w:pPr')}/{qn('w:pStyle')}")
        name = self._names.get(style.get(qn("w:val")), "") if style is not None else ""
        return name == "Title" or name.lower().startswith("heading")

    def _rows(self, table: Any) -> tuple[list[list[str]], bool | None]:
        """The cells of a table, one that spans rows in each of them; and whether its first row is
        marked as names of the columns (``None`` if not).
        """
        rows: list[list[str]] = []
        above: dict[int, str] = {}
        header = None
        for row in _within(table, "tr"):
            marks = row.find(qn("w:trPr"))
            if marks is not None and marks.find(qn("w:del")) is not None:
                continue
            if not rows and marks is not None and marks.find(qn("w:tblHeader")) is not None:
                header = True
            cells, column = [], 0
            for cell in _within(row, "tc"):
                inside = _Walk(self._names, self._part, self._text_of)
                inside.blocks(cell)
                self.unread += inside.unread
                text = one_line(" ".join(text for text, _ in inside.found))
                span, merge = (
                    cell.find(f"{qn('w:tcPr')}/{qn(name)}") for name in ("w:gridSpan", "w:vMerge")
                )
                if merge is not None and merge.get(qn("w:val")) != "restart":
                    text = text or above.get(column, "")
                above[column] = text
                cells.append(text)
                column += int(span.get(qn("w:val"), 1)) if span is not None else 1
            rows.append(cells)
        return rows, header


def _within(parent: Any, name: str) -> Iterator[Any]:
    """The nearest elements of that name below an element, whatever they are wrapped in."""
    for child in office_children(parent):
        if local_name(child) == name:
            yield child
        elif local_name(child) not in _DROPPED | {"tbl", "tcPr", "trPr"}:
            yield from _within(child, name)


def _is_hidden(run: Any) -> bool:
    mark = run.find(f"{qn('w:rPr')}/{qn('w:vanish')}") if local_name(run) == "r" else None
    return mark is not None and mark.get(qn("w:val")) not in {"0", "false"}
