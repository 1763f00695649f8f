"""TREC run and qrels files: what any retrieval tool reads, so that anyone can recompute the
numbers.

A run has six columns (question, ``Q0``, document, rank, score, tag), qrels four (question, ``0``,
document, relevance). Scores are ``depth - rank + 1``: tools sort by score and break ties by their
own rules, so that real cosines, which tie, would not keep the order.  White space and ``%`` in ids
are percent-encoded, since white space parts the columns.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from invar_ray.store.files import write_atomic

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
            f"{_encode(question)} Q0 {_encode(document)} {rank} {len(documents) - rank + 1} "
            f"{_encode(tag)}\n"
            for rank, document in enumerate(documents, start=1)
        ]
    write_atomic(Path(path), "".join(lines).encode("utf-8"))
    return Path(path)


def write_qrels(path: str | os.PathLike[str], gold: Mapping[str, Iterable[str]]) -> Path:
    """Write a qrels file: every gold document with relevance 1."""
    lines = [
        f"{_encode(question)} 0 {_encode(name)} 1\n"
        for question, names in gold.items()
        for name in dict.fromkeys(names)
    ]
    write_atomic(Path(path), "".join(lines).encode("utf-8"))
    return Path(path)


def file_name(name: str) -> str:
    """A system's name as a file's: ``stage 1 + BM25`` -> ``stage-1-bm25``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _encode(name: str) -> str:
    return _UNSAFE.sub(lambda match: quote(match.group(), safe=""), name)
