"""Corpora and question files into records; every fault of the input names its file and line.

=========  ===========================================================================================================
documents  ``.jsonl(.gz)`` and ``.parquet`` with ``id, title, text`` and perhaps ``uri``; ``.txt`` and ``.md`` files,
           one document each; folders of all these; ``builtin:facts``
questions  ``.jsonl(.gz)`` with ``id, question, answers[], positive_ids[]`` and maybe ``rewrites[]``; ``builtin:facts``
=========  ===========================================================================================================

Other fields are ignored.
"""

from __future__ import annotations

import itertools
import json
import logging
import posixpath
import re
from collections.abc import Iterator
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from invar_ray.errors import DataError
from invar_ray.schema import Document, Example
from invar_ray.text.storage import InputFile, find_files, read_lines, read_text

_LOG = logging.getLogger(__name__)

BUILTIN = "builtin:facts"
_HEADING = re.compile(r"^ {0,3}#{1,6}[ \t]+(.+?)[ \t]*#*[ \t]*$|^(?=\S)([^\n]+)\n {0,3}(?:=+|-+)[ \t]*$", re.MULTILINE)
_FENCED = re.compile(r"^ {0,3}(```|~~~).*?(?:^ {0,3}\1[^\n]*$|\Z)", re.MULTILINE | re.DOTALL)


def read_documents(uri: str, format: str = "auto", limit: int | None = None) -> Iterator[Document]:
    """Documents of a corpus, in file order; files of a folder by name.

    Ids must be unique over the whole corpus (they are kept in memory for the check).  A text file's id is its path
    relative to the folder (its name, if it was given itself), its title the first Markdown heading of an ``.md`` file,
    else the name without its ending.  A record's ``uri``, where its row has none, is the file's with ``#L<line>`` or
    ``#row<n>``.

    Args:
        uri: file, folder or URI (see :mod:`invar_ray.text.storage`), or ``builtin:facts``.
        format: ``auto``, ``jsonl``, ``parquet``, ``text`` or ``builtin``.
        limit: stop after this many documents.

    Raises:
        DataError: at the call, if there is nothing to read; while iterating, at the first faulty row, and at the end of
            a corpus without any document.
    """
    _check_limit(limit)
    if format == "builtin" or uri.startswith("builtin:"):
        _check_builtin(uri)
        from invar_ray.text import facts  # here, so that reading one's own files does not load the demo corpus

        return itertools.islice(iter(facts.documents()), limit)
    return itertools.islice(_documents(uri, find_files(uri, format)), limit)


def read_examples(
    uri: str,
    limit: int | None = None,
    *,
    split: Literal["train", "dev"] = "train",
    skip_unusable: bool = False,
) -> list[Example]:
    """Questions with their answers, in file order.  Repeated answers are kept once.

    Args:
        uri: JSON lines file (``.gz`` is fine), folder of such, or ``builtin:facts``.
        limit: read at most this many.
        split: which questions of ``builtin:facts``; a file is what it is.
        skip_unusable: leave out rows whose answers are all blank and rows whose id is taken (public data sets have
            both), with one warning that counts them, instead of raising.  Malformed rows raise all the same.

    Raises:
        DataError: a row is malformed, an id occurs twice, a question has no answer, or there is none at all.
    """
    _check_limit(limit)
    if uri.startswith("builtin:"):
        _check_builtin(uri)
        from invar_ray.text import facts

        return list(itertools.islice(iter(facts.questions(split)), limit))
    files = find_files(uri, "jsonl")
    seen = _SeenIds()
    examples: list[Example] = []
    skipped = 0
    for file, number, row in itertools.chain.from_iterable(map(_json_rows, files)):
        place = f"{file.uri}, line {number}"
        if skip_unusable and (_is_unanswered(row.get("answers")) or row.get("id") in seen):
            skipped += 1
            continue
        example = _example(row, place)
        seen.add(example.id, place)
        examples.append(example)
        if len(examples) == limit:
            break
    if skipped:
        _LOG.warning("%s: %d rows without an answer or with a taken id were left out", uri, skipped)
    if not examples:
        raise DataError(f"{uri} holds no question", expected="at least one row")
    return examples


