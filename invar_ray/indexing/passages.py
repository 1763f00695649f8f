"""Documents cut into passages: the ``passages`` artifact (``documents.parquet``, ``passages.parquet``)."""

from __future__ import annotations

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
from invar_ray.versions import STEPS


def passages_plan(config: Config, base: BaseRef, questions: Artifact | None) -> Plan:
    """The artifact of a run's passages; with ``corpus.distractors`` set it depends on the questions kept."""
    corpus = config.corpus
    return Plan(
        kind="passages",
        name=config.name,
        config={
            "source": source_digest(corpus.uri),
            "format": corpus.format,
            "limit": corpus.limit,
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

    Raises:
        DataError: if it is malformed or empty.
    """
    documents = list(_kept(config, questions))
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
    building.info |= {"documents": len(documents), "passages": len(passages)}


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


def _kept(config: Config, questions: Artifact | None) -> Iterator[Document]:
    source = read_documents(config.corpus.uri, config.corpus.format, config.corpus.limit)
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
