"""Files that are one document each: text of all kinds, web pages, books, PDF, Office files."""

from __future__ import annotations

import posixpath

from invar_ray.corpus.formats.parsed import Parsed
from invar_ray.corpus.formats.plain import (
    parse_csv,
    parse_json,
    parse_markdown,
    parse_notebook,
    parse_restructured,
    parse_text,
)
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
    data = read_bytes(file, max_bytes)
    if len(data) > max_bytes:  # packed
        raise too_large(file.uri, len(data), max_bytes)
    if not data:
        raise DataError(f"{file.uri} is empty", action="remove it")
    parsed = _parse(file, data, max_bytes)
    if not parsed.text.strip():
        raise DataError(f"{file.uri} holds no text", action="remove it")
    if parsed.note and log is not None:
        log.skip(parsed.note.replace(file.uri, file.name), files=0)
    packed = file.name.removesuffix(".gz").removesuffix(".zst")
    stem = posixpath.basename(packed).rsplit(".", 1)[0]
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
    """The file by its parser; each library is loaded when its first file comes."""
    match file.format:
        case "pdf":
            from invar_ray.corpus.formats.pdf import parse_pdf

            return parse_pdf(data, file.uri, max_bytes)
        case "docx":
            from invar_ray.corpus.formats.word import parse_docx

            return parse_docx(data, file.uri, max_bytes)
        case "pptx" | "xlsx":
            from invar_ray.corpus.formats import office

            parse = office.parse_pptx if file.format == "pptx" else office.parse_xlsx
            return parse(data, file.uri, max_bytes)
        case "html" | "xml" | "epub":
            from invar_ray.corpus.formats import html

            if file.format == "epub":
                return html.parse_epub(data, file.uri, max_bytes)
            return (html.parse_html if file.format == "html" else html.parse_xml)(data, file.uri)
        case "csv" | "tsv":
            return parse_csv(data, file.uri, "\t" if file.format == "tsv" else None)
        case "json" | "ipynb":
            return (parse_json if file.format == "json" else parse_notebook)(data, file.uri)
    name = file.name.lower().removesuffix(".gz").removesuffix(".zst")
    if name.endswith((".md", ".markdown")):
        return parse_markdown(data, file.uri)
    if name.endswith(".rst"):
        return parse_restructured(data, file.uri)
    return parse_text(data, file.uri)


def too_large(place: str, size: int, max_bytes: int) -> DataError:
    """The error of a file or row above ``corpus.max_file_mb``."""
    return DataError(
        f"{place} has {size / 2**20:.1f} MB or more, above the limit of {max_bytes / 2**20:g} MB",
        action="split it, or raise corpus.max_file_mb",
    )
