"""What a user would train instead: MiniLM by sentence-transformers' MultipleNegativesRankingLoss.

The data and the budget are a run's own: its train questions as asked, each with its passage and
one mined negative, its steps and its batch. All weights are trained, as their documentation does
(AdamW, a linear warm-up over a tenth, linear decay), at each of ``--rates``; the rate is chosen on
held-out train titles, and the dev questions are asked once, at that rate, for each of ``--seeds``.
Every number comes from the functions that fill the report.

    python -m benchmarks.mnrl --store runs/demo --config demo
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from invar_ray.answering.retriever import Passages
from invar_ray.config.load import load_config
from invar_ray.evaluation.measure import FoundFamily, retrieval_columns
from invar_ray.evaluation.scoring import answer_rule
from invar_ray.evaluation.variance import known
from invar_ray.models.tiny import minilm_folder
from invar_ray.pipeline import Pipeline
from invar_ray.schema import Hit
from invar_ray.steps.questions import load_examples, load_wordings
from invar_ray.training.batches import Trainset

RATES = (2e-5, 1e-4, 3e-4)
HELDOUT_SHARE = 0.2
OVERLAP_K = 5
SHOWN = ("recall_at_1", "recall_at_5", "worst_recall_at_5", "overlap_at_5", "overlap_at_10")


class Data:
    """A run's training set and dev questions, and the passages that both are searched in."""

    def __init__(self, run: Pipeline) -> None:
        self.config = run.config
        table = Passages(run.passages)
        self.passages = table.rows(range(len(table)))
        self.trainset = Trainset(run.trainset)
        wordings = load_wordings(run.questions, "dev")
        self.dev = [
            (one.id, tuple(wordings[one.id]), tuple(one.answers), tuple(one.positive_ids))
            for one in load_examples(run.questions, "dev")
        ]
        self.train_gold = {
            one.id: tuple(one.positive_ids) for one in load_examples(run.questions, "train")
        }

    def question(self, row: int) -> tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """A train question as :func:`measured` takes it."""
        name = self.trainset.question_ids[row]
        wordings, answers = self.trainset.wordings[row], self.trainset.answers[row]
        return name, tuple(wordings), tuple(answers), self.train_gold[name]


def new_model() -> SentenceTransformer:
    """MiniLM as it is published."""
    return SentenceTransformer(str(minilm_folder()), device="cpu")


def train(data: Data, rows: Sequence[int], steps: int, rate: float, seed: int) -> Any:
    """MiniLM after ``steps`` batches of these questions."""
    model, trainset = new_model(), data.trainset
    loss_of = MultipleNegativesRankingLoss(model)
    size = data.config.retriever.global_batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    draw, queue = random.Random(seed), list[int]()
    torch.manual_seed(seed)
    model.train()
    for _ in range(steps):
        if len(queue) < size:
            queue = draw.sample(list(rows), len(rows))
        batch, queue = queue[:size], queue[size:]
        columns = [
            [trainset.wordings[row][0] for row in batch],
            [text_of(trainset, trainset.positives[row]) for row in batch],
            [text_of(trainset, negative_of(trainset, row, draw)) for row in batch],
        ]
        loss = loss_of([model.preprocess(texts) for texts in columns], None)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def negative_of(trainset: Trainset, row: int, draw: random.Random) -> int:
    """The slot of a question's first mined negative; any other slot where none was found."""
    if trainset.negatives[row]:
        return trainset.negatives[row][0]
    return draw.choice([s for s in range(len(trainset.titles)) if s != trainset.positives[row]])


def text_of(trainset: Trainset, slot: int) -> str:
    """Title and text of a slot."""
    return f"{trainset.titles[slot]} {trainset.slot_texts[slot][0]}"


def measured(
    model: Any, data: Data, asked: Sequence[tuple[str, tuple[str, ...], Any, Any]]
) -> dict[str, float]:
    """What the report shows of retrieval, of these (id, wordings, answers, gold documents)."""
    top_k = data.config.evaluation.top_k
    texts = [f"{one.title} {one.text}" for one in data.passages]
    passages = model.encode(texts, normalize_embeddings=True)
    families = []
    for name, wordings, answers, gold in asked:
        scores = model.encode(list(wordings), normalize_embeddings=True) @ passages.T  # [E, N]
        best = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
        hits = tuple(
            tuple(
                Hit(p.id, p.document_id, rank, float(line[row]), p.title, p.text, p.uri)
                for rank, row in enumerate(rows, 1)
                for p in (data.passages[row],)
            )
            for line, rows in zip(scores, best, strict=True)
        )
        families.append(FoundFamily(name, wordings, answers, gold, hits))
    columns = retrieval_columns(
        families, OVERLAP_K, top_k, answer_rule(data.config.evaluation.answer_rule)
    )
    return {name: round(fmean(known(columns[name])), 4) for name in SHOWN}


def main() -> None:
    """Read the arguments, train, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", type=Path, required=True, help="of a run that was made")
    parser.add_argument("--config", default="demo")
    parser.add_argument("--steps", type=int, help="in place of the recipe's")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with Pipeline(load_config(args.config, [f"storage.root_uri={args.store}"]), quiet=True) as run:
        data = Data(run)
    steps = args.steps or data.config.retriever.steps
    every = range(len(data.trainset))
    data.trainset.hold_out(HELDOUT_SHARE, data.config.seed)
    aside = set(data.trainset.heldout)
    heldout = [data.question(row) for row in aside]
    record: dict[str, Any] = {"steps": steps, "questions": len(data.trainset), "dev": len(data.dev)}

    def say(name: str, found: dict[str, float], started: float) -> dict[str, float]:
        record[name] = found
        print(f"{name}: {found}, {time.process_time() - started:.0f} CPU s", flush=True)
        return found

    started = time.process_time()
    say("MiniLM, held-out train", measured(new_model(), data, heldout), started)
    say("MiniLM, dev", measured(new_model(), data, data.dev), started)
    chosen: dict[float, float] = {}
    for rate in args.rates:
        started = time.process_time()
        model = train(data, [row for row in every if row not in aside], steps, rate, args.seeds[0])
        found = say(f"MNRL, {rate:g}, held-out train", measured(model, data, heldout), started)
        chosen[rate] = found["recall_at_5"] + found["worst_recall_at_5"]
    best = max(chosen, key=lambda rate: chosen[rate])
    for seed in args.seeds:
        started = time.process_time()
        model = train(data, every, steps, best, seed)
        say(f"MNRL, {best:g}, seed {seed}, dev", measured(model, data, data.dev), started)
    if args.out is not None:
        args.out.write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