def read_rows(uri: str, fields: dict[str, bool]) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of a JSON lines file whose ``fields`` (name -> required) are strings, each with its place for messages.

    Raises:
        DataError: a file or row is faulty.
    """
    for file in find_files(uri, "jsonl"):
        for _, number, row in _json_rows(file):
            place = f"{file.uri}, line {number}"
            values = {
                name: _string(row, name, place)
                for name, required in fields.items()
                if required or row.get(name) is not None
            }
            yield place, values


class _SeenIds:
    def __init__(self) -> None:
        self._places: dict[str, str] = {}

    def __contains__(self, id: object) -> bool:
        return id in self._places

    def add(self, id: str, place: str) -> None:
        first = self._places.setdefault(id, place)
        if first is not place:
            raise DataError(f"{place}: the id {id!r} is taken by {first}", expected="every id once")


def _documents(uri: str, files: list[InputFile]) -> Iterator[Document]:
    seen = _SeenIds()
    readers = {"jsonl": _jsonl_documents, "parquet": _parquet_documents, "text": _text_documents}
    empty = True
    for file in files:
        for place, document in readers[file.format](file):
            seen.add(document.id, place)
            empty = False
            yield document
    if empty:
        raise DataError(f"the corpus {uri} is empty", expected="at least one document")


def _jsonl_documents(file: InputFile) -> Iterator[tuple[str, Document]]:
    for _, number, row in _json_rows(file):
        place = f"{file.uri}, line {number}"
        yield place, _document(row, place, f"{file.uri}#L{number}")


def _parquet_documents(file: InputFile) -> Iterator[tuple[str, Document]]:
    try:
        with file.filesystem.open_input_file(file.path) as stream:
            table = pq.ParquetFile(stream)
            names = table.schema_arrow.names
            number = 0
            for batch in table.iter_batches(1024, columns=[n for n in ("id", "title", "text", "uri") if n in names]):
                for row in batch.to_pylist():
                    number += 1
                    place = f"{file.uri}, row {number}"
                    yield place, _document(row, place, f"{file.uri}#row{number}")
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise DataError(f"{file.uri} cannot be read as Parquet ({reason})", action="write it again") from error


def _text_documents(file: InputFile) -> Iterator[tuple[str, Document]]:
    text = read_text(file)
    stem = posixpath.basename(file.name).rsplit(".", 1)[0]
    heading = None
    if file.name.lower().endswith((".md", ".markdown")):
        visible = _FENCED.sub("", text)  # "# ..." in a code block is a comment, not a heading
        heading = next((next(filter(None, match.groups())) for match in _HEADING.finditer(visible)), None)
    yield file.uri, Document(id=file.name, title=heading.strip() if heading else stem, text=text, uri=file.uri)


def _json_rows(file: InputFile) -> Iterator[tuple[InputFile, int, dict[str, Any]]]:
    for number, line in read_lines(file):
        place = f"{file.uri}, line {number}"
        try:
            row = json.loads(line)
        except UnicodeDecodeError as error:
            raise DataError(f"{place}: not UTF-8 text", action="convert the file to UTF-8") from error
        except json.JSONDecodeError as error:
            raise DataError(
                f"{place}: malformed JSON ({error.msg} at character {error.pos + 1})", expected="one JSON object a line"
            ) from error
        if not isinstance(row, dict):
            raise DataError(f"{place}: holds {_kind(row)}", expected="one JSON object a line")
        yield file, number, row


def _document(row: dict[str, Any], place: str, uri: str) -> Document:
    return Document(
        id=_string(row, "id", place, filled=True),
        title=_string(row, "title", place),
        text=_string(row, "text", place),
        uri=_string(row, "uri", place) if row.get("uri") is not None else uri,
    )


def _example(row: dict[str, Any], place: str) -> Example:
    answers = _strings(row, "answers", place)
    if not answers:
        raise DataError(f"{place}: 'answers' is empty", expected="at least one answer", action="remove the row")
    if not all(answer.strip() for answer in answers):
        raise DataError(f"{place}: 'answers' holds a blank string", expected="answers with text", action="remove it")
    return Example(
        id=_string(row, "id", place, filled=True),
        question=_string(row, "question", place, filled=True),
        answers=answers,
        positive_ids=_strings(row, "positive_ids", place),
        rewrites=_strings(row, "rewrites", place) if row.get("rewrites") is not None else (),
    )


def _string(row: dict[str, Any], name: str, place: str, *, filled: bool = False) -> str:
    if name not in row:
        raise DataError(f"{place}: the field {name!r} is missing", expected=f"a row with {name!r}, got {sorted(row)}")
    value = row[name]
    if not isinstance(value, str):
        raise DataError(f"{place}: {name!r} is {_kind(value)}", expected="a string")
    if filled and not value.strip():
        raise DataError(f"{place}: {name!r} is blank", expected="a string with text")
    return value


def _strings(row: dict[str, Any], name: str, place: str) -> tuple[str, ...]:
    if name not in row:
        raise DataError(f"{place}: the field {name!r} is missing", expected=f"a row with {name!r}, got {sorted(row)}")
    value = row[name]
    if not isinstance(value, list):
        raise DataError(f"{place}: {name!r} is {_kind(value)}", expected="a list of strings")
    for item in value:
        if not isinstance(item, str):
            raise DataError(f"{place}: {name!r} holds {_kind(item)}", expected="a list of strings")
    return tuple(dict.fromkeys(value))


def _is_unanswered(answers: Any) -> bool:
    return isinstance(answers, list) and all(isinstance(answer, str) and not answer.strip() for answer in answers)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise DataError(f"the limit is {limit}", expected="a number above 0, or none")


def _check_builtin(uri: str) -> None:
    if uri != BUILTIN:
        raise DataError(f"there is no built-in corpus {uri!r}", expected=BUILTIN)
