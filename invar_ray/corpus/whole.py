"""Files that are one document each: text, Markdown, HTML, PDF and Word."""

from __future__ import annotations

import posixpath

from invar_ray.corpus.formats.parsed import Parsed
from invar_ray.corpus.formats.plain import parse_markdown, parse_text
from invar_ray.corpus.readlog import ReadLog
from invar_ray.corpus.storage import InputFile, read_bytes
from invar_ray.errors import DataError
from invar_ray.schema import Document


def read_whole(file: InputFile, max_bytes: int, log: ReadLog | None) -> Document:
    """A file that is one document: its text with places, by the parser for its format.

    Args:
        file: not of a row format.
        max_bytes: the largest file; it also bounds the text.
        log: hears of parts that could not be read.

    Raises:
        DataError: it is too large, empty, damaged, or holds no text.
    """
    if file.size > max_bytes:
        raise too_large(file.uri, file.size, max_bytes)
    data = read_bytes(file)
    if not data:
        raise DataError(f"{file.uri} is empty", action="remove it")
    parsed = _parse(file, data, max_bytes)
    if not parsed.text.strip():
        raise DataError(f"{file.uri} holds no text", action="remove it")
    if parsed.note and log is not None:
        log.skip(parsed.note.replace(file.uri, file.name))
    stem = posixpath.basename(file.name).rsplit(".", 1)[0]
    return Document(
        id=file.name,
        title=parsed.title or stem,
        text=parsed.text,
        uri=file.uri,
        file=file.name,
        places=parsed.places,
        unit=parsed.unit,
    )


def _parse(file: InputFile, data: bytes, max_bytes: int) -> Parsed:
    """The file by its parser; each is loaded when its first file comes."""
    if file.format == "pdf":
        from invar_ray.corpus.formats.pdf import parse_pdf

        return parse_pdf(data, file.uri, max_bytes)
    if file.format == "docx":
        from invar_ray.corpus.formats.word import parse_docx

        return parse_docx(data, file.uri, max_bytes)
    if file.format == "html":
        from invar_ray.corpus.formats.html import parse_html

        return parse_html(data, file.uri)
    if file.name.lower().endswith((".md", ".markdown")):
        return parse_markdown(data, file.uri)
    return parse_text(data, file.uri)


def too_large(place: str, size: int, max_bytes: int) -> DataError:
    """The error of a file or row above ``corpus.max_file_mb``."""
    return DataError(
        f"{place} has {size / 2**20:.1f} MB or more, above the limit of {max_bytes / 2**20:g} MB",
        action="split it, or raise corpus.max_file_mb",
    )
