"""The pre-training of a small base: reading first, a little language modelling, and alignment to MiniLM.

Three losses share every few steps: the answers' tokens of :mod:`invar_ray.pretraining.reading`; next tokens of plain
text; and alignment to MiniLM (:mod:`invar_ray.pretraining.align`), so that the base still retrieves.

The curriculum goes on when a level is learned: one made-up passage, then several, then the whole mixture.  Everything
runs in one process; matrices of the layers are updated by Muon, which needs fewer steps here, the rest by AdamW.  The
compiled layers are nearly twice as fast as eager ones on a CPU, but each shape is compiled once (half a minute), so
rows are padded to a few lengths and a step is one batch.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, LlamaForCausalLM, PreTrainedTokenizerFast

from invar_ray.pretraining.align import Alignment
from invar_ray.pretraining.reading import Item, ReadingMixture
from invar_ray.text.tokens import text_ids

_ATTENTION = "invar_ray_matmul"
LENGTHS = (64, 112, 160, 224, 320)
"""Tokens that rows are padded to."""
_LONGEST = LENGTHS[-1]


@dataclass(frozen=True)
class PretrainConfig:
    """One run.

    Attributes:
        steps: optimizer steps.
        minutes: if set, the schedule goes by the clock where that is ahead of the steps, so that a run ends in time
            with its learning rate fallen; such a run does not repeat.
        step_tokens: tokens of reading in a step, padding included.
        learning_rate: of Muon (in AdamW's scale); constant, then linear to 0 over the last 40 %.
        embedding_learning_rate: of the tied embeddings.
        level_losses: mean loss of 60 steps below which the curriculum leaves levels 0 and 1.
        level_shares: shares of the steps after which it leaves them anyway.
        made_up_share: of the mixture; ``None`` lets it fall from 0.6 to 0.35.
        alignment_every: steps from one alignment to the next.
        alignment_weight: of the whole alignment loss, which only these steps have.
        alignment_pairs: question and passage pairs that MiniLM encodes beforehand; 0 switches alignment off.
        alignment_temperature: of cosines.
        language_every: steps from one batch of plain text to the next.
        compiled: compile the layers (:func:`torch.compile`); worth it from some hundred steps on.
        bf16: matrix products in bf16; whether they are faster than fp32 depends on the processor (docs/log.md).
        seed: of data and order.
    """

    steps: int = 5000
    minutes: float | None = None
    step_tokens: int = 2560
    learning_rate: float = 3e-3
    embedding_learning_rate: float = 3e-4
    gain_learning_rate: float = 1e-3
    level_losses: tuple[float, float] = (1.2, 1.5)
    level_shares: tuple[float, float] = (0.12, 0.3)
    made_up_share: float | None = None
    alignment_every: int = 3
    alignment_weight: float = 1.0
    alignment_pairs: int = 10_000
    alignment_temperature: float = 0.05
    language_every: int = 16
    language_weight: float = 0.3
    compiled: bool = True
    bf16: bool = False
    seed: int = 7


class Pretraining:
    """Trains ``model`` in place.

    Args:
        model: from :func:`invar_ray.pretraining.start.start_model`.
        tokenizer: its own.
        data: what it reads.
        config: the run.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        data: ReadingMixture,
        config: PretrainConfig | None = None,
    ) -> None:
        self.model, self.tokenizer, self.data = model.eval(), tokenizer, data
        self.config = config or PretrainConfig()
        self.rng = random.Random(self.config.seed)
        self.level = 0
        self._recent: deque[float] = deque(maxlen=60)
        self._since = 0  # step at which the level began
        self._mixed_from = 0.0
        self._waiting: dict[int, list[tuple[list[int], list[range]]]] = {length: [] for length in LENGTHS}
        self._body: Any = torch.compile(model.model, dynamic=False) if self.config.compiled else model.model
        self._pairs = (
            Alignment(
                [data.pair(self.rng) for _ in range(self.config.alignment_pairs)],
                tokenizer,
                self.states,
                rows=self.batch_rows(LENGTHS[0]),
                longest=LENGTHS[0],
                temperature=self.config.alignment_temperature,
                seed=self.config.seed + 1,
            )
            if self.config.alignment_pairs
            else None
        )
        matrices = [
            weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed_tokens" not in name
        ]
        gains = [weight for weight in model.parameters() if weight.ndim == 1]
        self._others = [model.model.embed_tokens.weight, *gains]
        self._optimizers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(
                matrices,
                lr=self.config.learning_rate,
                weight_decay=0.01,
                momentum=0.95,
                ns_steps=3,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(
                [
                    {"params": [model.model.embed_tokens.weight], "lr": self.config.embedding_learning_rate},
                    {"params": gains, "lr": self.config.gain_learning_rate},
                ],
                betas=(0.9, 0.98),
                weight_decay=0.0,
            ),
        )
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["base"] = group["lr"]

    def run(self, folder: Path) -> Iterator[dict[str, Any]]:
        """Train; yields a line of the log every 50 steps and appends it to ``folder/pretraining.jsonl``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "pretraining.json").write_text(json.dumps(asdict(self.config), indent=1), encoding="utf-8")
        AttentionInterface.register(_ATTENTION, _matmul_attention)
        before, self.model.config._attn_implementation = self.model.config._attn_implementation, _ATTENTION
        self.model.train()
        started, tokens = time.monotonic(), 0
        parts: dict[str, float] = {}
        losses: list[float] = []
        try:
            for step in range(self.config.steps):
                share = self._share(step, time.monotonic() - started)
                if share >= 1.0:
                    break
                progress = self._curriculum(step, share)
                rate = min(1.0, (step + 1) / 20) * (1.0 if share < 0.6 else max(0.02, (1.0 - share) / 0.4))
                loss, count = self._reading_step(progress)
                tokens += count
                if self._pairs and step % self.config.alignment_every == self.config.alignment_every - 1:
                    parts |= self._pairs.backward(self.config.alignment_weight)
                if self.config.language_weight and step % self.config.language_every == 0:
                    parts["language_loss"] = self._language_step()
                torch.nn.utils.clip_grad_norm_(self._others, 1.0)
                for optimizer in self._optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = group["base"] * rate
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                self._recent.append(loss)
                losses.append(loss)
                if (step + 1) % 50 == 0 or step + 1 == self.config.steps:
                    seconds = time.monotonic() - started
                    line = {
                        "step": step + 1,
                        "share": round(share, 4),
                        "level": self.level,
                        "progress": round(progress, 3),
                        "reading_loss": round(sum(losses) / len(losses), 4),
                        **{name: round(value, 4) for name, value in parts.items()},
                        "tokens": tokens,
                        "tokens_per_second": round(tokens / seconds),
                        "seconds": round(seconds),
                        "eta_seconds": round(seconds * (1.0 - share) / max(share, 1e-9)),
                    }
                    losses = []
                    with open(folder / "pretraining.jsonl", "a", encoding="utf-8") as stream:
                        stream.write(json.dumps(line) + "\n")
                    yield line
        finally:
            self.model.config._attn_implementation = before
            self.model.eval()

    def encode(self, item: Item) -> tuple[list[int], list[range]]:
        """Token ids of a row, and where its targets (each with an end token) stand."""
        texts = [text for part in item.parts for text in part]
        row: list[int] = []
        spans: list[range] = []
        for number, ids in enumerate(text_ids(self.tokenizer, texts, framed=False)):
            begin = len(row)
            row += ids
            if number % 2:
                row.append(self.tokenizer.eos_token_id)
                spans.append(range(begin, len(row)))
            if len(row) > _LONGEST:
                break
        return row, [span for span in spans if span.stop <= len(row)]

    def text_rows(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts to encode, each with its end token."""
        encoded = text_ids(self.tokenizer, texts, framed=False)
        return [ids[: _LONGEST - 1] + [self.tokenizer.eos_token_id] for ids in encoded]

    def batch_rows(self, length: int) -> int:
        """Rows of ``length`` tokens that make a step."""
        return max(1, self.config.step_tokens // length)

    def states(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Padded ids [B, T] and last hidden states [B, T, H]; padding stands right, where nothing looks at it.

        In training T is one of :data:`LENGTHS` and B what makes a step, so that few shapes are compiled.
        """
        size, length = len(rows), max(map(len, rows))
        if self.model.training:
            length = next(fixed for fixed in LENGTHS if fixed >= length)
            size = max(size, self.batch_rows(length))
        ids = torch.full((size, length), self.tokenizer.pad_token_id)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
        body = self._body if self.model.training else self.model.model
        with self._precision():
            states = body(input_ids=ids, use_cache=False).last_hidden_state
        return ids[: len(rows)], states[: len(rows)]

    def _reading_step(self, progress: float) -> tuple[float, int]:
        batch = self._next_batch(progress)
        places = [(b, t) for b, (_, spans) in enumerate(batch) for span in spans for t in span]
        loss = self._next_token_loss([row for row, _ in batch], places) / len(places)
        loss.backward()
        return float(loss.detach()), sum(len(row) for row, _ in batch)

    def _next_batch(self, progress: float) -> list[tuple[list[int], list[range]]]:
        """Rows are drawn until those of one length make a step; the others wait."""
        while True:
            row, spans = self.encode(self._draw(progress))
            if not spans or len(row) > _LONGEST:
                continue
            length = next(length for length in LENGTHS if length >= len(row))
            waiting = self._waiting[length]
            waiting.append((row, spans))
            if len(waiting) == self.batch_rows(length):
                self._waiting[length] = []
                return waiting

    def _draw(self, progress: float) -> Item:
        chance = self.rng.random()
        if self.level == 0:
            return self.data.copying(self.rng, 0)
        if chance < 0.8 if self.level == 1 else chance >= 0.85:
            return self.data.copying(self.rng, 1)
        return self.data.draw(self.rng, progress, self.config.made_up_share)

    def _language_step(self) -> float:
        length = LENGTHS[1]
        texts = [self.data.text(self.rng) for _ in range(self.batch_rows(length))]
        rows = [ids[:length] for ids in text_ids(self.tokenizer, texts, framed=False)]
        # The output layer costs more than the body: a quarter of the places is enough.
        places = [(b, t) for b, row in enumerate(rows) for t in range(1, len(row)) if self.rng.random() < 0.25]
        loss = self._next_token_loss(rows, places) / len(places)
        (loss * self.config.language_weight).backward()
        return float(loss.detach())

    def _next_token_loss(self, rows: Sequence[Sequence[int]], places: Sequence[tuple[int, int]]) -> Tensor:
        """Summed cross-entropy, in nats, of the tokens at ``places`` (row, position)."""
        ids, states = self.states(rows)
        row, position = torch.tensor(places).T
        with self._precision():
            logits = self.model.lm_head(states[row, position - 1])  # [places, V]
        return functional.cross_entropy(logits.float(), ids[row, position], reduction="sum")

    def _share(self, step: int, seconds: float) -> float:
        by_clock = seconds / (60 * self.config.minutes) if self.config.minutes else 0.0
        return max(step / self.config.steps, by_clock)

    def _curriculum(self, step: int, share: float) -> float:
        loss = sum(self._recent) / max(1, len(self._recent))
        learned = step - self._since > 60 * (1 + self.level)
        if self.level < 2:
            learned = learned and loss < self.config.level_losses[self.level]
            if learned or share > self.config.level_shares[self.level]:
                self.level, self._since, self._mixed_from = self.level + 1, step, share
                self._waiting = {length: [] for length in LENGTHS}
        if self.level < 2:
            return 0.12 * self.level
        return min(1.0, 0.25 + 0.75 * (share - self._mixed_from) / max(0.05, 0.85 - self._mixed_from))

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.config.bf16)


def _matmul_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, dropout: float = 0.0, **_: Any
) -> tuple[Tensor, None]:
    """Causal attention by plain products: on a CPU in bf16 a quarter faster to train than torch's fused one."""
    scores = query @ key.transpose(-1, -2)  # [B, heads, T, T]
    length = scores.shape[-1]
    future = torch.full((length, length), -1e9, dtype=scores.dtype).triu_(1)
    with torch.autocast("cpu", enabled=False):
        weights = torch.softmax(scores * scaling + future, -1)
    return (weights @ value).transpose(1, 2).contiguous(), None
