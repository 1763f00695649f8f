"""Parts that generation is made of: choosing tokens, ending rows, handing tokens to another thread.

Shape legend: B rows · T tokens · V vocabulary.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the first of the stop strings begins in ``text``; ``None`` if none is there."""
    places = [place for place in (text.find(string) for string in stop) if place >= 0]
    return min(places, default=None)


def steady(text: str, stop: Sequence[str]) -> str:
    """The part of an unfinished text that no later token can change."""
    place = first_stop(text, stop)
    if place is not None:
        return text[:place].strip()
    text = text.rstrip("\ufffd")  # half of a multi-byte character
    longest = max(
        (n for string in stop for n in range(1, len(string)) if text.endswith(string[:n])), default=0
    )  # may be the start of a stop string
    return text[: len(text) - longest].strip()


class TokenPicker(LogitsProcessor):
    """Notes each chosen token's log-probability, and samples by adding Gumbel noise.

    argmax(logits / t + Gumbel noise) is an exact sample of softmax(logits / t).  With a random generator per row,
    seeded by seed and prompt, a row's draw does not depend on its batch or on other threads, as ``torch.multinomial``
    with the global generator would.  Log-probabilities are noted here, B numbers a step, since keeping the logits
    takes B x V.
    """

    def __init__(self, temperature: float, seed: int, encoded: list[list[int]]) -> None:
        self.temperature = temperature
        self.logprobs: list[Tensor] = []  # one [B] per step
        self._random = [torch.Generator().manual_seed(_row_seed(seed, ids)) for ids in encoded] if temperature else []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Scores [B, V] to choose the next token from: their argmax is it."""
        scores = scores.float()  # [B, V]
        picked = scores
        if self.temperature > 0:
            uniform = torch.stack([torch.rand(scores.shape[-1], generator=random) for random in self._random])
            tiny = torch.finfo(torch.float32).tiny
            noise = -(-uniform.clamp_min(tiny).log()).clamp_min(tiny).log()  # [B, V], Gumbel
            picked = scores / self.temperature + noise.to(scores.device)
        token = picked.argmax(dim=-1, keepdim=True)  # [B, 1], as generate() will choose from what is returned
        self.logprobs.append((scores.gather(-1, token) - scores.logsumexp(-1, keepdim=True)).squeeze(-1))
        return picked


def _row_seed(seed: int, ids: list[int]) -> int:
    digest = hashlib.blake2b(repr((seed, ids)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class StopStrings(StoppingCriteria):
    """Ends a row once its new text holds a stop string."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: tuple[str, ...], start: int) -> None:
        self._decode, self._stop, self._start = decode, stop, start
        self._done: list[bool] = []

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Which rows are done, [B] bool."""
        rows = input_ids[:, self._start :].tolist()
        self._done = self._done or [False] * len(rows)
        for index, row in enumerate(rows):
            self._done[index] = self._done[index] or first_stop(self._decode(row), self._stop) is not None
        return torch.tensor(self._done, device=input_ids.device)


class Cancelled(StoppingCriteria):
    """Ends everything once the event is set."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Which rows are done, [B] bool: all or none."""
        return torch.full((input_ids.shape[0],), self._event.is_set(), device=input_ids.device, dtype=torch.bool)


class QueueStreamer(BaseStreamer):
    """Hands new token ids to another thread.

    Transformers' ``TextIteratorStreamer`` is not used: it cannot pass an exception on, and does not hold back what may
    turn out to be a stop string.
    """

    def __init__(self) -> None:
        self.items: queue.Queue[int | BaseException | None] = queue.Queue()
        self._prompt = True

    def put(self, value: Any) -> None:
        """Take the new tokens of a step, [1] token ids (the first call holds the prompt)."""
        if self._prompt:  # generate() sends the prompt first
            self._prompt = False
            return
        for token in value.flatten().tolist():
            self.items.put(int(token))

    def end(self) -> None:
        """Nothing to flush: the thread puts the end mark itself, after generate() has returned."""
