"""A reranker for a run's corpus: MiniLM as a cross-encoder, trained on the run's questions.

No published cross-encoder is at hand without a model hub, so this makes one: each question, in one
of its wordings, with its passage and its mined negatives; the softmax over their scores.  A fifth
of the titles is set aside, and says how often the passage is scored above its negatives.  Then

    python -m benchmarks.train_reranker --store runs/demo --out runs/reranker
    python -m jobs.evaluate_systems --config demo storage.root_uri=runs/demo \\
        search.reranker=runs/reranker search.rerank_depth=16 evaluation.num_answers=0 \\
        evaluation.arms={} evaluation.systems=[stage1,stage1_bm25,stage1_reranked]

fills the report's row with a reranker; with answers, stage 2 would be trained anew on what the
reranker finds.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.mnrl import HELDOUT_SHARE, Data, text_of
from invar_ray.config.load import load_config
from invar_ray.models.tiny import minilm_folder
from invar_ray.pipeline import Pipeline

NEGATIVES = 4
MAX_TOKENS = 192


class Trainer:
    """MiniLM with a new head of one label."""

    def __init__(self, data: Data, seed: int) -> None:
        torch.manual_seed(seed)
        self.trainset, self.draw = data.trainset, random.Random(seed)
        self.tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
        self.model = AutoModelForSequenceClassification.from_pretrained(
            minilm_folder(), num_labels=1
        )

    def group(self, row: int, wording: int) -> list[tuple[str, str]]:
        """A question with its passage, which comes first, and with as many others."""
        mined = self.trainset.negatives[row]
        others = [s for s in range(len(self.trainset.titles)) if s != self.trainset.positives[row]]
        slots = [*mined, *self.draw.sample(others, NEGATIVES)][:NEGATIVES]
        question = self.trainset.wordings[row][wording]
        return [
            (question, text_of(self.trainset, s)) for s in (self.trainset.positives[row], *slots)
        ]

    def scores(self, groups: Sequence[Sequence[tuple[str, str]]]) -> Tensor:
        """[questions, 1 + negatives] logits."""
        pairs = [pair for group in groups for pair in group]
        inputs = self.tokenizer(
            [pair[0] for pair in pairs],
            [pair[1] for pair in pairs],
            truncation="only_second",
            max_length=MAX_TOKENS,
            padding=True,
            return_tensors="pt",
        )
        with torch.autocast("cpu", torch.bfloat16):
            logits: Tensor = self.model(**inputs).logits
        return logits.float().view(len(groups), -1)

    def train(self, rows: Sequence[int], steps: int, size: int, rate: float) -> None:
        """AdamW, a linear warm-up over a tenth, linear decay."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate)
        warm = max(1, steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
        )
        queue, started, total = list[int](), time.monotonic(), 0.0
        self.model.train()
        for step in range(1, steps + 1):
            if len(queue) < size:
                queue = self.draw.sample(list(rows), len(rows))
            batch, queue = queue[:size], queue[size:]
            wordings = [self.draw.randrange(len(self.trainset.wordings[row])) for row in batch]
            groups = [self.group(row, w) for row, w in zip(batch, wordings, strict=True)]
            loss = functional.cross_entropy(
                self.scores(groups), torch.zeros(len(batch), dtype=torch.long)
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
            if step % 20 == 0:
                left = (time.monotonic() - started) / step * (steps - step)
                print(f"step {step}: loss {total / 20:.3f}, {left:.0f} s left", flush=True)
                total = 0.0
        self.model.eval()

    @torch.inference_mode()
    def first(self, rows: Sequence[int]) -> float:
        """Share of the questions whose passage is scored above all its negatives."""
        best = [bool(self.scores([self.group(row, 0)]).argmax() == 0) for row in rows]
        return sum(best) / len(best)

    def save(self, folder: Path) -> None:
        """Weights and tokenizer, as ``search.reranker`` takes them."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def main() -> None:
    """Read the arguments, train, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", type=Path, required=True, help="of a run that was made")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--config", default="demo")
    parser.add_argument("--set", nargs="*", default=[], help="more settings of that run")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--questions", type=int, default=8, help="a step")
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    settings: list[Any] = [f"storage.root_uri={args.store}", *args.set]
    with Pipeline(load_config(args.config, settings), quiet=True) as run:
        data = Data(run)
    data.trainset.hold_out(HELDOUT_SHARE, data.config.seed)
    aside = set(data.trainset.heldout)
    rows = [row for row in range(len(data.trainset)) if row not in aside]
    trainer, started = Trainer(data, args.seed), time.process_time()
    trainer.train(rows, args.steps, args.questions, args.rate)
    first = trainer.first(sorted(aside))
    print(
        f"of {len(aside)} questions set aside, the passage is first of {1 + NEGATIVES}: {first:.3f}"
    )
    print(f"{time.process_time() - started:.0f} CPU s; written to {args.out}")
    trainer.save(args.out)


if __name__ == "__main__":
    main()
