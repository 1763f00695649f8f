"""Text and Markdown: the text is the file's, so that lines are places; Markdown's headings are
too.
"""

from __future__ import annotations

import re

from invar_ray.corpus.formats.parsed import Parsed, one_line
from invar_ray.errors import DataError
from invar_ray.schema import Place

_HEADING = re.compile(
    r"^ {0,3}#{1,6}[ \t]+(.+?)[ \t]*#*[ \t]*$|^(?=\S)([^\n]+)\n {0,3}(?:=+|-+)[ \t]*$", re.MULTILINE
)
_FENCED = re.compile(r"^ {0,3}(```|~~~).*?(?:^ {0,3}\1[^\n]*$|\Z)", re.MULTILINE | re.DOTALL)
_FRONT = re.compile(r"\A---[ \t]*\n(.*?)^---[ \t]*$", re.MULTILINE | re.DOTALL)
_FRONT_TITLE = re.compile(r"^title:[ \t]*([\"']?)(.+?)\1[ \t]*$", re.MULTILINE)
_BYTE_ORDER_MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


def parse_text(data: bytes, place: str) -> Parsed:
    """A text file: UTF-8, or UTF-16 with a byte order mark.  It has no title of its own."""
    return Parsed("", _decoded(data, place), unit="line")


def parse_markdown(data: bytes, place: str) -> Parsed:
    """A Markdown file.  Its title is the front matter's, else the first heading.  Markup stays in
    the text.
    """
    text = _decoded(data, place)
    front = _FRONT.match(text)
    # Blanked, not removed, so that offsets stay: "# ..." in a code block is a comment, and "---"
    # under front matter no underline.
    visible = _FENCED.sub(_blanked, _FRONT.sub(_blanked, text))
    headings = [
        Place(match.start(), one_line(next(filter(None, match.groups()))))
        for match in _HEADING.finditer(visible)
    ]  # fmt: skip
    titled = front and _FRONT_TITLE.search(front.group(1))
    title = one_line(titled.group(2)) if titled else headings[0].label if headings else ""
    return Parsed(
        title,
        text,
        tuple(Place(start.start, f'"{start.label}"') for start in headings),
        unit="line",
    )


def _decoded(data: bytes, place: str) -> str:
    encoding = _BYTE_ORDER_MARKS.get(data[:2], "utf-8-sig")
    if encoding == "utf-8-sig" and b"\x00" in data[:65536]:
        raise DataError(
            f"{place} is not text, it holds zero bytes (a binary file)",
            action="remove it, or give it its true ending",
        )
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place} is not {encoding.removesuffix('-sig').upper()} text "
            f"(byte {data[error.start]:#04x} at offset {error.start})",
            action="convert it to UTF-8 (such as: iconv -f latin1 -t utf-8)",
        ) from error
    return text.replace("\x00", "\ufffd")


def _blanked(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match.group())
