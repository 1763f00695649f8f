"""TREC run and qrels files: what any retrieval tool reads, so that anyone can recompute the numbers.

A run has six columns (question, ``Q0``, document, rank, score, tag), qrels four (question, ``0``, document, relevance).
Scores are ``depth - rank + 1``: tools sort by score and break ties by their own rules, so that real cosines, which tie,
would not keep the order.  White space and ``%`` in ids are percent-encoded, since white space parts the columns.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote, unquote

from invar_ray.errors import DataError, MissingArtifactError
from invar_ray.files import write_atomic

_UNSAFE = re.compile(r"[\s%]")


def write_run(path: str | os.PathLike[str], ranked: Mapping[str, Sequence[str]], tag: str) -> Path:
    """Write a run file.

    Args:
        path: where to.
        ranked: question id -> document ids, best first, each once.
        tag: the system's name.

    Raises:
        ValueError: a list holds a document twice.
    """
    lines = []
    for question, documents in ranked.items():
        if len(set(documents)) != len(documents):
            raise ValueError(f"question {question!r}: a document stands twice in its list")
        lines += [
            f"{_encode(question)} Q0 {_encode(document)} {rank} {len(documents) - rank + 1} {_encode(tag)}\n"
            for rank, document in enumerate(documents, start=1)
        ]
    write_atomic(Path(path), "".join(lines).encode("utf-8"))
    return Path(path)


def read_run(path: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Question id -> document ids by falling score (equal scores in the file's order).

    Raises:
        MissingArtifactError: there is no such file.
        DataError: a line is malformed or a document stands twice; it names the line.
    """
    scored: dict[str, dict[str, float]] = {}
    for place, (question, _, document, _, score, _) in _lines(path, 6, "question Q0 document rank score tag"):
        row = scored.setdefault(question, {})
        if document in row:
            raise DataError(f"{place}: {document!r} stands twice for {question!r}", expected="every document once")
        try:
            row[document] = float(score)
        except ValueError as error:
            raise DataError(f"{place}: the score is {score!r}", expected="a number") from error
    return {question: sorted(row, key=lambda name: -row[name]) for question, row in scored.items()}


def write_qrels(path: str | os.PathLike[str], gold: Mapping[str, Iterable[str]]) -> Path:
    """Write a qrels file: every gold document with relevance 1."""
    lines = [
        f"{_encode(question)} 0 {_encode(name)} 1\n"
        for question, names in gold.items()
        for name in dict.fromkeys(names)
    ]
    write_atomic(Path(path), "".join(lines).encode("utf-8"))
    return Path(path)


def read_qrels(path: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Question id -> documents with a relevance above 0.

    Raises:
        MissingArtifactError: there is no such file.
        DataError: a line is malformed; it names the line.
    """
    gold: dict[str, list[str]] = {}
    for place, (question, _, document, relevance) in _lines(path, 4, "question 0 document relevance"):
        try:
            relevant = int(relevance) > 0
        except ValueError as error:
            raise DataError(f"{place}: the relevance is {relevance!r}", expected="a whole number") from error
        names = gold.setdefault(question, [])
        if relevant and document not in names:
            names.append(document)
    return gold


def file_name(name: str) -> str:
    """A system's name as a file's: ``stage 1 + BM25`` -> ``stage-1-bm25``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _lines(path: str | os.PathLike[str], count: int, form: str) -> Iterable[tuple[str, list[str]]]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise MissingArtifactError(f"no file {path}", action="evaluate first") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text ({error})", expected="a TREC file") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            parts = line.split()
            if len(parts) != count:
                raise DataError(f"{path}, line {number}: {len(parts)} columns", expected=f"{count}: {form}")
            yield f"{path}, line {number}", [unquote(part) for part in parts]


def _encode(name: str) -> str:
    return _UNSAFE.sub(lambda match: quote(match.group(), safe=""), name)
