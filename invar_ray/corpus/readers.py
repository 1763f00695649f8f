"""Corpora and question files into records; every fault of the input names its file and line.

=========  =========================================================================================
documents  ``.jsonl(.gz|.zst)`` and ``.parquet``, a document a row with ``text`` and perhaps ``id``
           (or ``_id``), ``title, uri``; ``.tsv(.gz|.zst)`` as DPR's ``psgs_w100``; ``.csv``,
           ``.tsv`` and ``.json`` lists with such rows; every other kind of
           :data:`invar_ray.corpus.storage.ENDINGS`, a document a file; folders of all these,
           BEIR's too; ``builtin:facts``
questions  ``.jsonl(.gz)`` with ``id, question, answers[], positive_ids[]`` and maybe
           ``rewrites[]``; ``builtin:facts``
=========  =========================================================================================

Other fields are ignored, but for those that ``metadata`` names.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from invar_ray.corpus.readlog import ReadLog
from invar_ray.corpus.rowfiles import Row, has_text_rows, read_rows_of
from invar_ray.corpus.rows import id_string, json_row, string, string_list
from invar_ray.corpus.storage import (
    ROW_FORMATS,
    InputFile,
    corpus_files,
    find_files,
    printable,
    read_lines,
)
from invar_ray.corpus.whole import read_whole
from invar_ray.errors import DataError
from invar_ray.schema import Document, Example

_LOG = logging.getLogger(__name__)

BUILTIN = "builtin:facts"
SMALL_SET = 10
"""Of a set of questions more rows than this, and more than half, must be faulty for it to be
refused.
"""


def read_documents(
    uri: str,
    format: str = "auto",
    limit: int | None = None,
    *,
    max_file_mb: float = 32.0,
    log: ReadLog | None = None,
    exclude: str = "",
    metadata: Sequence[str] = (),
) -> Iterator[Document]:
    """Documents of a corpus, in file order; files of a folder by name.

    Ids must be unique over the whole corpus (a hash of each is kept in memory for the check).  A
    file that is one document has its path relative to the folder as id (its name, if it was given
    itself), and the title that it gives itself, else its name without the ending.  A row without an
    id is ``<file>#L<line>`` (``#row<n>`` in Parquet), and its ``uri``, where it has none, is the
    file's with the same mark.

    Args:
        uri: file, folder or URI (see :mod:`invar_ray.corpus.storage`), or ``builtin:facts``.
        format: ``auto``, ``builtin`` or a value of :data:`invar_ray.corpus.storage.ENDINGS`.
        limit: stop after this many documents.
        max_file_mb: largest file that is one document, and largest row, in MiB.
        log: of a folder, leave out what cannot be read and say so there; ``None`` raises at the
            first fault.  With a quarantine malformed rows go there, also those of a file that was
            named itself.
        exclude: see :func:`invar_ray.corpus.storage.find_files`.
        metadata: fields of rows that documents keep; whole files have none.

    Raises:
        DataError: at the call, if there is nothing to read; while iterating, at the first fault
            (but see ``log``), and at the end of a corpus without any document.
    """
    _check_limit(limit)
    if format == "builtin" or uri.startswith("builtin:"):
        _check_builtin(uri)
        from invar_ray.corpus import (
            facts,
        )  # here, so that reading one's own files does not load the demo corpus

        return itertools.islice(iter(facts.documents()), limit)
    files = corpus_files(uri, format, log=log, exclude=exclude)
    strict = files[0].uri == printable(uri)  # a file that was named itself
    if strict and log is not None and log.quarantine is None:
        log = None
    return itertools.islice(
        _documents(uri, files, round(max_file_mb * 2**20), log, strict, metadata), limit
    )


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
        skip_unusable: leave out rows with no question, no answer or a taken id (public data sets
            have all three), with a warning that counts them and names the first, instead of
            raising.  Malformed rows raise all the same: this form is written for this project, and
            a row that somebody meant to ask would be lost.

    Raises:
        DataError: a row is malformed, an id occurs twice, a question has no answer, or there is
            none at all.
    """
    _check_limit(limit)
    if uri.startswith("builtin:"):
        _check_builtin(uri)
        from invar_ray.corpus import facts

        return list(itertools.islice(iter(facts.questions(split)), limit))
    files = find_files(uri, "jsonl")
    seen: dict[str, str] = {}
    examples: list[Example] = []
    faults: list[DataError] = []
    for place, line in (
        (f"{file.uri}, line {n}", line) for file in files for n, line in read_lines(file)
    ):
        row = json_row(line, place)
        empty = any(name in row and _is_blank(row[name]) for name in ("question", "answers"))
        unusable = empty or str(row.get("id")) in seen
        try:
            example = _example(row, place, without_blanks=skip_unusable)
            if example.id in seen:
                raise DataError(
                    f"{place}: the id {example.id!r} is taken by {seen[example.id]}",
                    expected="every id once",
                )
        except DataError as error:
            if not (skip_unusable and unusable):
                raise
            faults.append(error)
            continue
        seen[example.id] = place
        examples.append(example)
        if len(examples) == limit:
            break
    if faults and not examples:
        raise faults[0]
    if faults:
        _LOG.warning("%s: %d rows were left out (first: %s)", uri, len(faults), faults[0])
    if not examples:
        raise DataError(f"{uri} holds no question", expected="at least one row")
    return examples


