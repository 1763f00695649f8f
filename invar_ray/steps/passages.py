"""Documents cut into passages: the ``passages`` artifact.

Files: ``documents.parquet``, ``passages.parquet`` (row groups of 8,192), ``digests.parquet`` (what
the next version compares with), ``skipped.txt`` where something of the corpus was left out, and
``quarantine.jsonl`` where rows were malformed.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from invar_ray import console
from invar_ray.config import Config
from invar_ray.console import Progress
from invar_ray.corpus.readers import read_documents
from invar_ray.corpus.readlog import Quarantine, ReadLog
from invar_ray.corpus.sources import source_digest
from invar_ray.errors import DataError
from invar_ray.executor import Executor
from invar_ray.models.base import BaseRef
from invar_ray.questions.benchmarks import carried_documents
from invar_ray.schema import (
    DIGEST_SCHEMA,
    DOCUMENT_SCHEMA,
    Document,
    Passage,
    from_table,
    passage_schema,
)
from invar_ray.steps.questions import load_examples
from invar_ray.store.artifacts import Artifact, Building, Plan, Store
from invar_ray.store.earlier import DIGESTS, EarlierCut, batched, content_digest, id_digest
from invar_ray.store.rowgroups import GroupWriter
from invar_ray.text.chunking import chunk_document, passages_at

VERSION = 8
SKIPPED = "skipped.txt"
QUARANTINE = "quarantine.jsonl"
_BATCH = 256

_Spans = Sequence[list[tuple[int, int]] | None]
_Pair = tuple[list[Document], _Spans]


def plan(config: Config, base: BaseRef, questions: Artifact | None) -> Plan:
    """The artifact of a run's passages; with ``corpus.distractors`` set it depends on the questions
    kept.
    """
    corpus = config.corpus
    return Plan(
        kind="passages",
        name=config.name,
        config={
            "source": source_digest(
                corpus.uri,
                max_bytes=round(corpus.max_file_mb * 2**20),
                exclude=_own_results(config),
                is_corpus=True,
            ),
            "format": corpus.format,
            "limit": corpus.limit,
            "max_file_mb": corpus.max_file_mb,
            "distractors": corpus.distractors,
            "chunk_tokens": corpus.chunk_tokens,
            "chunk_stride": corpus.chunk_stride,
            "tokenizer": base.fingerprint,
            "metadata": list(corpus.metadata),
        },
        parents={"questions": questions}
        if questions is not None and corpus.distractors is not None
        else {},
        version=VERSION,
    )


def build(
    building: Building,
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    questions: Artifact | None,
    *,
    executor: Executor,
    earlier: Artifact | None = None,
) -> None:
    """Read and cut the corpus, in the memory of some row groups.

    What a folder holds that cannot be read is left out, with a line each, on standard error and in
    ``skipped.txt``; malformed rows of row formats go to ``quarantine.jsonl``.

    Args:
        building: gets the files.
        config: the run.
        tokenizer: of the base.
        questions: the run's, where ``corpus.distractors`` is set.
        executor: cuts, on ``scale.cpu_workers`` tasks of Ray where there are any; the passages are
            the same.
        earlier: passages of a version before, cut by the same settings: its documents that are the
            same now are cut where they were, without a tokenizer.

    Raises:
        DataError: the corpus is malformed (beyond ``corpus.max_malformed_share``) or empty.
    """
    corpus = config.corpus
    quarantine = Quarantine(building.path / QUARANTINE, corpus.max_malformed_share)
    log = ReadLog(echo=True, quarantine=quarantine)
    before = EarlierCut(earlier) if earlier is not None else None
    cut = _Cutter(tokenizer, corpus.chunk_tokens, corpus.chunk_stride)
    batches = (
        (batch, before.spans(batch) if before else [None] * len(batch))
        for batch in batched(_kept(config, questions, log), _BATCH)
    )
    cut_batches = executor.in_order(cut.pair, batches, config.scale.cpu_workers or 0)
    progress = Progress("read and cut", 0, "passages")
    files: set[str] = set()
    with (
        GroupWriter(building.path / "documents.parquet", DOCUMENT_SCHEMA) as documents,
        GroupWriter(
            building.path / "passages.parquet", passage_schema(corpus.metadata)
        ) as passages,
        GroupWriter(building.path / DIGESTS, DIGEST_SCHEMA) as digests,
    ):
        try:
            for batch, cuts in cut_batches:
                for document, found in zip(batch, cuts, strict=True):
                    digests.add(
                        _Digest(
                            id_digest(document.id),
                            content_digest(document),
                            passages.rows,
                            len(found),
                        ),
                        0,
                    )
                    documents.add(document, len(document.text))
                    for passage in found:
                        passages.add(passage, len(passage.text))
                    if document.file:
                        files.add(document.file)
                progress.advance(sum(map(len, cuts)), f"{documents.rows:,} documents")
        except DataError as error:
            raise _with_quarantine(error, building, config, quarantine) from error
        if not passages.rows:
            raise DataError(
                f"the corpus {corpus.uri} gave no passage ({documents.rows} documents read)",
                expected="at least one document with text",
                action="check corpus.uri, corpus.format and corpus.limit",
            )
    if log.lines:
        (building.path / SKIPPED).write_text(
            "".join(f"{line}\n" for line in log.lines), encoding="utf-8"
        )
    building.info |= {
        "source": os.path.abspath(corpus.uri) if os.path.exists(corpus.uri) else corpus.uri,
        "files": len(files),
        "documents": documents.rows,
        "passages": passages.rows,
        "skipped": log.files,
        "quarantined": quarantine.bad,
    }
    if before is not None:
        changes = {
            name: getattr(before, name) for name in ("new", "changed", "deleted", "unchanged")
        }
        building.info["changes"] = {"since": before.ref, **changes}
        listed = ", ".join(f"{count:,} {name}" for name, count in changes.items())
        # Without a document in common the earlier ones were another corpus.
        tell = console.say if before.unchanged or before.changed else console.detail
        tell(f"  documents since {before.ref}: {listed}")


class _Cutter:
    """Cuts documents, those with known spans there and the others with the tokenizer."""

    def __init__(self, tokenizer: Any, tokens: int, stride: int) -> None:
        self._tokenizer, self._tokens, self._stride = tokenizer, tokens, stride

    def pair(self, batch: _Pair) -> tuple[list[Document], list[list[Passage]]]:
        """The documents of a batch with their passages."""
        documents, spans = batch
        return documents, [
            chunk_document(document, self._tokenizer, tokens=self._tokens, stride=self._stride)
            if known is None
            else passages_at(document, known)
            for document, known in zip(documents, spans, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class _Digest:
    id: bytes
    content: bytes
    first: int
    passages: int


def _with_quarantine(
    error: DataError, building: Building, config: Config, quarantine: Quarantine
) -> DataError:
    """The error of a corpus with too many malformed rows, and where these are kept: the artifact
    will not be.
    """
    if not quarantine.is_full:
        return error
    store = Store(config.storage.root_uri)
    place = store.location(f"quarantine/{building.plan.name}-{building.plan.fingerprint}.jsonl")
    store.filesystem.create_dir(place.rpartition("/")[0], recursive=True)
    with store.filesystem.open_output_stream(place) as stream:
        stream.write(quarantine.path.read_bytes())
    return DataError(
        error.got, expected=error.expected, action=f"{error.action}; the rows are in {place}"
    )


def load_skipped(artifact: Artifact) -> list[str]:
    """What was left out of the corpus, a line each."""
    if SKIPPED not in artifact.manifest.files:
        return []
    return artifact.path(SKIPPED).read_text(encoding="utf-8").splitlines()


def load_documents(artifact: Artifact, ids: Collection[str] | None = None) -> dict[str, Document]:
    """Document id -> document; of these ``ids`` where given, and of them those that exist."""
    if ids is not None and not ids:
        return {}
    wanted = None if ids is None else [("id", "in", sorted(ids))]
    table = pq.read_table(artifact.path("documents.parquet"), filters=wanted)
    return {document.id: document for document in from_table(table, Document)}


def document_ids(artifact: Artifact) -> set[str]:
    """Ids of the documents that gave at least one passage."""
    table = pq.read_table(artifact.path("passages.parquet"), columns=["document_id"])
    return set(table.column("document_id").unique().to_pylist())


def load_passages(artifact: Artifact) -> list[Passage]:
    """All passages, in row order."""
    passages: list[Passage] = from_table(pq.read_table(artifact.path("passages.parquet")), Passage)
    return passages


def read_corpus(config: Config, log: ReadLog) -> Iterator[Document]:
    """The documents that a run's ``corpus`` section names, without those of ``storage.root_uri``
    below it.
    """
    corpus = config.corpus
    carried = carried_documents(corpus.uri) if corpus.format == "auto" else None
    if carried is not None:
        return iter(carried[: corpus.limit])
    return read_documents(
        corpus.uri,
        corpus.format,
        corpus.limit,
        max_file_mb=corpus.max_file_mb,
        log=log,
        exclude=_own_results(config),
        metadata=corpus.metadata,
    )


def _own_results(config: Config) -> str:
    root = config.storage.root_uri
    return "" if "://" in root else os.path.expanduser(root)


def _kept(config: Config, questions: Artifact | None, log: ReadLog) -> Iterator[Document]:
    source = read_corpus(config, log)
    if config.corpus.distractors is None:
        yield from source
        return
    if questions is None:
        raise DataError(
            "corpus.distractors is set but the run has no questions", action="set it to null"
        )
    needed = {
        document_id
        for split in ("train", "dev")
        for example in load_examples(questions, split)
        for document_id in example.positive_ids
    }
    left = config.corpus.distractors
    for document in source:
        if document.id in needed:
            yield document
        elif left > 0:
            left -= 1
            yield document
