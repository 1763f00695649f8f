"""Web pages, XML and EPUB books.  The only file that imports lxml.

lxml's HTML parser knows no entity declarations, loads nothing from the network and stops at a depth
of 256: an HTML file cannot expand.
"""

from __future__ import annotations

import codecs
import io
import posixpath
import re
import zipfile
from collections.abc import Iterator
from urllib.parse import unquote

from lxml import etree

from invar_ray.corpus.formats.encodings import decoded
from invar_ray.corpus.formats.parsed import (
    Parsed,
    check_zip,
    clean_text,
    one_line,
    table_lines,
)
from invar_ray.errors import DataError
from invar_ray.schema import Place

_SKIPPED = frozenset(
    """script style template noscript object nav button select textarea head title desc metadata
    annotation annotation-xml""".split()
)
_BLOCKS = frozenset(
    """address article aside blockquote body caption center dd details dialog div dl dt fieldset figcaption figure
    footer form h1 h2 h3 h4 h5 h6 header hr html legend li main ol p section summary table tbody text tfoot thead
    tr ul""".split()
)
_XML_BLOCKS = _BLOCKS | frozenset("sec title para item list row entry cell lb br l lg".split())
_ROLES = frozenset("navigation menu menubar search toolbar".split())
_PILCROWS = frozenset({"¶", "#", "§", "\U0001f517", "\uf0c1"})
_HIDDEN_STYLE = re.compile(
    r"display\s*:\s*none\b(?!-)|visibility\s*:\s*(hidden|collapse)\b|opacity\s*:\s*0?\.?0*\s*(?=[;!]|$)|"
    r"font-size\s*:\s*0[a-z]*\s*(?=[;!]|$)|mso-hide\s*:\s*all",
    re.IGNORECASE,
)
_SIMPLE_SELECTOR = re.compile(r"(?:\w+)?([.#][\w-]+)$")
_HEADINGS = frozenset("h1 h2 h3 h4 h5 h6".split())
_DECLARED = re.compile(
    rb"<(?:meta[^>]+charset|\?xml[^>]+encoding)\s*=\s*[\"']?([\w.:-]+)", re.IGNORECASE
)
# Names that browsers take for a larger encoding (WHATWG's Encoding Standard).
_LARGER = {
    "ascii": "cp1252",
    "iso8859-1": "cp1252",
    "iso8859-9": "cp1254",
    "tis-620": "cp874",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
}
_DEFAULT = "cp1252"  # what browsers take a page for that declares nothing
# Python's, and no page's: some take minutes for what is not theirs.
_NO_CHARSETS = frozenset("punycode idna unicode-escape raw-unicode-escape utf-7".split())
_MAX_FRAMES = 4  # pages within pages within pages. [ours]
_BETWEEN = {"mfrac": "/", "msup": "^", "msub": "_"}  # MathML: between the parts of such an element
_PROSE_CHARS = 200  # more of it in paragraphs, and <nav> holds more than navigation. [ours]


def parse_html(data: bytes, place: str, frames: int = _MAX_FRAMES) -> Parsed:
    """The visible text of a page: blocks apart by an empty line, cells of a row by a bar, beside
    the names of their columns; no scripts, navigation, menus, or what is hidden by attribute or
    style.

    Its title is ``<title>``, else the first heading; its places are its headings.

    Args:
        data: the file.
        place: its name, for messages.
        frames: how deep pages within it are read.

    Raises:
        DataError: it is no HTML.
    """
    text, note = _decoded(data, place)
    parser = etree.HTMLParser(
        encoding="utf-8", remove_comments=True, remove_pis=True, no_network=True
    )
    try:
        root = etree.fromstring(text.encode("utf-8", "replace"), parser)
    except (etree.LxmlError, ValueError, LookupError) as error:
        raise DataError(
            f"{place} cannot be read as HTML ({one_line(str(error))[:120]})", action="save it again"
        ) from error
    if root is None:
        return Parsed("", "")
    titles = (one_line("".join(each.itertext())) for each in root.iterfind(".//head/title"))
    title = next(titles, "")
    writer = _Writer()
    _walk(root, writer, _hidden_names(root), frames)
    writer.close()
    headings = [place for place in writer.places if place.label]
    return Parsed(
        title or (headings[0].label if headings else ""),
        writer.text,
        tuple(Place(heading.start, f'"{heading.label}"') for heading in headings),
        note=note,
    )


