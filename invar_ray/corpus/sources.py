"""What the inputs are, by content: a changed file gives another fingerprint."""

from __future__ import annotations

import hashlib
from dataclasses import astuple
from functools import cache
from typing import Any

from pyarrow import fs

from invar_ray.corpus import facts
from invar_ray.corpus.storage import ROW_FORMATS, InputFile, corpus_files, find_files, what_is_at
from invar_ray.errors import DataError
from invar_ray.store.artifacts import digest, resolve_uri

BUILTIN_FACTS = "builtin:facts"


def source_digest(
    uri: str, *, max_bytes: int | None = None, exclude: str = "", is_corpus: bool = False
) -> str:
    """16 hex digits that change with the content of a file or folder (or of the built-in corpus).

    Of a folder, the files that a reader would take count (see
    :func:`invar_ray.corpus.storage.find_files`), by name.

    Args:
        uri: of the corpus or of questions.
        max_bytes: of a larger file that is one document only the size counts; it is not read.
        exclude: local folder below ``uri`` that does not count.
        is_corpus: of a BEIR folder the documents alone count, not the queries.

    Raises:
        DataError: if nothing is there.
    """
    if uri == BUILTIN_FACTS:
        return _facts_digest()
    filesystem, path = resolve_uri(uri)
    kind, _ = what_is_at(filesystem, path)
    if kind == fs.FileType.NotFound:
        raise DataError(
            f"no file or folder {uri}",
            action="check the path; relative paths start where you run the command",
        )
    if kind == fs.FileType.File:
        return _stream_digest(InputFile("", "", path, "", filesystem).raw_stream())
    files = (corpus_files if is_corpus else find_files)(uri, exclude=exclude)
    return digest([[file.name, _content(file, max_bytes)] for file in files])


def _content(file: InputFile, max_bytes: int | None) -> str:
    if max_bytes is not None and file.size > max_bytes and file.format not in ROW_FORMATS:
        return f"{file.size} bytes"  # it will be left out
    try:
        return _stream_digest(file.raw_stream())
    except OSError:
        return "unreadable"


def _stream_digest(opened: Any) -> str:
    hasher = hashlib.sha256()
    with opened as stream:
        while chunk := stream.read(1 << 20):
            hasher.update(chunk)
    return hasher.hexdigest()[:16]


@cache
def _facts_digest() -> str:
    """Of the built-in corpus and its questions: made from the package's tables, so it stays."""
    return digest(
        [
            [[document.id, document.title, document.text] for document in facts.documents()],
            [astuple(example) for example in facts.questions("train")],
            [astuple(example) for example in facts.questions("dev")],
        ]
    )
