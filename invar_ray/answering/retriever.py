"""Question in, hits out: an index version together with the encoder that made it.

A search is ``dense`` (the encoder's vectors), ``bm25`` (words), or ``hybrid``: both lists, fused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import pyarrow as pa
import pyarrow.parquet as pq

from invar_ray.answering.bm25 import FOLDER, Bm25
from invar_ray.answering.duplicates import distinct
from invar_ray.answering.filters import Mask, Where, allowed_rows
from invar_ray.answering.fusion import DENSE_WEIGHT, fuse_lists, fusion_depth
from invar_ray.errors import MixedArtifactsError, RequestError
from invar_ray.index.blocks import Vectors, read_vectors
from invar_ray.index.faiss_index import Index, build_faiss, load_index
from invar_ray.index.probes import check_probes
from invar_ray.models.batching import refuse_not_finite
from invar_ray.models.encoder import EncoderSpec, TextEncoder, open_encoder
from invar_ray.models.loading import BaseOpener
from invar_ray.models.precision import Precision, made_in
from invar_ray.schema import Hit, Mode, Passage, from_table
from invar_ray.store.artifacts import Artifact, open_artifact

_PROBES = 16
"""So many of an index's probes are checked when it is opened: any one tells encoders apart."""


class Passages:
    """Row number -> passage, over the ``passages`` artifact's memory-mapped Parquet."""

    def __init__(self, artifact: Artifact) -> None:
        self._table = pq.read_table(
            artifact.path("passages.parquet"), memory_map=True
        ).combine_chunks()
        self.fingerprint = artifact.fingerprint
        # A tenant's filter is the same for many requests; 64 masks of a million rows are 64 MB.
        self.allowed = lru_cache(maxsize=64)(self._allowed)

    def _allowed(self, where: Where) -> Mask:
        """[N] True for rows that meet all conditions; kept for the next request with the same ones.

        Raises:
            RequestError: there is no such column.
        """
        return allowed_rows(self._table, where)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def rows(self, rows: Sequence[int]) -> list[Passage]:
        """The passages in these rows, in this order."""
        passages: list[Passage] = from_table(
            self._table.take(pa.array(list(rows), pa.int64())), Passage
        )
        return passages

    def column(self, name: str) -> pa.Array:
        """A column of short texts (ids) as it lies in memory, in row order."""
        return self._table.column(name).combine_chunks()

    def ids(self) -> list[str]:
        """All passage ids, in row order."""
        ids: list[str] = self._table.column("id").to_pylist()
        return ids

    def document_ids(self) -> list[str]:
        """The document of each row."""
        ids: list[str] = self._table.column("document_id").to_pylist()
        return ids


