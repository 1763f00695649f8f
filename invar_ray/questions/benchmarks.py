"""Public benchmarks as they are published: questions, and the documents that a file carries.

================  ==================================================================================
jsonl             the project's own: ``{id, question, answers[], positive_ids[], rewrites[]?}`` a
                  line
nq-open           ``{question, answer[]}`` a line (NQ-open; DrQA's WebQuestions and CuratedTREC)
dpr-qa            ``question<TAB>['answer', ..]`` a line (DPR's ``*.qa.csv``)
triviaqa          ``{"Data": [{QuestionId, Question, Answer: {Value, Aliases[]}}]}`` (unfiltered, as
                  published)
popqa             ``.tsv`` with a header that has ``id``, ``question``, ``possible_answers``
squad             ``{"data": [{title, paragraphs: [{context, qas}]}]}``; its paragraphs are
                  documents
squad-rows        ``{id, title, context, question, answers: {text[]}}`` a line (SQuAD out of Hugging
                  Face's datasets); its contexts are documents
hotpotqa          ``[{_id, question, answer, supporting_facts, context}]``; its contexts are
                  documents
webquestions      ``[{utterance, targetValue}]`` (the original release)
entityquestions   ``[{question, answers[]}]``
dpr               ``[{question, answers[], positive_ctxs[]}]``; its passages are documents
kilt              ``{id, input, output: [{answer, provenance[]}]}`` a line; positives are Wikipedia
                  page ids
beir              a folder of ``corpus.jsonl``, ``queries.jsonl``, ``qrels/<split>.tsv``; it has no
                  answers
================  ==================================================================================

Where they come from and their licences: ``docs/design/benchmarks.md``.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from invar_ray.corpus.json_places import json_entries, json_lines, malformed, text_of
from invar_ray.corpus.readers import SMALL_SET
from invar_ray.corpus.storage import InputFile, benchmark_files, read_lines
from invar_ray.errors import DataError
from invar_ray.questions import benchmark_formats as formats
from invar_ray.questions.benchmark_formats import Item
from invar_ray.schema import Document, Example

_LOG = logging.getLogger(__name__)

FORMATS = {
    "nq-open": formats.nq_open,
    "dpr-qa": formats.dpr_qa,
    "triviaqa": formats.triviaqa,
    "popqa": formats.popqa,
    "squad": formats.squad,
    "squad-rows": formats.squad_rows,
    "hotpotqa": formats.hotpotqa,
    "webquestions": formats.webquestions,
    "entityquestions": formats.entityquestions,
    "dpr": formats.dpr,
    "kilt": formats.kilt,
    "jsonl": formats.plain,
}
"""Format -> reader of one file; ``beir`` is a folder and has its own."""

_CARRIERS = {"squad", "hotpotqa"}
"""Formats whose files hold the documents too."""


@dataclass(frozen=True)
class Benchmark:
    """What was read.

    Attributes:
        format: which format it was.
        examples: questions, in file order; ``positive_ids`` is empty where the benchmark names
            none, ``answers`` where it has none (BEIR).
        documents: those that came along, each once; may be none.
    """

    format: str
    examples: list[Example]
    documents: list[Document]


def read_benchmark(
    uri: str,
    format: str = "auto",
    *,
    split: Literal["train", "dev"] = "dev",
    skip_unusable: bool = False,
) -> Benchmark:
    """Read a benchmark's file (or BEIR's folder).

    Args:
        uri: local path, ``file://``, ``s3://`` or ``gs://``; ``.gz`` is fine.
        format: one of the table above; ``auto`` looks into the file.
        split: which qrels of a BEIR folder (``dev`` takes ``test`` where there is no ``dev``).
        skip_unusable: leave out questions without an answer or with a taken id, and faulty rows,
            with a warning for each of the two that counts them, instead of raising; a set that is
            mostly faulty raises all the same.

    Raises:
        DataError: nothing is there, it cannot be read, its format is not known, or a row is faulty;
            it names the file and the line or entry.
    """
    if format == "auto":
        format = detect_format(uri)
    if format == "beir":
        items = formats.beir(uri, split)
    elif format in FORMATS:
        items = itertools.chain.from_iterable(map(FORMATS[format], _apart(benchmark_files(uri))))
    else:
        raise DataError(
            f"no benchmark format {format!r}", expected=f"auto, beir, {', '.join(FORMATS)}"
        )
    return _collect(uri, format, items, skip_unusable)


def _apart(files: list[InputFile]) -> list[InputFile]:
    """Files that differ by their endings alone keep these in the ids that are made of their
    names.
    """
    stems = Counter(formats.stem(file) for file in files)
    return [
        replace(file, name=file.name.replace(".", "_")) if stems[formats.stem(file)] > 1 else file
        for file in files
    ]


def carried_documents(uri: str) -> list[Document] | None:
    """The documents of a benchmark file that brings its own, such as SQuAD's, or of a local folder
    of such files; ``None`` for anything else.

    Raises:
        DataError: as :func:`read_benchmark`.
    """
    place = Path(uri).expanduser()
    files = sorted(place.iterdir()) if place.is_dir() else [place]
    if not all(file.name.endswith((".json", ".json.gz")) and file.is_file() for file in files):
        return None
    named = set()
    for file in files:
        try:
            named.add(detect_format(str(file)))
        except DataError:
            return None
    if not named <= _CARRIERS:
        return None
    documents: dict[str, Document] = {}
    for format in sorted(named):
        of_format = [file for file in files if detect_format(str(file)) == format]
        for file in of_format:
            for document in read_benchmark(str(file), format, skip_unusable=True).documents:
                _refuse_other_text(documents.setdefault(document.id, document), document, str(file))
    return list(documents.values()) or None


def _refuse_other_text(known: Document, document: Document, place: str) -> None:
    if known.text != document.text:
        raise DataError(
            f"{place}: the document {document.id!r} has another text here than before "
            f"({known.uri})",
            expected="every document once, or each time the same",
            action="give one of them another id (of SQuAD: another title), or read them apart",
        )


def convert_benchmark(
    uri: str,
    folder: str | os.PathLike[str],
    format: str = "auto",
    *,
    split: Literal["train", "dev"] = "dev",
) -> Benchmark:
    """Read a benchmark and write ``questions.jsonl`` and, if it carries documents, ``corpus.jsonl``
    into a folder.

    Raises:
        DataError: as :func:`read_benchmark`, or the folder cannot be written.
    """
    found = read_benchmark(uri, format, split=split, skip_unusable=True)
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
        for name, records in (("questions", found.examples), ("corpus", found.documents)):
            if records:
                rows = (json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records)
                (place / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"cannot write to {place} ({error.strerror})", action="name another folder"
        ) from error
    return found


def detect_format(uri: str) -> str:
    """The format of a file, by its first row.

    Raises:
        DataError: it cannot be told.
    """
    if formats.is_beir(uri):
        return "beir"
    # a named file whatever it is called, or the first of a folder
    file = benchmark_files(uri)[0]
    name = file.name.lower().removesuffix(".gz")
    if name.endswith((".tsv", ".csv")):
        header = next((line for _, line in read_lines(file)), b"")
        return "popqa" if b"possible_answers" in header else "dpr-qa"
    found = _by_keys(file, _first_object(file, lines=name.endswith((".jsonl", ".ndjson"))))
    if found is None:
        raise DataError(
            f"{file.uri}: its first entry tells no known format",
            expected=f"beir, {', '.join(FORMATS)}",
            action="name the format (questions.format=..)",
        )
    return found


def _by_keys(file: InputFile, first: dict[str, Any]) -> str | None:
    wanted = {
        "jsonl": {"id", "question", "answers", "positive_ids"},
        "dpr": {"question", "answers", "positive_ctxs"},
        "squad-rows": {"question", "answers", "context"},
        "hotpotqa": {"question", "answer", "supporting_facts"},
        "webquestions": {"utterance", "targetValue"},
        "kilt": {"input", "output"},
        "entityquestions": {"question", "answers"},
        "nq-open": {"question", "answer"},
        "squad": {"data"},
        "triviaqa": {"Data"},
    }
    found = next((name for name, keys in wanted.items() if keys <= first.keys()), None)
    return "jsonl" if "positive_ids" in first else found


def _first_object(file: InputFile, *, lines: bool) -> dict[str, Any]:
    """The first entry of a list, the first line, or the whole object's keys."""
    if lines:
        first = next(iter(json_lines(file)), None)
        if first is None:
            raise DataError(f"{file.uri} is empty", expected="at least one row")
        return first[1]
    text = text_of(file).lstrip()
    if text.startswith("["):
        first = next(iter(json_entries(file)), None)
        if first is None:
            raise DataError(f"{file.uri} is an empty list", expected="at least one entry")
        return first[1]
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines under another name
            return _first_object(file, lines=True)
        raise malformed(file, error) from error
    except RecursionError as error:
        raise DataError(
            f"{file.uri}, line 1: JSON nested too deep", action="download it again"
        ) from error
    return value if isinstance(value, dict) else {}


