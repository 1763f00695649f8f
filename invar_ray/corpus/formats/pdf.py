"""PDF files, page by page.  The only file that imports pypdfium2, and rapidocr for scans."""

from __future__ import annotations

import ctypes
import itertools
import re
import threading
from functools import cache
from typing import Any

import pypdfium2 as pdfium

from invar_ray.corpus.formats.parsed import Parsed, clean_text, joined, one_line
from invar_ray.errors import DataError

_LIGATURES = {
    0xFB00: "ff",
    0xFB01: "fi",
    0xFB02: "fl",
    0xFB03: "ffi",
    0xFB04: "ffl",
    0xFB05: "st",
    0xFB06: "st",
}
# A word that a line's end parts.  PDFium writes U+FFFE for the hyphen if it leaves the break out.
_BROKEN = re.compile(r"(?P<before>[^\s\ufffe]*[^\W\d_])(?:\ufffe|-\n)(?P<after>[^\W\d_]+)")
_NUMBERS = re.compile(r"(?<=\d)(?:\ufffe|-\n)(?=\d)")
_LETTERS = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")
# First parts whose hyphen belongs to the word, unless a suffix follows ("long-er").
_COMPOUND = frozenset(
    "well self long short high low half full cross two three four five so".split()
)
_SUFFIXES = frozenset("er est ly ness ish en ened ening age ed ing s ty y teen land way".split())
# What word processors write into the title when nobody did.
_NO_TITLE = re.compile(
    r"^(microsoft word|untitled|slide \d|powerpoint)|\.(docx?|pptx?|pdf|tex|dvi|indd|odt|rtf)$",
    re.I,
)
_PASSWORD, _PROTECTION = 4, 5  # PDFium's error codes
_LOCK = threading.Lock()  # PDFium is not made for threads
_OCR_DPI = 200
_MIN_RECTS, _COLUMN_FILL = 12, 0.6


def parse_pdf(data: bytes, place: str, max_chars: int) -> Parsed:
    """The text of a PDF file; its places are the pages that hold text.

    Words that were hyphenated at a line's end are joined, unless the hyphen seems to belong to
    them.  Columns follow each other, also where the file draws them line by line.  What was typed
    into forms and onto pages comes last on its page.  A page without text is read by OCR where the
    extra ``ocr`` is installed.  Pages that cannot be read are left out, with a note.

    Args:
        data: the file.
        place: its name, for messages.
        max_chars: longest text; a file that unpacks to more is refused.

    Raises:
        DataError: it needs a password, is damaged, holds no text, or too much.
    """
    with _LOCK:
        try:
            file = pdfium.PdfDocument(data)
            count, title = len(file), _title(file)
        except pdfium.PdfiumError as error:
            if getattr(error, "err_code", None) in {_PASSWORD, _PROTECTION}:
                raise DataError(
                    f"{place} is encrypted", action="save it without a password"
                ) from error
            raise DataError(
                f"{place} cannot be read as PDF ({one_line(str(error))[:120].rstrip('.')})",
                action="open it in a viewer and save it again",
            ) from error
        try:
            return _pages(file, place, count, title, max_chars)
        finally:
            file.close()


def _pages(file: Any, place: str, count: int, title: str, max_chars: int) -> Parsed:
    texts: list[tuple[str, str]] = []
    failed: list[int] = []
    scanned: list[int] = []
    blank: list[int] = []
    length = 0
    for number in range(1, count + 1):
        try:
            page = file[number - 1]
            text = "\n".join(filter(None, [_page_text(page), *_typed_in(page)]))
            if not text.strip() and any(page.get_objects(filter=[_IMAGE])):
                read = _read_scan(page)
                (blank if read is None else scanned).append(number)
                text = read or ""
            page.close()
        except pdfium.PdfiumError:  # the other pages may be sound
            failed.append(number)
            continue
        texts.append((f"page {number}", text))
        length += len(text)
        if length > max_chars:
            raise DataError(
                f"{place} unpacks to more than {max_chars:,} characters of text",
                action="split it, or raise corpus.max_file_mb",
            )
    if not any(text.strip() for _, text in texts):
        if failed:
            raise DataError(
                f"{place}: none of its {count} pages can be read",
                action="save it again from a viewer",
            )
        raise DataError(
            f"{place} holds no text on its {count} page{'s' if count != 1 else ''} (a scan?)",
            action="pip install 'invar-ray[ocr]', or run it through OCR (such as: ocrmypdf)",
        )
    whole = _BROKEN.sub(" ", "\n".join(text for _, text in texts))
    known = set(_LETTERS.findall(whole.lower()))
    whole, places = joined([(name, _mended(text, known)) for name, text in texts])
    notes = [
        f"{len(pages)} of {count} pages {what} (first: page {pages[0]})"
        for pages, what in (
            (failed, "cannot be read"),
            (scanned, "are scans, read by OCR"),
            (blank, "are scans: pip install 'invar-ray[ocr]' to read them"),
        )
        if pages
    ]
    return Parsed(title, whole, places, note=f"{place}: {'; '.join(notes)}" if notes else "")


