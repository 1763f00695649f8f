"""What each loss of stage 1 does on frozen features, where a run takes seconds: does the invariance
loss do more than a second contrastive term?

    python benchmarks/loss_toy.py --data DATA [--steps 200] [--seeds 3]

Features are mean token embeddings of MiniLM (what the embedded base starts as), normalised; one
linear map, the same for questions and passages, is trained from the identity on SQuAD train
questions, each with two rule-based rewrites, against *all* train paragraphs of the sample.
Measured on SQuAD dev questions and NoiseQA's human rewrites among all dev paragraphs.  DATA is a
folder with ``squad/``.

Shape legend: B questions, E wordings, C paragraphs, D feature size.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch
from ablation_measure import question_values
from torch import Tensor
from torch.nn.functional import normalize

from invar_ray.evaluation.significance import paired_cluster_bootstrap
from invar_ray.losses.contrastive import contrastive_loss
from invar_ray.losses.invariance import invariance_loss
from invar_ray.models.tiny import minilm_embeddings, minilm_tokenizer
from invar_ray.questions.rules import RuleRewriter
from invar_ray.schema import Example

TEMPERATURE, BATCH, LEARNING_RATE, DEPTH = 0.05, 48, 5e-4, 10
TRAIN_QUESTIONS, DEV_QUESTIONS, MAX_TOKENS = 2000, 500, 128
MEASURES = ("recall_at_5", "reworded_recall_at_5", "worst_recall_at_5", "overlap_at_10")


@dataclass(frozen=True)
class System:
    """The contrastive loss and what is added to it.

    Attributes:
        trained: False for the features as they are.
        anchor_only: without the rewrites.
        weight: of the second term, in which the contrastive loss of the environments counts 1.
        second: ``contrastive`` (at ``temperature``), ``soft`` or ``hard`` (the invariance loss), or
            none.
        temperature: of the second term.
    """

    trained: bool = True
    anchor_only: bool = False
    second: str = ""
    weight: float = 0.0
    temperature: float = TEMPERATURE


def systems(temperature: float) -> dict[str, System]:
    """All of them; ``temperature`` is the invariance loss's."""
    found = {
        "untrained": System(trained=False),
        "anchor": System(anchor_only=True),
        "environments": System(),
        "+ 1 contrastive": System(second="contrastive", weight=1.0),
    }
    for weight in (1.0, 4.0):
        found[f"+ {weight:g} contrastive at tau_inv"] = System(
            True, False, "contrastive", weight, temperature
        )
        found[f"+ {weight:g} invariance, soft"] = System(True, False, "soft", weight, temperature)
    found["+ 4 invariance, hard"] = System(True, False, "hard", 4.0, temperature)
    return found


def read(path: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()
    ]


def feature_maker() -> Callable[[list[str]], Tensor]:
    """Texts to unit rows [n, D]: means of token embeddings."""
    embeddings, tokenizer = minilm_embeddings(), minilm_tokenizer()

    def features(texts: list[str]) -> Tensor:
        ids = tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        bag = torch.nn.functional.embedding_bag(
            torch.tensor([token for row in ids for token in row]),
            embeddings,
            torch.tensor([0, *(len(row) for row in ids[:-1])]).cumsum(0),
            mode="mean",
        )
        return normalize(bag, dim=-1)

    return features


@dataclass(frozen=True)
class Data:
    """Frozen features of everything.

    Attributes:
        questions: [N, E, D], the anchor first; positive: [N], their paragraphs; paragraphs: [C, D],
            to train on.
        families: features [E_i, D] of each dev question's wordings; gold, pool, names: its
            paragraph's id, and features and ids of all dev paragraphs.
    """

    questions: Tensor
    positive: Tensor
    paragraphs: Tensor
    families: list[Tensor]
    gold: list[str]
    pool: Tensor
    names: list[str]


def load(folder: Path) -> Data:
    """Sample, rewrite, and make features; the same in every call."""
    features, rewriter, draw = feature_maker(), RuleRewriter(), random.Random(0)
    corpus = {
        row["id"]: f"{row['title']} {row['text']}" for row in read(folder / "corpus.jsonl.gz")
    }
    train = draw.sample(read(folder / "questions-train.jsonl.gz"), TRAIN_QUESTIONS)
    wordings = []
    for row in train:
        example = Example(
            row["id"], row["question"], tuple(row["answers"]), tuple(row["positive_ids"]), ()
        )
        texts = [row["question"], *(rewrite.text for rewrite in rewriter.rewrite(example, 2, 0))]
        wordings.append((texts * 3)[:3])
    own = sorted({row["positive_ids"][0] for row in train})
    place = {name: number for number, name in enumerate(own)}
    of_base: dict[str, list[dict[str, Any]]] = {}
    for row in read(folder / "rewrites-noiseqa.jsonl.gz"):
        of_base.setdefault(row["base_id"], []).append(row)
    chosen = draw.sample(sorted(of_base), min(DEV_QUESTIONS, len(of_base)))
    families = [
        [of_base[name][0]["original"], *(row["question"] for row in of_base[name])]
        for name in chosen
    ]
    names = [name for name in corpus if name.startswith("sq-dev-")]
    flat = features([text for texts in wordings for text in texts])
    return Data(
        flat.view(len(train), 3, -1),
        torch.tensor([place[row["positive_ids"][0]] for row in train]),
        features([corpus[name] for name in own]),
        [features(family) for family in families],
        [of_base[name][0]["positive_ids"][0] for name in chosen],
        features([corpus[name] for name in names]),
        names,
    )