def _decoded(data: bytes, place: str) -> tuple[str, str]:
    """A page's text, and a note if its encoding was guessed: UTF-8 where the bytes are that, else
    what the page declares if they are that, else a guess.
    """
    if data[:2] in {b"\xff\xfe", b"\xfe\xff"} or data[:4] == b"\x00\x00\xfe\xff":
        return decoded(data, place)
    declared = _DECLARED.search(data[:4096])
    for name in ("utf-8-sig", declared.group(1).decode() if declared else ""):
        if not name or b"\x00" in data[:65536]:
            continue
        try:
            known = codecs.lookup(name).name
            if known in _NO_CHARSETS:
                continue
            return data.decode(_LARGER.get(known, known)), ""
        except (LookupError, ValueError):
            continue
    text, note = decoded(data, place)
    return text, "" if f"read as {_DEFAULT} " in note else note


def _hidden_names(root: etree._Element) -> frozenset[str]:
    """The classes (``.x``) and ids (``#x``) that the page's own style hides, and no other of its
    rules shows, as those of tabs do.
    """
    hidden, shown = set(), set()
    sheets = "\n".join("".join(style.itertext()) for style in root.iter("style"))
    for selectors, style in _rules(sheets):
        for selector in map(str.strip, selectors.split(",")):
            simple = _SIMPLE_SELECTOR.match(selector)
            if _HIDDEN_STYLE.search(style):
                hidden |= {simple.group(1)} if simple else set()
            elif re.search(r"display|visibility|opacity", style):
                shown |= set(re.findall(r"[.#][\w-]+", selector))
    return frozenset(hidden - shown)


def _rules(sheet: str) -> Iterator[tuple[str, str]]:
    """Selectors and declarations of a style sheet's rules, without those inside others (``@media
    print`` ..): in one pass, since a hostile sheet may be megabytes of anything.
    """
    first, *rest = sheet.split("/*")
    sheet = first + "".join(part.partition("*/")[2] for part in rest)
    depth = start = 0
    selectors = ""
    for brace in re.finditer("[{}]", sheet):
        text, start = sheet[start : brace.start()], brace.end()
        if brace.group() == "{":
            if depth == 0:
                selectors = text.rpartition(";")[2].strip()  # behind "@import ..;"
            depth += 1
            continue
        if depth == 1 and not selectors.startswith("@"):
            yield selectors, text
        depth = max(0, depth - 1)


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


def _walk(root: etree._Element, writer: _Writer, names: frozenset[str], frames: int) -> None:
    skipping = preformatted = 0
    for event, element in etree.iterwalk(root, events=("start", "end")):
        tag = element.tag if isinstance(element.tag, str) else ""
        if event == "start":
            if skipping or _is_hidden(tag, element, names):
                skipping += 1
            elif tag == "iframe":  # a page within the page; what stands between its marks is not
                for block in _inner(element, frames).split("\n\n"):
                    writer.close()
                    writer.write(block)
                writer.close()
                skipping += 1
            elif tag == "table" and not preformatted and (rows := _data_rows(element, names)):
                lines = [line for _, line in table_lines(rows, header=_names_columns(element))]
                for line in [_caption(element, names), *lines]:
                    writer.close()
                    writer.write(line)
                writer.close()
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


