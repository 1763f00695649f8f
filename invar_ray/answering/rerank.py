"""A second look at the best hits: a cross-encoder reads the question and each of them together.

The encoder of an index sees question and passage apart; a cross-encoder sees both at once, which
finds better and costs a pass of the model for each hit.  Any sequence classifier with one label or
two will do.

Source: Nogueira and Cho, "Passage Re-ranking with BERT", arXiv 1901.04085.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from invar_ray.answering.fusion import read_with_title, reordered
from invar_ray.config import SearchConfig
from invar_ray.errors import ModelError
from invar_ray.models.base import BaseRef, resolve_named
from invar_ray.models.batching import DEFAULT_TOKENS_PER_BATCH, encode_in_batches, pad_right
from invar_ray.models.loading import open_cross_encoder
from invar_ray.schema import Hit
from invar_ray.text.tokens import Pair, pair_ids

MAX_TOKENS = 512
"""Longest row of question and text, where the model does not say less: what the published ones were
trained with."""


@dataclass(frozen=True, slots=True)
class Reranking:
    """Which cross-encoder, and how many hits of each question it reads."""

    ref: BaseRef
    depth: int

    @classmethod
    def of(cls, search: SearchConfig) -> Reranking | None:
        """What a recipe asks for; ``None``: no second look.

        Raises:
            ModelError: there is no such folder.
        """
        if search.reranker is None:
            return None
        return cls(resolve_named(search.reranker), search.rerank_depth)


@dataclass(frozen=True, slots=True)
class Judged:
    """How relevant some texts are to a question.

    Attributes:
        scores: one a text, in [0, 1].
        tokens: that were read, the frame included.
        cut: numbers of the texts that were not read to their end.
    """

    scores: tuple[float, ...]
    tokens: int
    cut: tuple[int, ...]


class Reranker:
    """A cross-encoder; :func:`open_reranker` makes one.

    Args:
        model: gives one logit for each pair, or two of which the second says "relevant".
        tokenizer: its own.
        fingerprint: of its weights.
    """

    def __init__(self, model: Any, tokenizer: Any, fingerprint: str) -> None:
        self._model, self._tokenizer, self.fingerprint = model, tokenizer, fingerprint
        limits = (tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 0))
        self.max_tokens = min([MAX_TOKENS, *(limit for limit in limits if limit > 0)])
        self.tokens_per_batch = DEFAULT_TOKENS_PER_BATCH
        self._typed = "token_type_ids" in tokenizer.model_input_names

    def judge(self, question: str, texts: Sequence[str]) -> Judged:
        """How relevant each text is to the question: the sigmoid of the one logit, or the softmax's
        share of the second of two.

        Raises:
            ModelError: a score is no number.  ResourceError: a pair does not fit into memory.
        """
        rows = pair_ids(self._tokenizer, question, texts, self.max_tokens)
        scores = encode_in_batches(rows, self._forward, 1, self.tokens_per_batch)[:, 0]
        if not np.isfinite(scores).all():
            raise ModelError(
                "the reranker gave a score that is no number",
                action="serve it in fp32, or name another one",
            )
        return Judged(
            tuple(scores.tolist()),
            sum(map(len, rows)),
            tuple(number for number, row in enumerate(rows) if row.cut),
        )

    def _forward(self, rows: list[Pair]) -> torch.Tensor:
        device = self._model.device
        ids, mask = pad_right([row.ids for row in rows], int(self._tokenizer.pad_token_id))
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        if self._typed:
            inputs["token_type_ids"] = pad_right([row.types for row in rows], 0)[0].to(device)
        logits = self._model(**inputs).logits.float()
        return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(dim=-1)[:, 1:]


def open_reranker(ref: BaseRef, precision: str = "fp32", device: str = "cpu") -> Reranker:
    """Load a cross-encoder; errors as :func:`invar_ray.models.loading.open_cross_encoder`.

    Args:
        ref: see :class:`Reranking`.
        precision: of its weights; take that of the index whose hits it reads.
        device: where it runs.
    """
    return Reranker(*open_cross_encoder(ref, precision, device), ref.fingerprint)


class PassageRetriever(Protocol):
    """What finds passages; :class:`invar_ray.answering.retriever.Retriever` is one, and
    :class:`Reranked` another.
    """

    def retrieve(self, questions: Sequence[str], top_k: int) -> list[list[Hit]]:
        """The best passages for each question, best first."""
        ...


class Reranked:
    """A retriever whose best hits a cross-encoder sorts anew.

    Args:
        retriever: finds them.
        reranker: reads them.
        depth: how many of each question; at least as many as are asked for.
    """

    def __init__(self, retriever: PassageRetriever, reranker: Reranker, depth: int) -> None:
        self.retriever, self.reranker, self.depth = retriever, reranker, depth

    def retrieve(self, questions: Sequence[str], top_k: int) -> list[list[Hit]]:
        """The best passages for each question, best first; ``score`` is the cross-encoder's.

        Raises:
            RequestError: see :meth:`invar_ray.answering.retriever.Retriever.retrieve`.
        """
        found = self.retriever.retrieve(questions, max(top_k, self.depth) if top_k > 0 else top_k)
        return [
            reordered(
                hits, self.reranker.judge(question, [*map(read_with_title, hits)]).scores, top_k
            )
            for question, hits in zip(questions, found, strict=True)
        ]
