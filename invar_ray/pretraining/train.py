"""The pre-training of a small base: reading first, a little language modelling, and alignment to MiniLM.

Three losses share every few steps: the answers' tokens of :mod:`invar_ray.pretraining.reading`; next tokens of plain
text; and the KL divergence from MiniLM's similarities to the base's own, over small batches of questions and
passages, with mean and with last-token pooling, so that the base still retrieves (without it, Recall@5 fell from 0.61
to 0.10 within minutes).

The curriculum goes on when a level is learned: one made-up passage, then several, then the whole mixture.  Everything
runs in one process; matrices of the layers are updated by Muon, which needs fewer steps here, the rest by AdamW.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import json
import math
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
from transformers import AttentionInterface, AutoModel, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from invar_ray.models.tiny import minilm_folder
from invar_ray.pretraining.reading import Item, ReadingMixture

_ATTENTION = "invar_ray_matmul"
_LONGEST = 330  # tokens of a row


@dataclass(frozen=True)
class PretrainConfig:
    """One run.

    Attributes:
        steps: optimizer steps.
        step_tokens: tokens of reading in a step.
        learning_rate: of Muon (in AdamW's scale); constant, then linear to 0 over the last 40 %.
        embedding_learning_rate: of the tied embeddings.
        level_losses: mean loss of 60 steps below which the curriculum leaves levels 0 and 1.
        level_shares: shares of the steps after which it leaves them anyway.
        made_up_share: of the mixture; ``None`` lets it fall from 0.55 to 0.15.
        alignment_every: steps from one alignment to the next.
        alignment_pairs: question and passage pairs that MiniLM scores beforehand; 0 switches alignment off.
        alignment_temperature: of cosines.
        seed: of data and order.
    """

    steps: int = 2600
    step_tokens: int = 2500
    learning_rate: float = 3e-3
    embedding_learning_rate: float = 3e-4
    gain_learning_rate: float = 1e-3
    level_losses: tuple[float, float] = (1.2, 1.5)
    level_shares: tuple[float, float] = (0.12, 0.3)
    made_up_share: float | None = None
    alignment_every: int = 3
    alignment_weight: float = 1.0
    alignment_pairs: int = 3000
    alignment_temperature: float = 0.05
    alignment_batch: int = 24
    language_weight: float = 0.3
    language_rows: int = 14
    bf16: bool = True
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
        self.model, self.tokenizer, self.data = model, tokenizer, data
        self.config = config or PretrainConfig()
        self.rng = random.Random(self.config.seed)
        self.level = 0
        self._recent: deque[float] = deque(maxlen=60)
        self._since = 0  # step at which the level began
        self._mixed_from = 0.0
        self._waiting: list[list[tuple[list[int], list[range]]]] = []
        self._pairs = _AlignmentPairs(self) if self.config.alignment_pairs else None
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
        started, tokens, parts = time.monotonic(), 0, {"alignment": math.nan, "language": math.nan}
        losses: list[float] = []
        try:
            for step in range(self.config.steps):
                progress = self._curriculum(step)
                rate = self._rate(step)
                loss, count = self._reading_step(progress)
                tokens += count
                if self._pairs and step % self.config.alignment_every == 2:
                    parts["alignment"] = self._pairs.backward()
                if self.config.language_weight and step % 8 == 0:
                    parts["language"] = self._language_step()
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
                        "level": self.level,
                        "progress": round(progress, 3),
                        "reading_loss": round(sum(losses) / len(losses), 4),
                        **{f"{name}_loss": round(value, 4) for name, value in parts.items() if not math.isnan(value)},
                        "tokens": tokens,
                        "tokens_per_second": round(tokens / seconds),
                        "seconds": round(seconds),
                        "eta_seconds": round(seconds / (step + 1) * (self.config.steps - step - 1)),
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
        for number, ids in enumerate(self.tokenizer(texts, add_special_tokens=False)["input_ids"]):
            begin = len(row)
            row += ids
            if number % 2:
                row.append(self.tokenizer.eos_token_id)
                spans.append(range(begin, len(row)))
            if len(row) > _LONGEST:
                break
        return row, [span for span in spans if span.stop <= len(row)]

    def states(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Padded ids [B, T] and last hidden states [B, T, H]; padding stands right, where nothing looks at it."""
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
        with self._precision():
            return ids, self.model.model(input_ids=ids, use_cache=False).last_hidden_state

    def _reading_step(self, progress: float) -> tuple[float, int]:
        if not self._waiting:
            self._waiting = self._microbatches(progress)
        taken, tokens = [], 0
        while self._waiting and tokens < self.config.step_tokens:
            batch = self._waiting.pop()
            taken.append(batch)
            tokens += sum(len(row) for row, _ in batch)
        num_targets = sum(len(span) for batch in taken for _, spans in batch for span in spans)
        total = 0.0
        for batch in taken:
            places = [(b, t) for b, (_, spans) in enumerate(batch) for span in spans for t in span]
            loss = self._next_token_loss([row for row, _ in batch], places)
            (loss / num_targets).backward()
            total += float(loss.detach())
        return total / num_targets, tokens

    def _microbatches(self, progress: float) -> list[list[tuple[list[int], list[range]]]]:
        """Four steps' worth of rows, sorted by length into batches, the batches mixed."""
        rows, tokens = [], 0
        while tokens < 4 * self.config.step_tokens:
            row, spans = self.encode(self._draw(progress))
            if spans and len(row) <= _LONGEST:
                rows.append((row, spans))
                tokens += len(row)
        rows.sort(key=lambda item: len(item[0]))
        batches: list[list[tuple[list[int], list[range]]]] = [[]]
        for item in rows:
            if batches[-1] and len(item[0]) * (len(batches[-1]) + 1) > self.config.step_tokens:
                batches.append([])
            batches[-1].append(item)
        self.rng.shuffle(batches)
        return batches

    def _draw(self, progress: float) -> Item:
        chance = self.rng.random()
        if self.level == 0:
            return self.data.copying(self.rng, 0)
        if chance < 0.8 if self.level == 1 else chance >= 0.85:
            return self.data.copying(self.rng, 1)
        return self.data.draw(self.rng, progress, self.config.made_up_share)

    def _language_step(self) -> float:
        texts = [self.data.text(self.rng) for _ in range(self.config.language_rows)]
        rows = [ids[:112] for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]
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

    def _curriculum(self, step: int) -> float:
        share, loss = step / self.config.steps, sum(self._recent) / max(1, len(self._recent))
        learned = step - self._since > 60 * (1 + self.level)
        if self.level < 2:
            learned = learned and loss < self.config.level_losses[self.level]
            if learned or share > self.config.level_shares[self.level]:
                self.level, self._since, self._mixed_from = self.level + 1, step, share
                self._waiting = []
        if self.level < 2:
            return 0.12 * self.level
        return min(1.0, 0.25 + 0.75 * (share - self._mixed_from) / max(0.05, 0.85 - self._mixed_from))

    def _rate(self, step: int) -> float:
        share = step / self.config.steps
        return min(1.0, (step + 1) / 20) * (1.0 if share < 0.6 else max(0.02, (1.0 - share) / 0.4))

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.config.bf16)