_TYPED = {pdfium.raw.FPDF_ANNOT_FREETEXT: b"Contents", pdfium.raw.FPDF_ANNOT_WIDGET: b"V"}
_IMAGE = pdfium.raw.FPDF_PAGEOBJ_IMAGE


def _page_text(page: Any) -> str:
    text_page = page.get_textpage()
    text = _in_columns(text_page, page.get_width()) or text_page.get_text_range()
    text_page.close()
    return text.replace("\r\n", "\n").translate(_LIGATURES)


def _typed_in(page: Any) -> list[str]:
    """What was typed onto a page: the fields of a form, and notes that stand on it as text."""
    texts = []
    for number in range(pdfium.raw.FPDFPage_GetAnnotCount(page)):
        note = pdfium.raw.FPDFPage_GetAnnot(page, number)
        key = _TYPED.get(pdfium.raw.FPDFAnnot_GetSubtype(note))
        if key is not None:
            size = pdfium.raw.FPDFAnnot_GetStringValue(note, key, None, 0)
            buffer = (ctypes.c_ushort * (size // 2))()
            pdfium.raw.FPDFAnnot_GetStringValue(note, key, buffer, size)
            text = bytes(buffer).decode("utf-16-le", "replace").rstrip("\0").strip()
            texts += [text] if text and text != "Off" else []  # Off: a box without its tick
        pdfium.raw.FPDFPage_CloseAnnot(note)
    return texts


def _in_columns(text_page: Any, width: float) -> str | None:
    """The text of a page of two columns that the file draws line by line across both; ``None`` for
    any other page, as the file's own order is then the better one.
    """
    count = text_page.count_rects()
    if count < _MIN_RECTS:
        return None
    rects = [text_page.get_rect(number) for number in range(count)]  # left, bottom, right, top
    gutter = _gutter(rects, width)
    if gutter is None:
        return None
    sides = [0 if right <= gutter else 1 if left >= gutter else None for left, _, right, _ in rects]
    crossings = sum(
        one is not None and two is not None and one != two for one, two in itertools.pairwise(sides)
    )
    if crossings < min(sides.count(0), sides.count(1)):
        return None  # one column after the other
    # A line across both columns ends the block above it.
    block, keyed = 0, []
    order = sorted(range(count), key=lambda number: -rects[number][3])
    for number in order:
        if sides[number] is None:
            block += 1
        keyed.append(
            (block, sides[number] or 0, -round(rects[number][3]), rects[number][0], number)
        )
        if sides[number] is None:
            block += 1
    return "\n".join(
        text_page.get_text_bounded(*rects[number]).strip() for *_, number in sorted(keyed)
    )


def _gutter(rects: list[tuple[float, float, float, float]], width: float) -> float | None:
    """The middle of the white between two columns of running text."""
    for part in (0.5, 0.48, 0.52, 0.46, 0.54):
        at = width * part
        left = [rect for rect in rects if rect[2] <= at]
        right = [rect for rect in rects if rect[0] >= at]
        if (
            min(len(left), len(right)) < len(rects) * 0.3
            or len(left) + len(right) < len(rects) * 0.8
        ):
            continue
        fills = [
            sorted(rect[2] - rect[0] for rect in side)[len(side) // 2]
            / (max(rect[2] for rect in side) - min(rect[0] for rect in side))
            for side in (left, right)
        ]
        if min(fills) >= _COLUMN_FILL:  # else cells of a table
            return at
    return None


def _mended(text: str, known: set[str]) -> str:
    """Lines' ends inside words, mended."""

    def one(match: re.Match[str]) -> str:
        before, after = match.group("before"), match.group("after")
        hyphen = "-" if _keeps_hyphen(before, after, known) else ""
        return f"{before}{hyphen}{after}"

    text = _NUMBERS.sub("-", text)
    text = _BROKEN.sub(one, _BROKEN.sub(one, text))  # twice: a word may be two lines' end
    return clean_text(text.replace("\ufffe", "-"))


def _keeps_hyphen(before: str, after: str, known: set[str]) -> bool:
    """Whether the hyphen between two parts belongs to the word: by its parts, and by how the
    document writes the word elsewhere. [ours]
    """
    parts = _LETTERS.findall(before)
    first, second = (parts[-1] if parts else before).lower(), after.lower()
    if after[0].isupper() or len(first) == 1 or "-" in before or before[-2:].isupper():
        return True
    if first + second in known:
        return False
    if f"{first}-{second}" in known:
        return True
    if first in _COMPOUND and second not in _SUFFIXES:
        return True
    return min(len(first), len(second)) > 3 and first in known and second in known


def _read_scan(page: Any) -> str | None:
    """The text of a page's picture; ``None`` without the extra ``ocr``."""
    engine = _ocr()
    if engine is None:
        return None
    picture = page.render(scale=_OCR_DPI / 72).to_numpy()
    found = engine(picture)
    return "\n".join(found.txts or ())


@cache
def _ocr() -> Any:
    try:
        import rapidocr
    except ImportError:
        return None
    return rapidocr.RapidOCR(params={"Global.log_level": "critical"})


def _title(file: Any) -> str:
    title = one_line(str(file.get_metadata_dict().get("Title") or ""))
    return "" if _NO_TITLE.search(title) else title
