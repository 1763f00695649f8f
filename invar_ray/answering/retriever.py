"""Question in, hits out: an index version together with the encoder that made it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import pyarrow as pa
import pyarrow.parquet as pq

from invar_ray.answering.duplicates import distinct
from invar_ray.answering.filters import Mask, Where, allowed_rows
from invar_ray.errors import MixedArtifactsError, RequestError
from invar_ray.index.blocks import Vectors, read_vectors
from invar_ray.index.faiss_index import Index, build_faiss, load_index
from invar_ray.index.probes import check_probes
from invar_ray.models.base import BaseOpener
from invar_ray.models.encoder import EncoderSpec, TextEncoder, open_encoder
from invar_ray.models.precision import Precision, made_in
from invar_ray.schema import Hit, Passage, from_table
from invar_ray.store.artifacts import Artifact, open_artifact


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
        collapse: what searches do that do not say it themselves, see :meth:`retrieve`.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        index: Index,
        passages: Passages,
        version: str,
        *,
        collapse: bool = False,
    ) -> None:
        self.encoder = encoder
        self.index = index
        self.passages = passages
        self.version = version
        self.collapse = collapse

    @property
    def versions(self) -> dict[str, str]:
        """What answers carry, so that they can be traced."""
        return {
            "index": self.version,
            "encoder": self.encoder.fingerprint,
            "passages": self.passages.fingerprint,
        }

    def encode_queries(self, questions: Sequence[str]) -> Vectors:
        """[N, D] unit rows for questions, as the index compares them."""
        return self.encoder.encode_queries(questions)

    def encode_passages(self, passages: Sequence[str | tuple[str, str]]) -> Vectors:
        """[N, D] unit rows for texts or (title, text) pairs, as they would stand in the index."""
        return self.encoder.encode_passages(
            [("", each) if isinstance(each, str) else each for each in passages]
        )

    def retrieve(
        self,
        questions: Sequence[str],
        top_k: int,
        *,
        where: Where | None = None,
        collapse: bool | None = None,
    ) -> list[list[Hit]]:
        """The best passages for each question, best first; ties keep the index's order.

        Args:
            questions: texts; many at once cost less than one by one.
            top_k: how many for each.
            where: only passages that meet these conditions.
            collapse: of passages with nearly the same text keep the best, and fill up with the next
                ones; ``None``: as the retriever was told to.

        Raises:
            RequestError: if ``top_k`` is below 1 or a condition names no column.
        """
        if top_k < 1:
            raise RequestError(f"top_k is {top_k}", expected="1 or more")
        if not questions:
            return []
        return self.retrieve_vectors(
            self.encoder.encode_queries(questions), top_k, where=where, collapse=collapse
        )

    def retrieve_vectors(
        self,
        queries: Vectors,
        top_k: int,
        *,
        where: Where | None = None,
        collapse: bool | None = None,
    ) -> list[list[Hit]]:
        """As :meth:`retrieve`, for [N, D] query vectors, which this index's own encoder made."""
        allowed = None if where is None else self.passages.allowed(where)
        if not (self.collapse if collapse is None else collapse):
            return self._search(queries, top_k, allowed)
        results: list[list[Hit]] = [[] for _ in queries]
        waiting, depth = list(range(len(queries))), 2 * top_k
        while waiting:
            found = dict(zip(waiting, self._search(queries[waiting], depth, allowed), strict=True))
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

    def _search(self, queries: Vectors, top_k: int, allowed: Mask | None) -> list[list[Hit]]:
        scores, rows = self.index.search(queries, top_k, allowed=allowed)
        results = []
        for question_scores, question_rows in zip(scores, rows, strict=True):
            kept = [
                (float(score), int(row))
                for score, row in zip(question_scores, question_rows, strict=True)
                if row >= 0
            ]
            found = self.passages.rows([row for _, row in kept])
            results.append(
                [
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
                    for rank, ((score, _), passage) in enumerate(
                        zip(kept, found, strict=True), start=1
                    )
                ]
            )
        return results


def open_retriever(
    index_uri: str,
    *,
    adapter_uri: str | None = None,
    precision: Precision | None = None,
    device: str = "cpu",
    open_base_tree: BaseOpener | None = None,
    memory_map: bool = False,
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
        collapse: see :class:`Retriever`.

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
    passages.verify()
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
    check_probes(artifact, encoder)
    if precision not in (None, made) and spec.kind != "coarse" and open_base_tree is None:
        del encoder  # two of them need not fit
        encoder = open_encoder(spec, artifact.store, precision=precision, device=device)
    return Retriever(encoder, index, rows, artifact.fingerprint, collapse=collapse)


def open_exact_retriever(
    index_uri: str, *, precision: Precision | None = None, device: str = "cpu"
) -> Retriever:
    """As :func:`open_retriever`, but every vector is compared: what an approximate index is
    measured against.
    """
    opened = open_retriever(index_uri, precision=precision, device=device)
    _, matrix = read_vectors(open_artifact(index_uri, "index").parent("vectors"))
    return Retriever(
        opened.encoder, Index(build_faiss(matrix, "Flat")), opened.passages, opened.version
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
