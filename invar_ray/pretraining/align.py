"""What keeps a base that learns to read a retriever: its pooled states follow MiniLM's vectors.

Reading alone destroys retrieval by pooled states (Recall@5 fell from 0.61 to 0.10 within minutes), and the divergence
from MiniLM's similarities within small batches restored only half of it: a batch of random texts says little.  A vector
per text says more.  MiniLM's vectors are turned onto the base's width once (their first principal directions, rotated
by orthogonal Procrustes to where the base's own pooled states begin), and the mean-pooled and the last state of every
text are drawn to its turned vector; the divergence over the batch's similarities stays beside it, because ranking is
what counts.  Distillation by regression as in arXiv 2004.09813, the turning is the project's own [ours].

Shapes: N texts, B pairs of a batch, T tokens, H hidden size.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from invar_ray.models.batching import pad_right
from invar_ray.models.tiny import minilm_folder
from invar_ray.text.tokens import text_ids

States = Callable[[Sequence[Sequence[int]]], tuple[Tensor, Tensor]]
"""Rows of token ids to padded ids [B, T] and last hidden states [B, T, H]."""

_LAST_SHARE = 0.3  # of the last state; the rest is mean pooling's
_TEACHER_BATCH = 64


class Alignment:
    """Pairs of a question and a passage with MiniLM's vectors, and the loss on them.

    Args:
        pairs: (question, passage).
        tokenizer: of the base.
        states: the base.
        rows: texts of a batch, half of them questions.
        longest: tokens that a text is cut to, its end token included.
        temperature: of cosines.
        seed: of the order.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[str, str]],
        tokenizer: PreTrainedTokenizerBase,
        states: States,
        *,
        rows: int,
        longest: int,
        temperature: float,
        seed: int,
    ) -> None:
        self._states, self._temperature = states, temperature
        self._pairs_per_batch = min(rows // 2, len(pairs))
        self._rng = random.Random(seed)
        self._order: list[int] = []
        texts = [text for pair in pairs for text in pair]
        end = [tokenizer.eos_token_id]
        encoded = text_ids(tokenizer, texts, framed=False)
        self._rows = [ids[: longest - 1] + end for ids in encoded]  # question, passage, question, ...
        self._targets = self._turned(minilm_vectors(texts))

    def backward(self, weight: float) -> dict[str, float]:
        """Add the gradient of ``weight`` times the loss on the next batch; returns the loss's parts."""
        if len(self._order) < self._pairs_per_batch:
            self._order = list(range(len(self._rows) // 2))
            self._rng.shuffle(self._order)
        chosen = [self._order.pop() for _ in range(self._pairs_per_batch)]
        places = [2 * pair for pair in chosen] + [2 * pair + 1 for pair in chosen]
        targets = self._targets[places]
        mean, last = pooled(self._states, [self._rows[place] for place in places])
        parts = {"cosine": torch.zeros(()), "divergence": torch.zeros(())}
        for vectors, share in ((mean, 1 - _LAST_SHARE), (last, _LAST_SHARE)):
            parts["cosine"] = parts["cosine"] + share * (vectors * targets).sum(-1).mean()
            parts["divergence"] = parts["divergence"] + share * functional.kl_div(
                self._similarities(vectors).log_softmax(-1),
                self._similarities(targets).softmax(-1),
                reduction="batchmean",
            )
        loss = 2.0 * (1.0 - parts["cosine"]) + parts["divergence"]
        (loss * weight).backward()
        return {f"alignment_{name}": float(value.detach()) for name, value in parts.items()}

    def _similarities(self, vectors: Tensor) -> Tensor:
        """[2 B, 2 B], no text with itself."""
        itself = 10.0 * torch.eye(len(vectors))
        return (vectors @ vectors.T - itself) / self._temperature

    @torch.no_grad()
    def _turned(self, teacher: Tensor) -> Tensor:
        """[N, 384] to unit rows [N, H]."""
        sample = range(0, len(self._rows), max(1, len(self._rows) // 1500))
        ours = torch.cat(
            [pooled(self._states, [self._rows[i] for i in sample[b : b + 32]])[0] for b in range(0, len(sample), 32)]
        )
        directions = torch.linalg.svd(teacher, full_matrices=False)[2][: ours.shape[1]]
        narrow = functional.normalize(teacher @ directions.T, dim=-1)
        left, _, right = torch.linalg.svd(narrow[list(sample)].T @ ours, full_matrices=False)
        return narrow @ (left @ right)


def pooled(states: States, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Unit vectors [B, H] twice: the mean of a text's states, and the last one."""
    hidden = states(rows)[1].float()
    sizes = torch.tensor([len(row) for row in rows])
    real = torch.arange(hidden.shape[1])[None] < sizes[:, None]  # [B, T]
    mean = (hidden * real[..., None]).sum(1) / sizes[:, None]
    return functional.normalize(mean, dim=-1), functional.normalize(hidden[torch.arange(len(rows)), sizes - 1], dim=-1)


@torch.no_grad()
def minilm_vectors(texts: Sequence[str]) -> Tensor:
    """[N, 384], unit length."""
    folder = str(minilm_folder())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    found = torch.empty(len(texts), model.config.hidden_size)
    for begin in range(0, len(order), _TEACHER_BATCH):
        chosen = order[begin : begin + _TEACHER_BATCH]
        ids, real = pad_right(text_ids(tokenizer, [texts[i] for i in chosen], max_tokens=96), tokenizer.pad_token_id)
        states, real = model(input_ids=ids, attention_mask=real).last_hidden_state, real[..., None]
        found[chosen] = functional.normalize((states * real).sum(1) / real.sum(1), dim=-1)
    return found