class Retriever:
    """Searches one index version with its own encoder.

    Args:
        encoder: made the index (checked by :func:`open_retriever`).
        index: rows = ``passages``.
        version: fingerprint of the index artifact.
        bm25: of the same passages; ``None``: the index has none, and every search is dense.
        mode: how searches look that do not say it themselves, see :meth:`retrieve`.
        collapse: as ``mode``.
        dense_weight: of vectors against words, see :func:`invar_ray.answering.fusion.fuse_lists`.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        index: Index,
        passages: Passages,
        version: str,
        *,
        bm25: Bm25 | None = None,
        mode: Mode = "dense",
        collapse: bool = False,
        dense_weight: float = DENSE_WEIGHT,
    ) -> None:
        self.encoder = encoder
        self.index = index
        self.passages = passages
        self.version = version
        self.bm25 = bm25
        self.mode: Mode = mode if bm25 is not None else "dense"
        self.collapse = collapse
        self.dense_weight = dense_weight

    @property
    def versions(self) -> dict[str, str]:
        """What answers carry, so that they can be traced."""
        return {
            "index": self.version,
            "encoder": self.encoder.fingerprint,
            "passages": self.passages.fingerprint,
        }

    def encode_queries(self, questions: Sequence[str]) -> Vectors:
        """[N, D] unit rows for questions, as the index compares them.

        Raises:
            ModelError: a row is not finite.
        """
        rows = self.encoder.encode_queries(questions)
        refuse_not_finite(rows, [repr(question[:60]) for question in questions])
        return rows

    def encode_passages(self, passages: Sequence[str | tuple[str, str]]) -> Vectors:
        """[N, D] unit rows for texts or (title, text) pairs, as they would stand in the index.

        Raises:
            ModelError: a row is not finite.
        """
        pairs = [("", each) if isinstance(each, str) else each for each in passages]
        rows = self.encoder.encode_passages(pairs)
        refuse_not_finite(rows, [repr(text[:60]) for _, text in pairs])
        return rows

    def retrieve(
        self,
        questions: Sequence[str],
        top_k: int,
        *,
        where: Where | None = None,
        mode: Mode | None = None,
        collapse: bool | None = None,
    ) -> list[list[Hit]]:
        """The best passages for each question, best first; ties keep the index's order.

        Args:
            questions: texts; many at once cost less than one by one.
            top_k: how many for each.
            where: only passages that meet these conditions.
            mode: how to search; ``None``: as the retriever was told to.
            collapse: of passages with nearly the same text keep the best, and fill up with the next
                ones; ``None``: as the retriever was told to.

        Raises:
            RequestError: ``top_k`` is below 1, a condition names no column, or ``mode`` asks for
                BM25 and the index has none.
        """
        mode = mode or self.mode
        if not questions:
            return []
        queries = None if mode == "bm25" else self.encoder.encode_queries(questions)
        return self.search(questions, queries, top_k, where=where, mode=mode, collapse=collapse)

    def search(
        self,
        questions: Sequence[str],
        queries: Vectors | None,
        top_k: int,
        *,
        where: Where | None = None,
        mode: Mode = "dense",
        collapse: bool | None = None,
    ) -> list[list[Hit]]:
        """As :meth:`retrieve`, for questions that are encoded already.

        Args:
            questions: their texts, which ``dense`` does not look at.
            queries: their [N, D] vectors by this index's own encoder, which ``bm25`` does not look
                at.
            top_k, where, mode, collapse: see :meth:`retrieve`.
        """
        if top_k < 1:
            raise RequestError(f"top_k is {top_k}", expected="1 or more")
        if mode != "dense" and self.bm25 is None:
            raise RequestError(
                f"index {self.version} has no BM25, mode is {mode!r}",
                expected="mode 'dense'",
                action="build the index again with this version (python -m jobs.reindex)",
            )
        allowed = None if where is None else self.passages.allowed(where)

        def lists(numbers: Sequence[int], depth: int) -> list[list[Hit]]:
            texts = [questions[number] for number in numbers]
            vectors = None if queries is None else queries[list(numbers)]
            deep = fusion_depth(depth) if mode == "hybrid" else depth
            if mode == "dense":
                return self._dense(vectors, deep, allowed)
            by_words = self._words(texts, deep, allowed)
            if mode == "bm25":
                return by_words
            pairs = zip(self._dense(vectors, deep, allowed), by_words, strict=True)
            return [fuse_lists(dense, bm25, depth, self.dense_weight) for dense, bm25 in pairs]

        if not (self.collapse if collapse is None else collapse):
            return lists(range(len(questions)), top_k)
        return self._distinct(lists, len(questions), top_k)

    def _distinct(
        self, lists: Callable[[Sequence[int], int], list[list[Hit]]], count: int, top_k: int
    ) -> list[list[Hit]]:
        results: list[list[Hit]] = [[] for _ in range(count)]
        waiting, depth = list(range(count)), 2 * top_k
        while waiting:
            found = dict(zip(waiting, lists(waiting, depth), strict=True))
            for number, hits in found.items():
                kept = [hits[position] for position in distinct(hits, top_k)]
                results[number] = [
                    replace(hit, rank=rank) for rank, hit in enumerate(kept, start=1)
                ]
            # A list shorter than what was asked for is all there is.
            waiting = [
                n
                for n in waiting
                if len(results[n]) < top_k and len(found[n]) == depth < self.index.size
            ]
            depth = min(2 * depth, self.index.size)
        return results

    def _dense(self, queries: Vectors | None, top_k: int, allowed: Mask | None) -> list[list[Hit]]:
        if queries is None:
            raise ValueError("a dense search needs vectors")
        scores, rows = self.index.search(queries, top_k, allowed=allowed)
        return [
            self._hits(
                [
                    (int(row), float(score))
                    for score, row in zip(question_scores, question_rows, strict=True)
                    if row >= 0
                ]
            )
            for question_scores, question_rows in zip(scores, rows, strict=True)
        ]

    def _words(self, texts: Sequence[str], top_k: int, allowed: Mask | None) -> list[list[Hit]]:
        if self.bm25 is None:
            raise ValueError("this retriever has no BM25")
        return [self._hits(found) for found in self.bm25.search(texts, top_k, allowed=allowed)]

    def _hits(self, found: Sequence[tuple[int, float]]) -> list[Hit]:
        passages = self.passages.rows([row for row, _ in found])
        return [
            Hit(
                passage_id=passage.id,
                document_id=passage.document_id,
                rank=rank,
                score=score,
                title=passage.title,
                text=passage.text,
                uri=passage.uri,
                place=passage.place,
            )
            for rank, ((_, score), passage) in enumerate(zip(found, passages, strict=True), start=1)
        ]


def open_retriever(
    index_uri: str,
    *,
    adapter_uri: str | None = None,
    precision: Precision | None = None,
    device: str = "cpu",
    open_base_tree: BaseOpener | None = None,
    memory_map: bool = False,
    mode: Mode = "dense",
    collapse: bool = False,
) -> Retriever:
    """Load an index version and the encoder that its manifest names.

    Args:
        index_uri: artifact of kind ``index``.
        adapter_uri: the ``retriever`` adapter that the caller means to use; refused unless it made
            the index.
        precision: encode questions in it; ``None`` takes the one that the index was made in, which
            the probes are checked in either way.
        device: where the encoder runs.
        open_base_tree: see :func:`invar_ray.models.encoder.open_encoder`; it should give the base
            in the index's precision.
        memory_map: see :func:`invar_ray.index.faiss_index.open_index`.
        mode, collapse: see :class:`Retriever`; an index without BM25 is searched densely, and one
            line on standard error says so.

    Raises:
        ArtifactError: if an artifact is missing, incomplete or damaged.
        MixedArtifactsError: if index, encoder, adapter or passages do not belong together.
    """
    artifact = open_artifact(index_uri, "index")
    spec = EncoderSpec.from_json(artifact.info["encoder"])
    if adapter_uri is not None:
        _same_adapter(artifact, spec, open_artifact(adapter_uri, "retriever"))
    index = load_index(artifact, memory_map=memory_map)
    passages = artifact.parent("passages")
    passages.verify_copy()
    rows = Passages(passages)
    if len(rows) != index.size:
        raise MixedArtifactsError(
            f"{artifact.uri} holds {index.size} vectors, its passages {len(rows)} rows",
            action="reindex (python -m jobs.reindex)",
        )
    made = made_in(artifact)
    encoder = open_encoder(
        spec, artifact.store, precision=made, device=device, open_base_tree=open_base_tree
    )
    check_probes(artifact, encoder, most=_PROBES)
    if precision not in (None, made) and spec.kind != "coarse" and open_base_tree is None:
        del encoder  # two of them need not fit
        encoder = open_encoder(spec, artifact.store, precision=precision, device=device)
    bm25 = open_bm25(artifact)
    if bm25 is None and mode != "dense":
        print(
            f"{artifact.ref} has no BM25: it is searched by its vectors alone (python -m "
            "jobs.reindex makes one that has)",
            file=sys.stderr,
            flush=True,
        )
    return Retriever(
        encoder,
        index,
        rows,
        artifact.fingerprint,
        bm25=bm25,
        mode=mode,
        collapse=collapse,
        dense_weight=artifact.info.get("dense_weight", DENSE_WEIGHT),
    )


def has_bm25(index: Artifact) -> bool:
    """Whether an index artifact has BM25 of its passages."""
    return any(name.startswith(f"{FOLDER}/") for name in index.manifest.files)


def open_bm25(index: Artifact) -> Bm25 | None:
    """The BM25 of an index artifact; ``None`` where it has none (an older one, or too large).

    Raises:
        MixedArtifactsError: it is of other passages than the index.
    """
    if not has_bm25(index):
        return None
    bm25 = Bm25.open(index.path(FOLDER))
    if bm25.size != index.info["rows"]:
        raise MixedArtifactsError(
            f"{index.uri} holds {index.info['rows']} vectors, its BM25 {bm25.size} passages",
            action="reindex (python -m jobs.reindex)",
        )
    return bm25


def open_exact_retriever(
    index_uri: str,
    *,
    precision: Precision | None = None,
    device: str = "cpu",
    mode: Mode = "dense",
    memory_map: bool = False,
) -> Retriever:
    """As :func:`open_retriever`, but every vector is compared: what an approximate index is
    measured against.
    """
    opened = open_retriever(
        index_uri, precision=precision, device=device, mode=mode, memory_map=memory_map
    )
    _, matrix = read_vectors(open_artifact(index_uri, "index").parent("vectors"))
    return Retriever(
        opened.encoder,
        Index(build_faiss(matrix, "Flat")),
        opened.passages,
        opened.version,
        bm25=opened.bm25,
        mode=mode,
        dense_weight=opened.dense_weight,
    )


def _same_adapter(index: Artifact, spec: EncoderSpec, adapter: Artifact) -> None:
    if spec.adapter_fingerprint != adapter.fingerprint:
        made_by = (
            f"adapter {spec.adapter_fingerprint}"
            if spec.adapter_fingerprint
            else "the base without an adapter"
        )
        raise MixedArtifactsError(
            f"{index.uri} was made by {made_by}, not by adapter {adapter.fingerprint} "
            f"({adapter.uri})",
            action="reindex with this adapter (python -m jobs.reindex), or serve the index with "
            "its own",
        )
