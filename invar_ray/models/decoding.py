"""Parts that generation is made of: choosing tokens, ending rows, handing tokens to another thread.

Shape legend: B rows · T tokens · V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

_GREEDY_BELOW = 1e-5
Finish = Literal["eos", "stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one row is continued.

    Attributes:
        max_new_tokens: longest continuation in tokens.
        stop: strings that end a continuation where they first occur in it.
        temperature: 0 takes the likeliest token (greedy), and so does any below 1e-5, by which
            logits cannot be divided; above, samples from softmax(logits / temperature).
        top_p: sample only from the fewest tokens whose probabilities reach this sum; 1 leaves all.
        seed: of the sampling.  The draw depends on seed and prompt only, not on the batch.

    Raises:
        ValueError: if a value is out of range.
    """

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if any(not text for text in self.stop):
            raise ValueError(f"stop must be a sequence of non-empty strings, got {self.stop!r}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be 0 or above, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")


@dataclass(slots=True)
class Row:
    """One continuation while it is being made.

    Attributes:
        sampling: how it is continued.
        prompt: token ids of the prompt.
        on_text: called in the generating thread with each piece of text that no later token can
            change.
        cancelled: asked once a step; true ends the row.
        ids: new tokens so far, the end token included.
        finish: why it ended; ``None`` while it goes on.
        sent: what ``on_text`` got so far.
    """

    sampling: Sampling
    prompt: list[int]
    on_text: Callable[[str], None] | None = None
    cancelled: Callable[[], bool] | None = None
    ids: list[int] = field(default_factory=list)
    finish: Finish | None = None
    sent: str = ""

    def take(
        self, token: int, eos_ids: Collection[int], decode: Callable[[Sequence[int]], str]
    ) -> None:
        """Add the next token, and end the row or pass text on where that is due."""
        self.ids.append(token)
        if token in eos_ids:
            self.finish = "eos"
            return
        if self.sampling.stop or self.on_text is not None:
            text = decode(self.ids)
            if first_stop(text, self.sampling.stop) is not None:
                self.finish = "stop"
            self.send(steady(text, self.sampling.stop))
        if self.finish is None and len(self.ids) >= self.sampling.max_new_tokens:
            self.finish = "length"
        if self.finish is None and self.cancelled is not None and self.cancelled():
            self.finish = "cancelled"

    def send(self, text: str) -> None:
        """Pass on what ``text`` has more than was sent."""
        if self.on_text is not None and len(text) > len(self.sent) and text.startswith(self.sent):
            self.on_text(text[len(self.sent) :])
            self.sent = text


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
        (n for string in stop for n in range(1, len(string)) if text.endswith(string[:n])),
        default=0,
    )  # may be the start of a stop string
    return text[: len(text) - longest].strip()


class TokenPicker(LogitsProcessor):
    """Notes each chosen token's log-probability, and samples by adding Gumbel noise.

    argmax(logits / t + Gumbel noise) is an exact sample of softmax(logits / t).  With a random
    generator per row, seeded by seed and prompt, a row's draw does not depend on its batch or on
    other threads, as ``torch.multinomial`` with the global generator would.  Log-probabilities are
    noted here, B numbers a step, since keeping the logits takes B x V.  They are those of the
    model, before temperature and ``top_p``.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.logprobs: list[Tensor] = []  # one [B] per step
        self._drawn = [
            (
                index,
                row.sampling,
                torch.Generator().manual_seed(_row_seed(row.sampling.seed, row.prompt)),
            )
            for index, row in enumerate(rows)
            if row.sampling.temperature >= _GREEDY_BELOW
        ]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Scores [B, V] to choose the next token from: their argmax is it."""
        scores = scores.float()  # [B, V]
        picked = scores.clone() if self._drawn else scores
        tiny = torch.finfo(torch.float32).tiny
        for index, sampling, random in self._drawn:
            uniform = torch.rand(scores.shape[-1], generator=random)  # [V]
            noise = -(-uniform.clamp_min(tiny).log()).clamp_min(tiny).log()  # [V], Gumbel
            scaled = _nucleus(scores[index] / sampling.temperature, sampling.top_p)
            picked[index] = scaled + noise.to(scores.device)
        token = picked.argmax(
            dim=-1, keepdim=True
        )  # [B, 1], as generate() will choose from what is returned
        self.logprobs.append(
            (scores.gather(-1, token) - scores.logsumexp(-1, keepdim=True)).squeeze(-1)
        )
        return picked


def _nucleus(scores: Tensor, top_p: float) -> Tensor:
    """[V] scores with -inf outside the fewest tokens whose probabilities reach ``top_p`` (the
    likeliest stays).
    """
    if top_p >= 1:
        return scores
    ordered, places = scores.softmax(-1).sort(descending=True)
    outside = (
        ordered.cumsum(-1) - ordered >= top_p
    )  # the sum before this token has reached it already
    return scores.masked_fill(torch.zeros_like(outside).scatter(-1, places, outside), float("-inf"))


def _row_seed(seed: int, ids: list[int]) -> int:
    digest = hashlib.blake2b(repr((seed, ids)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class RowEnds(StoppingCriteria):
    """Hands each row its new tokens and ends those that are done.

    Transformers' own streamers are not used: they know one row only, cannot pass an exception on,
    and do not hold back what may turn out to be a stop string.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        start: int,
        eos_ids: Collection[int],
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        self._rows, self._start, self._eos_ids, self._decode = rows, start, eos_ids, decode
        self._seen = 0

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Which rows are done, [B] bool."""
        new = input_ids[:, self._start + self._seen :].tolist()
        self._seen = input_ids.shape[1] - self._start
        for row, tokens in zip(self._rows, new, strict=True):
            for token in tokens:
                if row.finish is None:
                    row.take(token, self._eos_ids, self._decode)
        done = [row.finish is not None for row in self._rows]
        return torch.tensor(done, device=input_ids.device)