class _AlignmentPairs:
    """Pairs with MiniLM's vectors, and the loss on them."""

    def __init__(self, owner: Pretraining) -> None:
        self.owner, config = owner, owner.config
        self.rng = random.Random(config.seed + 1)
        pairs = [owner.data.pair(self.rng) for _ in range(config.alignment_pairs)]
        questions, passages = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        self.teacher = (_minilm_vectors(questions), _minilm_vectors(passages))
        end = [owner.tokenizer.eos_token_id]
        self.rows = tuple(
            [ids[:longest] + end for ids in owner.tokenizer(texts, add_special_tokens=False)["input_ids"]]
            for texts, longest in ((questions, 48), (passages, 96))
        )

    def backward(self) -> float:
        config = self.owner.config
        chosen = self.rng.sample(range(len(self.rows[0])), config.alignment_batch)
        last = self.rng.random() < 0.35
        ours = [self._vectors([rows[index] for index in chosen], last) for rows in self.rows]
        theirs = [vectors[chosen] for vectors in self.teacher]
        loss = functional.kl_div(
            self._similarities(*ours).log_softmax(-1), self._similarities(*theirs).softmax(-1), reduction="batchmean"
        )
        (loss * config.alignment_weight).backward()
        return float(loss.detach())

    def _similarities(self, questions: Tensor, passages: Tensor) -> Tensor:
        """[3 B, B]: questions with passages, passages and questions among themselves (not each with itself)."""
        itself = 10.0 * torch.eye(len(questions))
        blocks = (questions @ passages.T, passages @ passages.T - itself, questions @ questions.T - itself)
        return torch.cat(blocks) / self.owner.config.alignment_temperature

    def _vectors(self, rows: list[list[int]], last: bool) -> Tensor:
        states = self.owner.states(rows)[1].float()
        sizes = torch.tensor([len(row) for row in rows])
        if last:
            return functional.normalize(states[torch.arange(len(rows)), sizes - 1], dim=-1)
        real = torch.arange(states.shape[1])[None] < sizes[:, None]  # [B, T]
        return functional.normalize((states * real[..., None]).sum(1) / sizes[:, None], dim=-1)


@torch.no_grad()
def _minilm_vectors(texts: Sequence[str]) -> Tensor:
    """[N, 384], unit length."""
    folder = str(minilm_folder())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    found = torch.empty(len(texts), 384)
    for begin in range(0, len(order), 32):
        chosen = order[begin : begin + 32]
        batch = tokenizer([texts[i] for i in chosen], padding=True, truncation=True, max_length=96, return_tensors="pt")
        states, real = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        found[chosen] = functional.normalize((states * real).sum(1) / real.sum(1), dim=-1)
    return found


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
