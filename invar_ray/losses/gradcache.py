"""Gradients of a batch of any size in the memory of one chunk: GradCache.

Shape legend: N rows of one call, T tokens, D embedding size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from invar_ray.models.batching import length_batches

Encode = Callable[[Tensor, Tensor], Tensor]
Backward = Callable[[Tensor], object]


@dataclass
class _Chunk:
    """Some rows of a call, and the random state that its forward began with."""

    rows: list[int]
    weight: float  # 0 for a dummy chunk, which only keeps the ranks in step
    random_state: list[Tensor]


@dataclass
class _Call:
    """One call of the cache: its inputs, its chunks and the leaf that stands for its output."""

    ids: Tensor
    mask: Tensor
    chunks: list[_Chunk]
    vectors: Tensor


class RepresentationCache:
    """Stands in for an encoder in the computation of a loss, and back-propagates through the
    encoder afterwards.

    A call encodes its rows without graph, chunk by chunk, and returns a leaf.  The loss is computed
    from leaves as if they were the encoder's output.  :meth:`backward` takes the gradients of the
    loss with respect to the leaves, then encodes each chunk again with its graph and
    back-propagates the surrogate::

        s_chunk = sum_n <v_n, dL/dv_n>,      dL/dtheta = sum over chunks of ds_chunk/dtheta

    which is exact, because dL/dtheta = sum_n (dL/dv_n) (dv_n/dtheta).  The second forward repeats
    the first one's random numbers (dropout), on the CPU and on the device of the inputs.  Memory:
    the graph of one chunk, plus the vectors.  Time: one forward more.  A call that fits into one
    chunk keeps its graph and is not encoded twice.

    Args:
        encode: ([n, T] ids, [n, T] mask) -> [n, D].  Rows must not influence each other (no batch
            statistics).
        tokens_per_chunk: rows x longest row of a chunk, padding included, stays within it (one row
            at least).
        agree: local number of chunks -> number that every rank runs (their maximum).  Under ZeRO-3
            each forward and backward is a collective; ranks of fewer chunks run dummy ones of
            weight 0.  ``None`` for one process.

    Source: Gao et al., arXiv 2101.06983.  Deviations [ours]: chunks by token budget and length,
    dummy chunks, calls of one chunk.  Siblings: ``luyug/GradCache``, sentence-transformers
    ``CachedMultipleNegativesRankingLoss``.
    """

    def __init__(
        self, encode: Encode, tokens_per_chunk: int, *, agree: Callable[[int], int] | None = None
    ) -> None:
        if tokens_per_chunk < 1:
            raise ValueError(f"tokens_per_chunk: got {tokens_per_chunk}, expected at least 1")
        self._encode, self._tokens, self._agree = encode, tokens_per_chunk, agree
        self._calls: list[_Call] = []
        self._has_graph = False
        self.padded_tokens = 0
        """Tokens that the chunks so far held, padding included, dummy chunks not."""

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[N, T] ids and mask, padded right -> [N, D]: a leaf, or the encoder's output where one
        chunk is enough.
        """
        lengths: list[int] = mask.sum(dim=1).tolist()
        rows = list(length_batches(lengths, self._tokens))
        self.padded_tokens += sum(len(chunk) * max(lengths[row] for row in chunk) for chunk in rows)
        count = len(rows) if self._agree is None else self._agree(len(rows))
        if count == 1:
            self._has_graph = True
            return self._encode(ids, mask)
        weights = [1.0] * len(rows) + [0.0] * (count - len(rows))
        rows += [[0]] * (count - len(rows))
        chunks: list[_Chunk] = []
        vectors: Tensor | None = None
        for chosen, weight in zip(rows, weights, strict=True):
            chunks.append(_Chunk(chosen, weight, _random_state(ids.device)))
            with torch.no_grad():
                found = self._encode(*_cut(ids, mask, chosen))
            if vectors is None:
                vectors = found.new_zeros(len(lengths), *found.shape[1:])
            if weight:
                vectors[chosen] = found
        if vectors is None:
            raise ValueError("got no rows, expected at least one")
        self._calls.append(_Call(ids, mask, chunks, vectors.requires_grad_()))
        return vectors

    def backward(self, loss: Tensor, backward: Backward | None = None) -> None:
        """Add the gradients of ``loss`` to those of the encoder's parameters; the cache is empty
        afterwards.

        Args:
            loss: scalar, a function of what the calls returned.
            backward: back-propagates a scalar through the encoder (an engine's own); ``None`` calls
                ``.backward()``.

        Every rank must call it, and the collectives in the graph of ``loss`` must be the same on
        all of them.
        """
        through = backward if backward is not None else _plain_backward
        # A graph that reaches parameters belongs to the engine, one that ends in leaves does not.
        (through if self._has_graph else _plain_backward)(loss)
        calls, self._calls, self._has_graph = self._calls, [], False
        for call in calls:
            given = call.vectors.grad
            gradient = torch.zeros_like(call.vectors) if given is None else given
            for chunk in call.chunks:
                with _replayed(chunk.random_state, call.ids.device):
                    again = self._encode(*_cut(call.ids, call.mask, chunk.rows))
                through((again * gradient[chunk.rows]).sum() * chunk.weight)


def _cut(ids: Tensor, mask: Tensor, rows: list[int]) -> tuple[Tensor, Tensor]:
    """These rows without the columns that are padding in all of them."""
    width = int(mask[rows].sum(dim=1).max())
    return ids[rows, :width], mask[rows, :width]


def _plain_backward(loss: Tensor) -> None:
    loss.backward()


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


@contextlib.contextmanager
def _replayed(states: list[Tensor], device: torch.device) -> Iterator[None]:
    """Random numbers from ``states`` inside, from where they were outside."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(states[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(states[1], device)
        yield
