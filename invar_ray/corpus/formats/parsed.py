"""What every parser returns, and how foreign text is made safe to store."""

from __future__ import annotations

import io
import unicodedata
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from invar_ray.errors import DataError
from invar_ray.schema import Place

_MAX_PARTS = 10_000
_XML_TIMES, _ALL_TIMES = 2, 8
"""How much larger than the largest file the XML parts of a zip, and all its parts (pictures too),
may unpack. [ours]
"""
_NAME_CHARS = 40  # longest name of a column, where nothing says that it is one
# Soft hyphen, zero width space, marks of direction, word joiner, byte order mark; joiners that
# shape letters stay.
_INVISIBLE: dict[int, str | None] = dict.fromkeys(
    (0xAD, 0x200B, 0x200E, 0x200F, 0x2060, 0xFEFF), None
) | {0: "\ufffd"}


@dataclass(frozen=True, slots=True)
class Parsed:
    """A file as text.

    Attributes:
        title: from the file itself; empty where it has none.
        text: the whole text; blank where the file holds none.
        places: pages or headings, ascending by offset into ``text``.
        unit: see :class:`invar_ray.schema.Document`.
        note: what of the file could not be read; empty if nothing.
    """

    title: str
    text: str
    places: tuple[Place, ...] = ()
    unit: str = ""
    note: str = ""


def clean_text(text: str) -> str:
    """``text`` as UTF-8 can hold it, in NFC and without soft hyphens and zero width spaces: halves
    of surrogate pairs are joined, lone ones and NULs become U+FFFD.
    """
    if text.isascii():
        return text.replace("\x00", "\ufffd")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return unicodedata.normalize("NFC", text.translate(_INVISIBLE))


def one_line(text: str) -> str:
    """Runs of white space as single spaces: for titles and labels."""
    return " ".join(clean_text(text).split())


def joined(pieces: Iterable[tuple[str, str]]) -> tuple[str, tuple[Place, ...]]:
    """Pieces of text, each with the name of its place, as one text with an empty line between;
    blank ones go.
    """
    texts: list[str] = []
    places: list[Place] = []
    length = 0
    for name, text in pieces:
        text = text.strip()
        if not text:
            continue
        if not places or places[-1].label != name:
            places.append(Place(length, name))
        texts.append(text)
        length += len(text) + 2
    return "\n\n".join(texts), tuple(places)


def table_lines(
    rows: Sequence[Sequence[str]], *, header: bool | None = None
) -> list[tuple[int, str]]:
    """The rows of a table as text, numbered from 1: ``name: value | name: value`` where the first
    row names the columns, so that a row cut from its table can still be read; else ``value | ..``.

    Args:
        rows: cells; those of a row may be fewer than of another.
        header: whether the first row names the columns; ``None`` judges it: at least three rows of
            two columns, and its cells are short, all different, none empty and none a number.
    """
    cells = [[one_line(cell) for cell in row] for row in rows]
    if header is None:
        header = len(cells) >= 3 and _is_header(cells[0])
    names = cells[0] if header and cells else []
    lines = []
    for number, row in enumerate(cells, start=1):
        if number == 1 or not names:
            kept = [cell for cell in row if cell]
        else:
            named = [*names, *[""] * len(row)]
            kept = [
                f"{name}: {cell}" if name and name != cell else cell
                for name, cell in zip(named, row, strict=False)
                if cell
            ]
        if kept:
            lines.append((number, " | ".join(kept)))
    return lines


def _is_header(row: Sequence[str]) -> bool:
    return (
        len(row) >= 2
        and len(set(row)) == len(row)
        and all(0 < len(cell) <= _NAME_CHARS and not any(map(str.isdigit, cell)) for cell in row)
    )


def check_zip(data: bytes, place: str, max_bytes: int) -> None:
    """Refuse a zip of XML (Word, a book ..) whose directory announces too much, before anything is
    unpacked (zipfile reads no more than announced).

    Raises:
        DataError: so it does.
        zipfile.BadZipFile: it is no zip.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        parts = archive.infolist()
    texts = (".xml", ".rels", ".xhtml", ".html", ".htm", ".opf", ".ncx")
    xml = sum(part.file_size for part in parts if part.filename.lower().endswith(texts))
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


def local_name(element: Any) -> str:
    """The name of an XML element without its namespace; empty for comments and the like."""
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""


def office_children(element: Any) -> Iterator[Any]:
    """The elements below one of an Office file; of several forms of the same content (new programs
    write an older one beside it) the first that holds text.
    """
    for child in element:
        if local_name(child) != "AlternateContent":
            yield child
            continue
        for form in child:
            if any(local_name(each) == "t" and each.text for each in form.iter()):
                yield form
                break


def drawing_lines(root: Any) -> list[str]:
    """The text of a diagram or a chart of an Office file: paragraphs in its order, a chart's
    numbers as the rows of a table.

    Args:
        root: of the drawing's own XML.
    """
    texts = (
        "".join(each.text or "" for each in paragraph.iter() if local_name(each) == "t")
        for paragraph in root.iter()
        if local_name(paragraph) == "p"
    )
    lines = [line for line in map(one_line, texts) if line]
    series = [each for each in root.iter() if local_name(each) == "ser"]
    names = ["".join(_points(each, "tx").values()) for each in series]
    points = [_points(each, "val", "yVal") for each in series]
    labels = _points(series[0], "cat", "xVal") if series else {}
    rows = [["", *names]]
    for at in sorted({at for each in (labels, *points) for at in each}, key=int):
        rows.append([labels.get(at, ""), *(each.get(at, "") for each in points)])
    return lines + [line for _, line in table_lines(rows, header=True)]


def _points(series: Any, *parts: str) -> dict[str, str]:
    """The points of a part of a chart's series, by number."""
    return {
        point.get("idx", "0"): one_line("".join(point.itertext()))
        for part in series
        if local_name(part) in parts
        for point in part.iter()
        if local_name(point) == "pt"
    }
