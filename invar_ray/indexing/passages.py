"""Documents cut into passages: the ``passages`` artifact.

Files: ``documents.parquet``, ``passages.parquet``, and ``skipped.txt`` where something of the corpus was left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from invar_ray.artifacts import Artifact, Building, Plan
from invar_ray.config import Config
from invar_ray.errors import DataError
from invar_ray.indexing.questions import load_examples
from invar_ray.indexing.sources import source_digest
from invar_ray.models.locate import BaseRef
from invar_ray.schema import DOCUMENT_SCHEMA, PASSAGE_SCHEMA, Document, Passage, from_table, to_table
from invar_ray.text.chunking import chunk_document
from invar_ray.text.readers import read_documents
from invar_ray.text.readlog import ReadLog
from invar_ray.versions import STEPS

SKIPPED = "skipped.txt"


def passages_plan(config: Config, base: BaseRef, questions: Artifact | None) -> Plan:
    """The artifact of a run's passages; with ``corpus.distractors`` set it depends on the questions kept."""
    corpus = config.corpus
    return Plan(
        kind="passages",
        name=config.name,
        config={
            "source": source_digest(
                corpus.uri, max_bytes=round(corpus.max_file_mb * 2**20), exclude=_own_results(config)
            ),
            "format": corpus.format,
            "limit": corpus.limit,
            "max_file_mb": corpus.max_file_mb,
            "distractors": corpus.distractors,
            "chunk_tokens": corpus.chunk_tokens,
            "chunk_stride": corpus.chunk_stride,
            "tokenizer": base.fingerprint,
        },
        parents={"questions": questions} if questions is not None and corpus.distractors is not None else {},
        version=STEPS["passages"].version,
    )


def build_passages(
    building: Building, config: Config, tokenizer: PreTrainedTokenizerBase, questions: Artifact | None
) -> None:
    """Read and cut the corpus.

    What a folder holds that cannot be read is left out, with a line each, on standard error and in ``skipped.txt``.

    Raises:
        DataError: if it is malformed or empty.
    """
    log = ReadLog(echo=True)
    documents = list(_kept(config, questions, log))
    passages = [
        passage
        for document in documents
        for passage in chunk_document(
            document, tokenizer, tokens=config.corpus.chunk_tokens, stride=config.corpus.chunk_stride
        )
    ]
    if not passages:
        raise DataError(
            f"the corpus {config.corpus.uri} gave no passage ({len(documents)} documents read)",
            expected="at least one document with text",
            action="check corpus.uri, corpus.format and corpus.limit",
        )
    pq.write_table(to_table(documents, DOCUMENT_SCHEMA), building.path / "documents.parquet")
    pq.write_table(to_table(passages, PASSAGE_SCHEMA), building.path / "passages.parquet")
    if log.lines:
        (building.path / SKIPPED).write_text("".join(f"{line}\n" for line in log.lines), encoding="utf-8")
    building.info |= {
        "source": os.path.abspath(config.corpus.uri) if os.path.exists(config.corpus.uri) else config.corpus.uri,
        "files": len({document.file for document in documents if document.file}),
        "documents": len(documents),
        "passages": len(passages),
        "skipped": len(log.lines),
    }


def load_skipped(artifact: Artifact) -> list[str]:
    """What was left out of the corpus, a line each."""
    if SKIPPED not in artifact.manifest.files:
        return []
    return artifact.path(SKIPPED).read_text(encoding="utf-8").splitlines()


def load_documents(artifact: Artifact) -> dict[str, Document]:
    """Document id -> document."""
    rows = from_table(pq.read_table(artifact.path("documents.parquet")), Document)
    return {document.id: document for document in rows}


def document_ids(artifact: Artifact) -> set[str]:
    """Ids of the documents that gave at least one passage."""
    table = pq.read_table(artifact.path("passages.parquet"), columns=["document_id"])
    return set(table.column("document_id").to_pylist())


def load_passages(artifact: Artifact) -> list[Passage]:
    """All passages, in row order."""
    passages: list[Passage] = from_table(pq.read_table(artifact.path("passages.parquet")), Passage)
    return passages


def read_corpus(config: Config, log: ReadLog) -> Iterator[Document]:
    """The documents that a run's ``corpus`` section names, without those of ``storage.root_uri`` below it."""
    corpus = config.corpus
    return read_documents(
        corpus.uri,
        corpus.format,
        corpus.limit,
        max_file_mb=corpus.max_file_mb,
        log=log,
        exclude=_own_results(config),
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
        raise DataError("corpus.distractors is set but the run has no questions", action="set it to null")
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