def _collect(uri: str, format: str, items: Iterator[Item], skip_unusable: bool) -> Benchmark:
    examples: dict[str, Example] = {}
    documents: dict[str, Document] = {}
    places: dict[str, str] = {}
    skipped = 0
    faults: list[DataError] = []
    refused: set[tuple[str, str]] = set()
    for place, example, carried in items:
        try:
            if isinstance(example, DataError):
                raise example
            for document in carried:
                refused.add((document.uri, document.id))
                _refuse_other_text(documents.get(document.id, document), document, place)
                refused.discard((document.uri, document.id))
            for file, name in refused:  # questions whose document could not be taken
                if example is not None and name in example.positive_ids and place.startswith(file):
                    raise DataError(f"{place}: its document {name!r} was left out")
        except DataError as error:
            if not skip_unusable:
                raise
            faults.append(error)
            continue
        documents |= {document.id: document for document in carried if document.id not in documents}
        if example is None:
            continue
        without = format != "beir" and not any(answer.strip() for answer in example.answers)
        if skip_unusable and (without or example.id in examples):
            skipped += 1
            continue
        if without:
            raise DataError(
                f"{place}: the question has no answer",
                expected="one or more",
                action="remove the row",
            )
        if example.id in examples:
            raise DataError(
                f"{place}: the id {example.id!r} is taken by {places[example.id]}",
                expected="every id once",
            )
        examples[example.id], places[example.id] = example, place
    if len(faults) > max(SMALL_SET, len(examples)) or (faults and not examples):
        raise faults[0]
    if skipped:
        _LOG.warning(
            "%s: %d questions without an answer or with a taken id were left out", uri, skipped
        )
    if faults:
        _LOG.warning("%s: %d faulty rows were left out (first: %s)", uri, len(faults), faults[0])
    if not examples:
        raise DataError(
            f"{uri} holds no question", expected=f"at least one, in the format {format}"
        )
    return Benchmark(format, list(examples.values()), list(documents.values()))
