"""The coarse encoder: MiniLM, the frozen teacher of the alignment loss and a baseline of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

from invar_ray.errors import ModelError
from invar_ray.models.batching import Vectors, encode_in_batches, pad_right
from invar_ray.models.pooling import pool
from invar_ray.models.tiny import minilm_folder

BUILTIN = "builtin:minilm"
_TOKENS_PER_BATCH = 8192


class CoarseEncoder:
    """A sentence-transformers style encoder (mean pooling, unit vectors).

    Args:
        name: ``builtin:minilm``, a folder or a hub name.
        max_tokens: longest input, special tokens included; longer ones are cut.
        fingerprint: of its description.

    Raises:
        ModelError: if it cannot be loaded.
    """

    def __init__(self, name: str, max_tokens: int, fingerprint: str, *, device: str = "cpu") -> None:
        source = str(minilm_folder()) if name == BUILTIN else name
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(source)
            self._model = AutoModel.from_pretrained(source, dtype=torch.float32, use_safetensors=True).eval().to(device)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"cannot load the coarse encoder {name!r} ({str(error).splitlines()[0]})",
                action="set coarse.model to builtin:minilm, a folder, or a reachable hub name",
            ) from error
        self._max_tokens = max_tokens
        self.dimension = int(self._model.config.hidden_size)
        self.fingerprint = fingerprint

    def encode_queries(self, questions: Sequence[str]) -> Vectors:
        """[N, D] unit rows, in the order given."""
        return self._encode(list(questions))

    def encode_passages(self, passages: Sequence[tuple[str, str]]) -> Vectors:
        """[N, D] unit rows for (title, text) pairs, in the order given."""
        return self._encode([f"{title} {text}".strip() for title, text in passages])

    def _encode(self, texts: list[str]) -> Vectors:
        if not texts:
            return np.zeros((0, self.dimension), dtype=np.float32)
        ids = self._tokenizer(texts, truncation=True, max_length=self._max_tokens)["input_ids"]
        device = self._model.device

        def forward(rows: list[list[int]]) -> torch.Tensor:
            tokens, mask = pad_right(rows, int(self._tokenizer.pad_token_id))
            hidden = self._model(input_ids=tokens.to(device), attention_mask=mask.to(device)).last_hidden_state
            return functional.normalize(pool(hidden, mask.to(device), "mean"), dim=-1)

        return encode_in_batches(ids, forward, self.dimension, _TOKENS_PER_BATCH)
