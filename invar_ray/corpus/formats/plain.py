"""Text and what is nearly text.

Of text, Markdown, reStructuredText and source code the text is the file's, so that lines are
places; headings are too.  Tables, JSON and notebooks become text, an entry a paragraph.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from typing import Any

from invar_ray.corpus.formats.encodings import decoded, visible
from invar_ray.corpus.formats.parsed import Parsed, clean_text, joined, one_line, table_lines
from invar_ray.errors import DataError
from invar_ray.schema import Place

_HEADING = re.compile(
    r"^ {0,3}#{1,6}[ \t]+(.+?)[ \t]*#*[ \t]*$|^(?=\S)([^\n]+)\n {0,3}(?:=+|-+)[ \t]*$", re.MULTILINE
)
_UNDERLINED = re.compile(
    r"^(?=\S)(?!([^\w\s])\1+[ \t]*$)([^\n]+)\n([=\-~^\"'`#*+.:_<>])\3{2,}[ \t]*$", re.MULTILINE
)
_FENCED = re.compile(r"^ {0,3}(```|~~~).*?(?:^ {0,3}\1[^\n]*$|\Z)", re.MULTILINE | re.DOTALL)
_FRONT = re.compile(r"\A---[ \t]*\n(.*?)^---[ \t]*$", re.MULTILINE | re.DOTALL)
_FRONT_TITLE = re.compile(r"^title:[ \t]*([\"']?)(.+?)\1[ \t]*$", re.MULTILINE)
_SEPARATOR = re.compile(r"sep=([,;\t|])\r?\n")  # Excel's first line
_OBJECT = re.compile(r"\s*<[^<>]*>\s*$")  # Python's name for an object: it says nothing
_MAX_DEPTH = 50


def parse_text(data: bytes, place: str) -> Parsed:
    """A text file (see :func:`decoded`).  It has no title of its own."""
    text, note = decoded(data, place)
    return Parsed("", text, unit="line", note=note)


def parse_markdown(data: bytes, place: str) -> Parsed:
    """A Markdown file.  Its title is the front matter's, else the first heading.  Markup stays in
    the text.
    """
    text, note = decoded(data, place)
    front = _FRONT.match(text)
    # Blanked, not removed, so that offsets stay: "# ..." in a code block is a comment, and "---"
    # under front matter no underline.
    visible = _FENCED.sub(_blanked, _FRONT.sub(_blanked, text))
    headings = [
        Place(match.start(), one_line(next(filter(None, match.groups()))))
        for match in _HEADING.finditer(visible)
    ]
    titled = front and _FRONT_TITLE.search(front.group(1))
    title = one_line(titled.group(2)) if titled else headings[0].label if headings else ""
    return Parsed(title, text, _quoted(headings), unit="line", note=note)


def parse_restructured(data: bytes, place: str) -> Parsed:
    """A reStructuredText file: underlined lines are its headings, the first one its title."""
    text, note = decoded(data, place)
    headings = [
        Place(match.start(), one_line(match.group(2))) for match in _UNDERLINED.finditer(text)
    ]
    title = headings[0].label if headings else ""
    return Parsed(title, text, _quoted(headings), unit="line", note=note)


def parse_csv(data: bytes, place: str, parted_by: str | None = None) -> Parsed:
    """A CSV table: each row is a paragraph, its values beside the names of their columns.

    Args:
        data: the file.
        place: its name, for messages.
        parted_by: what parts the cells; ``None`` finds out.

    Raises:
        DataError: it is no table.
    """
    text, note = decoded(data, place)
    try:
        rows = csv_rows(text, parted_by)
    except csv.Error as error:
        raise DataError(
            f"{place} cannot be read as CSV ({error})", action="write it again"
        ) from error
    lines = table_lines(rows, header=True)
    return Parsed("", "\n\n".join(line for _, line in lines), unit="row", note=note)


def csv_rows(text: str, parted_by: str | None = None) -> list[list[str]]:
    """The rows of a CSV text, whatever parts its cells (comma, semicolon, tab or bar)."""
    named = _SEPARATOR.match(text)
    text = text[named.end() :] if named else text
    try:
        dialect: Any = csv.Sniffer().sniff(
            text[:20_000], delimiters=parted_by or (named.group(1) if named else ",;\t|")
        )
    except csv.Error:
        dialect = csv.excel_tab if parted_by == "\t" else csv.excel
    limit = csv.field_size_limit(max(len(text), 1))
    try:
        return [row for row in csv.reader(io.StringIO(text), dialect) if any(map(str.strip, row))]
    finally:
        csv.field_size_limit(limit)


def parse_json(data: bytes, place: str) -> Parsed:
    """A JSON file: each entry of a list (each member of an object) is a paragraph of lines
    ``name: value``.

    Raises:
        DataError: it is no JSON, or nested deeper than 50.
    """
    value, note = _json(data, place)
    if isinstance(value, dict):
        value = [{name: each} for name, each in value.items()]
    entries = value if isinstance(value, list) else [value]
    texts = ["\n".join(_leaves(each, place)) for each in entries]
    return Parsed("", "\n\n".join(filter(None, texts)), unit="item", note=note)


def parse_notebook(data: bytes, place: str) -> Parsed:
    """A Jupyter notebook: its cells, with the text of what they print.  Places are cells.

    Raises:
        DataError: it is no notebook.
    """
    value, note = _json(data, place)
    cells = value.get("cells") if isinstance(value, dict) else None
    if cells is None and isinstance(value, dict):  # before version 4
        cells = [cell for sheet in value.get("worksheets", []) for cell in sheet.get("cells", [])]
    if not isinstance(cells, list):
        raise DataError(f"{place} is no notebook (it has no cells)", action="save it again")
    pieces, title = [], ""
    for number, cell in enumerate(cells, start=1):
        cell = cell if isinstance(cell, dict) else {}
        source = _lines(cell.get("source", cell.get("input")))
        if not title and cell.get("cell_type") == "markdown":
            heading = _HEADING.search(source)
            title = one_line(next(filter(None, heading.groups()))) if heading else ""
        printed = [_printed(output) for output in cell.get("outputs") or []]
        pieces.append((f"cell {number}", "\n".join(filter(str.strip, [source, *printed]))))
    text, places = joined(pieces)
    return Parsed(title, text, places, note=note)


def _json(data: bytes, place: str) -> tuple[Any, str]:
    text, note = decoded(data, place)
    try:
        return json.loads(text), note
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines under another name
            lines = [line for line in text.splitlines() if line.strip()]
            try:
                return [json.loads(line) for line in lines], note
            except (json.JSONDecodeError, RecursionError):
                pass
        raise DataError(
            f"{place}, line {error.lineno}: malformed JSON ({error.msg})", action="mend the file"
        ) from error
    except RecursionError as error:
        raise DataError(f"{place}: JSON nested too deep", action="flatten it") from error


def _leaves(value: Any, place: str, name: str = "", depth: int = 0) -> Iterator[str]:
    if depth > _MAX_DEPTH:
        raise DataError(f"{place}: JSON nested too deep", action="flatten it")
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _leaves(each, place, f"{name}.{key}" if name else str(key), depth + 1)
    elif isinstance(value, list):
        if value and not any(isinstance(each, dict | list) for each in value):
            value = ", ".join(str(each) for each in value)
            yield f"{name}: {value}" if name else value
        else:
            for each in value:
                yield from _leaves(each, place, name, depth + 1)
    elif value is not None and str(value).strip():
        text = clean_text("\n".join(line for line in str(value).splitlines() if line.strip()))
        yield f"{name}: {text}" if name else text


def _lines(value: Any) -> str:
    """A notebook's text, which is a string or a list of lines."""
    parts = value if isinstance(value, list) else [value]
    return visible("".join(part for part in parts if isinstance(part, str)))


def _printed(output: Any) -> str:
    """What a cell put out: its text, or what stands for it where there is none."""
    if not isinstance(output, dict):
        return ""
    if output.get("output_type") in {"error", "pyerr"}:
        return _lines(f"{output.get('ename') or ''}: {output.get('evalue') or ''}")
    data = output.get("data")
    forms = data if isinstance(data, dict) else {}
    text = _lines(output.get("text") or forms.get("text/plain") or forms.get("text/markdown"))
    page = _lines(forms.get("text/html"))
    if not page.strip() or (text.strip() and not _OBJECT.match(text)):
        return text
    from invar_ray.corpus.formats.html import parse_html  # lxml, only when such an output comes

    return parse_html(page.encode(), "output").text or text


def _quoted(headings: list[Place]) -> tuple[Place, ...]:
    return tuple(Place(heading.start, f'"{heading.label}"') for heading in headings)


def _blanked(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match.group())