def read_rows(uri: str, fields: dict[str, bool]) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of a JSON lines file whose ``fields`` (name -> required) are strings, each with its
    place for messages.

    Raises:
        DataError: a file or row is faulty.
    """
    for file in find_files(uri, "jsonl"):
        for _, number, row in _json_rows(file):
            place = f"{file.uri}, line {number}"
            values = {
                name: string(row, name, place)
                for name, required in fields.items()
                if required or row.get(name) is not None
            }
            yield place, values


class _SeenIds:
    """Ids by a hash of 16 bytes, with file and line in one number: some 150 bytes an id, however
    long it is.
    """

    def __init__(self, files: list[str]) -> None:
        self._files = files
        self._places: dict[bytes, int] = {}

    def add(self, id: str, file: int, number: int, place: str) -> None:
        key = hashlib.blake2b(id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        here = number * len(self._files) + file
        taken = self._places.setdefault(key, here)
        if taken != here:
            number, at = divmod(taken, len(self._files))
            mark = ", row" if self._files[at].endswith(".parquet") else ", line"
            first = f"{self._files[at]}{mark} {number}" if "," in place else self._files[at]
            raise DataError(f"{place}: the id {id!r} is taken by {first}", expected="every id once")


def _documents(
    uri: str,
    files: list[InputFile],
    max_bytes: int,
    log: ReadLog | None,
    strict: bool,
    metadata: Sequence[str],
) -> Iterator[Document]:
    seen = _SeenIds([file.uri for file in files])
    quarantine = log.quarantine if log is not None else None
    empty = True
    if log is not None:
        log.say()
        log.start(len(files))
    for at, file in enumerate(files):
        rows = bad = 0
        first: DataError | None = None
        try:
            by_row = _holds_rows(file)
            for row in _of_file(file, by_row, max_bytes, log, metadata):
                rows += 1
                if quarantine is not None and by_row:
                    quarantine.rows += 1
                try:
                    if isinstance(row.found, DataError):
                        raise row.found
                    seen.add(row.found.id, at, row.number, row.place)
                except DataError as error:
                    if quarantine is not None:
                        quarantine.put(file.name, row.number, error, row.excerpt)
                        quarantine.check(at_end=False, strict=strict)
                    elif log is None:
                        raise
                    first, bad = first or error, bad + 1
                    continue
                empty = False
                yield row.found
        except DataError as error:
            if log is None or strict or (quarantine is not None and quarantine.is_full):
                raise
            log.skip(_brief(error, file))
        if log is not None:
            if first is not None:
                log.skip(
                    f"{bad} of {rows} rows of {file.name} (first: {_brief(first, file)})", files=0
                )
            log.read()
    if log is not None:
        log.say()
    if quarantine is not None:
        quarantine.check(at_end=True, strict=strict)
    if empty:
        lines = log.lines if log is not None else []
        why = (
            f": of its {len(files)} files none could be read (first: {lines[0].rstrip('.')})"
            if lines
            else ""
        )
        raise DataError(f"the corpus {uri} is empty{why}", expected="at least one document")


def _brief(error: DataError, file: InputFile) -> str:
    """An error's sentence with the file's name in the folder instead of its whole address."""
    return str(error).replace(file.uri, file.name)


def _holds_rows(file: InputFile) -> bool:
    if file.format in {"csv", "tsv", "json"}:
        return has_text_rows(file)
    return file.format in ROW_FORMATS


def _of_file(
    file: InputFile, by_row: bool, max_bytes: int, log: ReadLog | None, metadata: Sequence[str]
) -> Iterator[Row]:
    if by_row:
        yield from read_rows_of(file, max_bytes, metadata)
    else:
        yield Row(1, file.uri, read_whole(file, max_bytes, log))


def _json_rows(file: InputFile) -> Iterator[tuple[InputFile, int, dict[str, Any]]]:
    for number, line in read_lines(file):
        yield file, number, json_row(line, f"{file.uri}, line {number}")


def _example(row: dict[str, Any], place: str, *, without_blanks: bool = False) -> Example:
    answers = string_list(row, "answers", place)
    if without_blanks:
        answers = tuple(answer for answer in answers if answer.strip())
    if not answers:
        raise DataError(
            f"{place}: 'answers' is empty", expected="at least one answer", action="remove the row"
        )
    if not all(answer.strip() for answer in answers):
        raise DataError(
            f"{place}: 'answers' holds a blank string",
            expected="answers with text",
            action="remove it",
        )
    return Example(
        id=id_string(row, "id", place),
        question=string(row, "question", place, filled=True),
        answers=answers,
        positive_ids=string_list(row, "positive_ids", place, ids=True),
        rewrites=string_list(row, "rewrites", place) if row.get("rewrites") is not None else (),
    )


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise DataError(f"the limit is {limit}", expected="a number above 0, or none")


def _check_builtin(uri: str) -> None:
    if uri != BUILTIN:
        raise DataError(f"there is no built-in corpus {uri!r}", expected=BUILTIN)


def _is_blank(value: Any) -> bool:
    """Nothing, or a list of nothing: empty, not malformed."""
    if isinstance(value, list):
        return all(map(_is_blank, value))
    return value is None or (isinstance(value, str) and not value.strip())