def _is_hidden(tag: str, element: etree._Element, names: frozenset[str]) -> bool:
    if tag == "nav" and _holds_prose(element):
        return False
    if tag == "button" and any(True for _ in element.iterancestors("summary", "dt", *_HEADINGS)):
        return False  # what opens a section carries its name
    if tag == "template" and element.get("shadowrootmode") == "open":
        return False
    if tag in _SKIPPED or element.get("aria-hidden") == "true":
        return True
    if element.get("hidden", "until-found") != "until-found":
        return True
    if element.get("role", "").lower() in _ROLES or (
        tag == "dialog" and element.get("open") is None
    ):
        return True
    if tag == "a" and "".join(element.itertext()).strip() in _PILCROWS:
        return True  # the link beside a heading
    if names:
        own = {f".{name}" for name in element.get("class", "").split()} | {f"#{element.get('id')}"}
        if not own.isdisjoint(names):
            return True
    return _HIDDEN_STYLE.search(element.get("style", "")) is not None


def _holds_prose(nav: etree._Element) -> bool:
    """Whether it was never closed, or holds the page's text."""
    if any(True for _ in nav.iter("h1", "main", "article")):
        return True
    paragraphs = (
        len("".join(each.itertext())) - sum(len("".join(a.itertext())) for a in each.iter("a"))
        for each in nav.iter("p")
    )
    return sum(paragraphs) > _PROSE_CHARS


def _inner(frame: etree._Element, frames: int) -> str:
    page = frame.get("srcdoc", "")
    if frames == 0 or not page.strip():
        return ""
    return parse_html(page.encode("utf-8", "replace"), "srcdoc", frames - 1).text


def _caption(table: etree._Element, names: frozenset[str]) -> str:
    found = table.find("caption")
    hidden = found is None or _is_hidden("caption", found, names)
    return "" if hidden else one_line(_visible(found, names))


def _data_rows(table: etree._Element, names: frozenset[str]) -> list[list[str]]:
    """The cells of a table that holds data: none of a table within or around another, or one that
    lays out a page (it has headings, or its rows have one cell).
    """
    if table.find(".//table") is not None or any(True for _ in table.iterancestors("table")):
        return []
    if any(element.tag in _HEADINGS or element.tag == "pre" for element in table.iter()):
        return []
    rows = [
        [
            one_line(_visible(cell, names))
            for cell in row.iter("td", "th")  # whatever wraps it
            if not _is_hidden(cell.tag, cell, names)
        ]
        for row in table.iter("tr")
        if not any(_is_hidden(each.tag, each, names) for each in (row, row.getparent()))
    ]
    rows = [row for row in rows if any(row)]
    return rows if len(rows) > 1 and max(map(len, rows)) > 1 else []


def _names_columns(table: etree._Element) -> bool | None:
    """Whether the first row of a table is marked as the names of its columns (``None`` if not)."""
    first = table.find(".//tr")
    cells = [cell.tag for cell in first if cell.tag in {"td", "th"}] if first is not None else []
    return True if len(cells) > 1 and set(cells) == {"th"} else False if cells else None


def _visible(element: etree._Element, names: frozenset[str]) -> str:
    parts = [element.text or ""]
    for child in element:
        if isinstance(child.tag, str) and not _is_hidden(child.tag, child, names):
            space = " " if child.tag in _BLOCKS or child.tag == "br" else ""
            alt = child.get("alt") or "" if child.tag == "img" else ""
            mark = _mark_before(child)
            parts.append(f"{space}{mark}{alt}{_visible(child, names)}{space}")
        parts.append(child.tail or "")
    return "".join(parts)


def _mark_before(element: etree._Element) -> str:
    """The sign between an element and the one before it, in a formula."""
    above, before = element.getparent(), element.getprevious()
    return "" if above is None or before is None else _BETWEEN.get(above.tag, "")


def _open(tag: str, element: etree._Element, writer: _Writer) -> None:
    if tag in _HEADINGS:
        writer.heading(True)
    elif tag in _BLOCKS:
        writer.close()
    elif tag in {"td", "th"} and element.getprevious() is not None:
        writer.write(" | ")
    elif tag in {"br", "tspan"}:
        writer.write(" ")
    else:
        writer.write(_mark_before(element))
    if tag == "img":
        writer.write(element.get("alt"))
    writer.write(element.text)


