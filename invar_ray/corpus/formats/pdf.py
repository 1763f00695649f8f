"""PDF files, page by page.  The only file that imports pypdf."""

from __future__ import annotations

import io
import re

import pypdf
from pypdf.errors import DependencyError, FileNotDecryptedError, WrongPasswordError

from invar_ray.corpus.formats.parsed import Parsed, clean_text, one_line
from invar_ray.errors import DataError
from invar_ray.schema import Place

_LIGATURES = {
    0xFB00: "ff",
    0xFB01: "fi",
    0xFB02: "fl",
    0xFB03: "ffi",
    0xFB04: "ffl",
    0xFB05: "st",
    0xFB06: "st",
}
_LIGATURES |= {0xAD: None}  # type: ignore[dict-item]  # soft hyphens
_HYPHENATED = re.compile(r"(?<=[^\W\d_])-\n(?=[a-z])")
# What word processors write into the title when nobody did.
_NO_TITLE = re.compile(
    r"^(microsoft word|untitled|slide \d|powerpoint)|\.(docx?|pptx?|pdf|tex|dvi|indd|odt|rtf)$",
    re.I,
)


def parse_pdf(data: bytes, place: str, max_chars: int) -> Parsed:
    """The text of a PDF file; its places are the pages that hold text.

    Words that were hyphenated at a line's end are joined.  Pages that cannot be read are left out,
    with a note.

    Args:
        data: the file.
        place: its name, for messages.
        max_chars: longest text; a file that unpacks to more is refused.

    Raises:
        DataError: it needs a password, is damaged, holds no text, or too much.
    """
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(
            ""
        ):  # many files only restrict printing: the password is empty
            raise _encrypted(place)
        count = len(reader.pages)
        title = _title(reader)
    except (DependencyError, FileNotDecryptedError, WrongPasswordError) as error:
        raise _encrypted(place) from error
    except DataError:
        raise
    except Exception as error:  # a damaged file makes pypdf raise nearly anything
        raise DataError(
            f"{place} cannot be read as PDF ({type(error).__name__}: {one_line(str(error))[:120]})",
            action="open it in a viewer and save it again",
        ) from error
    pieces: list[str] = []
    places: list[Place] = []
    failed: list[int] = []
    length = 0
    for number in range(count):
        try:
            text = clean_text(reader.pages[number].extract_text())
        except Exception:  # as above; the other pages may be sound
            failed.append(number + 1)
            continue
        text = _HYPHENATED.sub("", text.translate(_LIGATURES)).strip()
        if text:
            places.append(Place(length, f"page {number + 1}"))
            pieces.append(text)
            length += len(text) + 2
        if length > max_chars:
            raise DataError(
                f"{place} unpacks to more than {max_chars:,} characters of text",
                action="split it, or raise corpus.max_file_mb",
            )
    if not pieces:
        if failed:
            raise DataError(
                f"{place}: none of its {count} pages can be read",
                action="save it again from a viewer",
            )
        raise DataError(
            f"{place} holds no text on its {count} pages (a scan?)",
            action="run it through OCR (such as: ocrmypdf)",
        )
    note = (
        f"{place}: {len(failed)} of {count} pages cannot be read (first: page {failed[0]})"
        if failed
        else ""
    )
    return Parsed(title, "\n\n".join(pieces), tuple(places), note=note)


def _title(reader: pypdf.PdfReader) -> str:
    title = one_line(str(reader.metadata.title or "")) if reader.metadata else ""
    return "" if _NO_TITLE.search(title) else title


def _encrypted(place: str) -> DataError:
    return DataError(f"{place} is encrypted", action="save it without a password")
