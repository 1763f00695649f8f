"""The coarse encoder: MiniLM or another small encoder, the frozen teacher of the alignment loss and
a baseline of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

from invar_ray.errors import ModelError
from invar_ray.models.batching import (
    DEFAULT_TOKENS_PER_BATCH,
    EncodeStats,
    Vectors,
    encode_in_batches,
    pad_right,
)
from invar_ray.models.loading import load_weights
from invar_ray.models.pooling import Pooling, pool
from invar_ray.models.tiny import minilm_folder
from invar_ray.text.tokens import text_ids

BUILTIN = "builtin:minilm"


class CoarseEncoder:
    """A sentence-transformers style encoder (one pooling, unit vectors).

    Args:
        name: ``builtin:minilm``, a folder or a hub name.
        max_tokens: longest input, special tokens included; longer ones are cut.
        fingerprint: of its description.
        pooling: how its token states become one vector.
        prefixes: before a query and before a passage.

    Raises:
        ModelError: if it cannot be loaded.
    """

    def __init__(
        self,
        name: str,
        max_tokens: int,
        fingerprint: str,
        *,
        pooling: Pooling = "mean",
        prefixes: tuple[str, str] = ("", ""),
        device: str = "cpu",
    ) -> None:
        self._tokenizer = coarse_tokenizer(name)
        try:
            self._model = load_weights(AutoModel, coarse_source(name), torch.float32, device)
        except (OSError, ValueError) as error:
            raise _unresolved(name, error) from error
        self._max_tokens = max_tokens
        self._pooling: Pooling = pooling
        self._query_prefix, self._passage_prefix = prefixes
        self.tokens_per_batch = DEFAULT_TOKENS_PER_BATCH
        self.stats = EncodeStats()
        self.dimension = int(self._model.config.hidden_size)
        self.fingerprint = fingerprint

    def encode_queries(self, questions: Sequence[str]) -> Vectors:
        """[N, D] unit rows, in the order given."""
        texts = [f"{self._query_prefix}{question}" for question in questions]
        return self.encode_ids(text_ids(self._tokenizer, texts, max_tokens=self._max_tokens))

    def encode_passages(self, passages: Sequence[tuple[str, str]]) -> Vectors:
        """[N, D] unit rows, in the order given."""
        return self.encode_ids(
            coarse_passage_ids(self._tokenizer, passages, self._max_tokens, self._passage_prefix)
        )

    def encode_ids(self, ids: list[list[int]]) -> Vectors:
        """[N, D] unit rows for token ids, in the order given."""
        device = self._model.device

        def forward(rows: list[list[int]]) -> torch.Tensor:
            tokens, mask = pad_right(rows, int(self._tokenizer.pad_token_id))
            hidden = self._model(
                input_ids=tokens.to(device), attention_mask=mask.to(device)
            ).last_hidden_state
            return functional.normalize(pool(hidden, mask.to(device), self._pooling), dim=-1)

        return encode_in_batches(ids, forward, self.dimension, self.tokens_per_batch, self.stats)


def coarse_tokenizer(name: str) -> Any:
    """The tokenizer of a coarse encoder; errors as :class:`CoarseEncoder`."""
    try:
        return AutoTokenizer.from_pretrained(coarse_source(name))
    except (OSError, ValueError) as error:
        raise _unresolved(name, error) from error


def coarse_passage_ids(
    tokenizer: Any, passages: Sequence[tuple[str, str]], max_tokens: int, prefix: str = ""
) -> list[list[int]]:
    """Token ids of (title, text) passages."""
    texts = [prefix + f"{title} {text}".strip() for title, text in passages]
    return text_ids(tokenizer, texts, max_tokens=max_tokens)


def coarse_source(name: str) -> str:
    """Folder or hub name of a coarse encoder."""
    return str(minilm_folder()) if name == BUILTIN else name


def _unresolved(name: str, error: Exception) -> ModelError:
    return ModelError(
        f"cannot load the coarse encoder {name!r} ({str(error).splitlines()[0]})",
        action="set coarse.model to builtin:minilm, a folder, or a reachable hub name",
    )
