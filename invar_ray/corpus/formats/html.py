"""HTML files.  The only file that imports lxml.

lxml's HTML parser knows no entity declarations, loads nothing from the network and stops at a depth
of 256: an HTML file cannot expand.
"""

from __future__ import annotations

import re

from lxml import etree

from invar_ray.corpus.formats.parsed import Parsed, clean_text, one_line
from invar_ray.errors import DataError
from invar_ray.schema import Place

_SKIPPED = frozenset(
    "script style template noscript svg math iframe object nav button select head".split()
)
_BLOCKS = frozenset(
    """address article aside blockquote body caption center dd details dialog div dl dt fieldset figcaption figure
    footer form h1 h2 h3 h4 h5 h6 header hr html legend li main ol p section summary table tbody tfoot thead tr
    ul""".split()
)
_HEADINGS = frozenset("h1 h2 h3 h4 h5 h6".split())
_DECLARED = re.compile(rb"<meta[^>]+charset\s*=|<\?xml[^>]+encoding\s*=", re.IGNORECASE)


def parse_html(data: bytes, place: str) -> Parsed:
    """The visible text of a page: blocks apart by an empty line, cells of a row by a bar; no
    scripts, no navigation.

    Its title is ``<title>``, else the first heading; its places are its headings.

    Raises:
        DataError: it is no HTML.
    """
    if b"\x00" in data[:65536] and data[:2] not in {b"\xff\xfe", b"\xfe\xff"}:
        raise DataError(
            f"{place} is not HTML, it holds zero bytes (a binary file)", action="remove it"
        )
    parser = etree.HTMLParser(
        encoding=_encoding(data), remove_comments=True, remove_pis=True, no_network=True
    )
    try:
        root = etree.fromstring(data, parser)
    except (etree.LxmlError, ValueError, LookupError) as error:
        raise DataError(
            f"{place} cannot be read as HTML ({one_line(str(error))[:120]})", action="save it again"
        ) from error
    if root is None:
        return Parsed("", "")
    named = root.find(".//title")
    title = one_line("".join(named.itertext())) if named is not None else ""
    writer = _Writer()
    _walk(root, writer)
    writer.close()
    headings = [place for place in writer.places if place.label]
    return Parsed(
        title or (headings[0].label if headings else ""),
        writer.text,
        tuple(Place(heading.start, f'"{heading.label}"') for heading in headings),
    )


def _encoding(data: bytes) -> str | None:
    """UTF-8 where the bytes are that, else what the page declares (``None``), else Windows-1252 as
    browsers do.
    """
    if data[:2] in {b"\xff\xfe", b"\xfe\xff"}:
        return "utf-16"
    try:
        data.decode("utf-8")
        return "utf-8"
    except UnicodeDecodeError:
        return None if _DECLARED.search(data[:4096]) else "windows-1252"


class _Writer:
    """Collects blocks of text and where the headings among them start."""

    def __init__(self) -> None:
        self.places: list[Place] = []
        self._blocks: list[str] = []
        self._line: list[str] = []
        self._length = 0
        self._heading = False

    @property
    def text(self) -> str:
        return "\n\n".join(self._blocks)

    def write(self, text: str | None) -> None:
        if text:
            self._line.append(text)

    def heading(self, starts: bool) -> None:
        self.close()
        self._heading = starts

    def close(self) -> None:
        """End of a block."""
        text = one_line("".join(self._line))
        self._line = []
        if not text.strip("|- "):
            return
        if self._heading:
            self.places.append(Place(self._length, text))
        self._blocks.append(text)
        self._length += len(text) + 2

    def preformatted(self, text: str) -> None:
        """A block whose lines stay."""
        self.close()
        kept = clean_text(text).strip("\n").rstrip()
        if kept.strip():
            self._blocks.append(kept)
            self._length += len(kept) + 2


def _walk(root: etree._Element, writer: _Writer) -> None:
    skipping = preformatted = 0
    for event, element in etree.iterwalk(root, events=("start", "end")):
        tag = element.tag if isinstance(element.tag, str) else ""
        if event == "start":
            if skipping or tag in _SKIPPED or element.get("hidden") is not None:
                skipping += 1
            elif preformatted or tag == "pre":
                preformatted += 1
                if preformatted == 1:
                    writer.preformatted("".join(element.itertext()))
            else:
                _open(tag, element, writer)
            continue
        if skipping:
            skipping -= 1
        elif preformatted:
            preformatted -= 1
        elif tag in _HEADINGS:
            writer.heading(False)
        elif tag in _BLOCKS:
            writer.close()
        if not skipping and not preformatted:
            writer.write(element.tail)


def _open(tag: str, element: etree._Element, writer: _Writer) -> None:
    if tag in _HEADINGS:
        writer.heading(True)
    elif tag in _BLOCKS:
        writer.close()
    elif tag in {"td", "th"} and element.getprevious() is not None:
        writer.write(" | ")
    elif tag in {"br", "wbr"}:
        writer.write(" ")
    if tag == "img":
        writer.write(element.get("alt"))
    writer.write(element.text)