def parse_xml(data: bytes, place: str) -> Parsed:
    """The text of an XML file: an element that holds text itself is a paragraph, with all below it.
    Its title is the first element ``title``; elements ``title`` and ``head`` are its places.

    Raises:
        DataError: it is no XML.
    """
    root = _xml(data, place)
    if _local(root) == "html":
        return parse_html(data, place)
    writer, title = _Writer(), ""
    waiting = [root]
    while waiting:
        element = waiting.pop()
        if not isinstance(element.tag, str):
            continue
        children = list(element)
        own = [element.text or "", *(child.tail or "" for child in children)]
        if any(map(str.strip, own)):
            is_heading = _local(element) in {"title", "head"}
            writer.heading(is_heading)
            text = one_line(_flat(element))
            title = title or (text if is_heading else "")
            writer.write(text)
            writer.close()
            writer.heading(False)
        else:
            waiting += reversed(children)
    writer.close()
    places = tuple(Place(heading.start, f'"{heading.label}"') for heading in writer.places)
    return Parsed(title, writer.text, places)


def _flat(element: etree._Element) -> str:
    """All text of an element, with spaces around what is a block of its own."""
    parts = [element.text or ""]
    for child in element:
        space = " " if _local(child) in _XML_BLOCKS else ""
        if isinstance(child.tag, str):
            parts += [space, _flat(child), space]
        parts.append(child.tail or "")
    return "".join(parts)


def parse_epub(data: bytes, place: str, max_bytes: int) -> Parsed:
    """The text of an EPUB book, its chapters in reading order.  Places are its headings.

    Raises:
        DataError: it is encrypted, damaged, no book, or unpacks to too much.
    """
    try:
        check_zip(data, place, max_bytes)
        with zipfile.ZipFile(io.BytesIO(data)) as book:
            names = book.namelist()
            if "META-INF/rights.xml" in names:
                raise DataError(f"{place} is encrypted", action="save it without protection")
            package = _xml(book.read("META-INF/container.xml"), place).find(".//{*}rootfile")
            folder = posixpath.dirname(package.get("full-path"))
            root = _xml(book.read(package.get("full-path")), place)
            items = {item.get("id"): item.get("href") for item in root.iterfind(".//{*}item")}
            chapters = [
                posixpath.normpath(posixpath.join(folder, unquote(items[each.get("idref")])))
                for each in root.iterfind(".//{*}spine/{*}itemref")
                if each.get("idref") in items
            ]
            parts = [parse_html(book.read(name), place) for name in chapters if name in names]
            named = root.find(".//{http://purl.org/dc/elements/1.1/}title")
    except DataError:
        raise
    except Exception as error:  # a damaged file makes zipfile and lxml raise nearly anything
        raise DataError(
            f"{place} cannot be read as EPUB ({type(error).__name__}: {one_line(str(error))[:120]})",
            action="save it again",
        ) from error
    texts, places, length = [], [], 0
    for part in parts:
        if part.text:
            places += [Place(length + each.start, each.label) for each in part.places]
            texts.append(part.text)
            length += len(part.text) + 2
    title = one_line("".join(named.itertext())) if named is not None else ""
    return Parsed(title, "\n\n".join(texts), tuple(places))


def _xml(data: bytes, place: str) -> etree._Element:
    parser = etree.XMLParser(
        resolve_entities=False, no_network=True, load_dtd=False, remove_comments=True, recover=True
    )
    try:
        root = etree.fromstring(data, parser)
    except (etree.LxmlError, ValueError, LookupError) as error:
        raise DataError(
            f"{place} cannot be read as XML ({one_line(str(error))[:120]})", action="save it again"
        ) from error
    if root is None:
        raise DataError(f"{place} is not XML", action="remove it, or give it its true ending")
    return root


def _local(element: etree._Element) -> str:
    return etree.QName(element).localname.lower() if isinstance(element.tag, str) else ""