def train(data: Data, system: System, steps: int, seed: int) -> tuple[Tensor, float]:
    """The map [D, D], and the mean perplexity of the consensus (0 without an invariance loss)."""
    size = data.paragraphs.shape[1]
    change = torch.zeros(size, size, requires_grad=True)
    if not system.trained:
        return torch.eye(size), 0.0
    optimizer = torch.optim.AdamW([change], lr=LEARNING_RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    perplexities = []
    for step in range(steps):
        rows = torch.randperm(len(data.questions), generator=generator)[:BATCH]
        questions = data.questions[rows, :1] if system.anchor_only else data.questions[rows]
        weights = torch.eye(size) + change
        vectors = normalize(questions @ weights, dim=-1)  # [B, E, D]
        candidates = normalize(data.paragraphs @ weights, dim=-1)  # [C, D]
        cosines, positive = vectors @ candidates.T, data.positive[rows]  # [B, E, C], [B]
        allowed = torch.ones(BATCH, len(candidates), dtype=torch.bool)
        loss = contrastive_loss(cosines, positive, allowed, temperature=TEMPERATURE).loss
        ramp = system.weight * min(1.0, step / (steps / 5))
        if system.second == "contrastive":
            loss = (
                loss
                + ramp
                * contrastive_loss(cosines, positive, allowed, temperature=system.temperature).loss
            )
        elif system.second:
            found = invariance_loss(
                cosines,
                positive,
                allowed,
                temperature=system.temperature,
                pattern="soft" if system.second == "soft" else "hard",
                top_m=10,
                share=0.8,
                kappa=1.0,
            )
            perplexities.append(found.perplexity.item())
            loss = loss + ramp * found.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (torch.eye(size) + change).detach(), fmean(perplexities) if perplexities else 0.0


def measure(data: Data, weights: Tensor) -> tuple[list[dict[str, float]], float]:
    """Each dev question's numbers, and the overlap@10 between the lists of different questions."""
    pool = normalize(data.pool @ weights, dim=-1)
    rows, anchors = [], []
    for family, gold in zip(data.families, data.gold, strict=True):
        best = (normalize(family @ weights, dim=-1) @ pool.T).topk(DEPTH, dim=-1).indices.tolist()
        ranked = [[data.names[number] for number in found] for found in best]
        rows.append(question_values(ranked, [gold]))
        anchors.append(set(ranked[0]))
    pairs = [(anchors[at], anchors[at - 1]) for at in range(len(anchors))]
    return rows, fmean(len(a & b) / len(a | b) for a, b in pairs)


def main() -> None:
    """Train everything, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.05, help="of the invariance loss")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data, used = load(arguments.data / "squad"), time.process_time()
    print(
        f"{len(data.questions)} questions over {len(data.paragraphs)} paragraphs to train on; "
        f"{len(data.families)}"
    )
    print(f"dev questions over {len(data.pool)} paragraphs; {arguments.steps} steps of {BATCH}\n")
    print(f"| system | {' | '.join(MEASURES)} | between questions | perplexity |")
    print("|---|" + "---|" * (len(MEASURES) + 2))
    values: dict[str, list[list[dict[str, float]]]] = {}
    for name, system in systems(arguments.temperature).items():
        between, perplexities = [], []
        for seed in range(arguments.seeds if system.trained else 1):
            weights, perplexity = train(data, system, arguments.steps, seed)
            rows, other = measure(data, weights)
            values.setdefault(name, []).append(rows)
            between.append(other)
            perplexities.append(perplexity)
        cells = []
        for key in MEASURES:
            means = [fmean(row[key] for row in rows) for rows in values[name]]
            cells.append(f"{fmean(means):.3f} ± {pstdev(means):.3f}")
        print(
            f"| {name} | {' | '.join(cells)} | {fmean(between):.4f} | {fmean(perplexities):.1f} |",
            flush=True,
        )
    print(
        "\nDifference from environments (95 %, paired bootstrap by paragraph), "
        f"{time.process_time() - used:.0f} s:\n"
    )
    print(f"| system | {' | '.join(MEASURES)} |\n|---|" + "---|" * len(MEASURES))
    for name, runs in values.items():
        cells = []
        for key in MEASURES:
            first, second = (
                [[row[key] for row in rows] for rows in side]
                for side in (runs, values["environments"])
            )
            one = paired_cluster_bootstrap(first, second, data.gold)
            cells.append(f"{one.mean:+.3f} [{one.low:+.3f}, {one.high:+.3f}]")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
