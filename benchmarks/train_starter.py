"""Train the starter adapter: the first layers of SmolLM2 as a retriever, before any user's data.

No Ray: hours on one core, not a step of the pipeline. Each step draws questions with their
passage (SQuAD, NQ, PopQA: train questions) and passages without a question, and adds up

    W_COS  1 - cosine of each vector with MiniLM's vector of the same text; for a rewrite MiniLM's
           vector of the question as asked
  + W_KL   KL of the teacher's and the student's scores over a bank of MiniLM's passage vectors
  + W_NCE  contrastive loss over the rewrites; candidates: the step's passages, and bank vectors
           that MiniLM ranks high for the step's questions (hard negatives that cost no encoding)
  + W_INV  invariance loss over the same candidates

No passage under a title of SQuAD dev, of an NQ or PopQA dev positive, or of the demo's subjects is
read, nor a question about one; ``held_out`` titles are kept for choosing. A run goes on from an
adapter (``--init``) with a fresh optimizer and the next part of the data (``--first-step``).

    python -m benchmarks.train_starter --data DATA --out runs/starter --steps 3000
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from invar_ray.config import LoraConfig, ModelConfig
from invar_ray.corpus import facts
from invar_ray.losses.contrastive import contrastive_loss
from invar_ray.losses.invariance import invariance_loss
from invar_ray.models.adapters import copy_adapter, new_adapter, save_adapter
from invar_ray.models.base import BaseRef
from invar_ray.models.batching import pad_right
from invar_ray.models.encoder import (
    PROJECTION_FILE,
    BiEncoder,
    Encoder,
    llm_spec,
    load_projection,
    passage_ids,
    query_ids,
)
from invar_ray.models.minilm import CoarseEncoder
from invar_ray.models.smollm2 import load_smollm2
from invar_ray.models.trunk import keep_first_layers
from invar_ray.questions.rules import RuleRewriter
from invar_ray.schema import Example

LAYERS, RANK, WIDTH = 4, 64, 384
BATCH, ALONE, REWRITES, MINED = 32, 16, 2, 4
CHUNK = 24  # texts that are padded together
WORDS = (20, 30, 40, 50, 75)  # a step's passages are cut to one of these
BANK, BANK_WORDS = 12_000, 75
SHARES = {"squad": 1, "nq": 3, "popqa": 3}  # SQuAD alone would be nine tenths
TAU, TAU_INV = 0.05, 0.1
W_COS, W_KL, W_NCE, W_INV = 10.0, 1.0, 0.5, 10.0
INV_FROM = 300  # steps; an untrained consensus would be a wrong one
LORA = LoraConfig(
    rank=RANK,
    alpha=2 * RANK,
    dropout=0.0,
    target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)
SHAPE: dict[str, Any] = {
    "pooling": "mean",
    "retriever_layers": LAYERS,
    "projection_dim": WIDTH,
    "query_prefix": "",
    "passage_prefix": "",
    "query_max_tokens": 48,
    "passage_max_tokens": 160,
}
MODEL = ModelConfig(base="builtin:smollm2", **SHAPE)


class Pair(NamedTuple):
    """A train question, its answers and its passage (a place in the bank)."""

    id: str
    question: str
    answers: tuple[str, ...]
    positive: int


class Data(NamedTuple):
    """What is trained on, and the held-out questions of each set (by title) to choose on."""

    passages: list[tuple[str, str]]
    pairs: list[Pair]
    held_out: dict[str, list[Pair]]


def read_data(data: Path, seed: int, wiki: int) -> Data:
    """Pairs and passages without what is measured on; see the module's docstring."""
    corpora = {name: _rows(data / name / "corpus.jsonl.gz") for name in ("squad", "nq", "popqa")}
    by_id = {name: {row["id"]: row for row in rows} for name, rows in corpora.items()}
    closed = {document.title.casefold() for document in facts.documents()}
    for name, rows in by_id.items():
        for question in _rows(data / name / "questions-dev.jsonl.gz"):
            closed |= {rows[i]["title"].casefold() for i in question["positive_ids"] if i in rows}
    passages: list[tuple[str, str]] = []
    place: dict[tuple[str, str], int] = {}
    pairs: list[Pair] = []
    held_out: dict[str, list[Pair]] = {name: [] for name in by_id}
    for name, rows in by_id.items():
        for question in _rows(data / name / "questions-train.jsonl.gz"):
            row = rows.get(question["positive_ids"][0])
            if row is None or row["title"].casefold() in closed:
                continue
            key = (name, row["id"])
            if key not in place:
                place[key] = len(passages)
                passages.append((row["title"], row["text"]))
            pair = Pair(
                f"{name}:{question['id']}",
                question["question"],
                tuple(question["answers"]),
                place[key],
            )
            if _is_held_out(row["title"]):
                held_out[name].append(pair)
            else:
                pairs += [pair] * SHARES[name]
    alone = [r for r in _rows(data / "wiki_pool/corpus.jsonl.gz")]
    alone = [r for r in alone if r["title"].casefold() not in closed]
    random.Random(seed).shuffle(alone)
    passages += [(row["title"], row["text"]) for row in alone[:wiki]]
    if leaked := closed & {title.casefold() for title, _ in passages}:
        raise ValueError(f"passages of what is measured on: {sorted(leaked)[:3]}")
    random.Random(seed).shuffle(pairs)
    return Data(passages, pairs, held_out)


def master_step(
    masters: Sequence[Tensor], trained: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Gradients of bf16 parameters to their fp32 masters, clipped; a step; values back."""
    for master, parameter in zip(masters, trained, strict=True):
        assert parameter.grad is not None
        master.grad = parameter.grad.float()
        parameter.grad = None
    torch.nn.utils.clip_grad_norm_(masters, 1.0)
    optimizer.step()
    with torch.no_grad():
        for master, parameter in zip(masters, trained, strict=True):
            parameter.copy_(master)


class Student:
    """The adapted first layers, with the adapter's own way in and out of a folder."""

    def __init__(self, seed: int, init: Path | None) -> None:
        base, self.tokenizer = load_smollm2()
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        keep_first_layers(base, LAYERS)
        self.spec = llm_spec(MODEL, BaseRef("builtin:smollm2", None, ""), ("", ""))
        self.adapted = new_adapter(base, LORA, seed, num_layers=LAYERS)
        torch.manual_seed(seed)
        self.module = BiEncoder(self.adapted.get_base_model(), "mean", WIDTH)
        if init is not None:
            self._load(init)
        # bf16 products of fp32 masters. Parameters only: rotary frequencies stay in fp32.
        self._trained = [p for p in self.module.parameters() if p.requires_grad]
        self.masters = [p.detach().clone().float().requires_grad_() for p in self._trained]
        for parameter in self.module.base.parameters():
            parameter.data = parameter.data.bfloat16()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """See :func:`master_step`."""
        master_step(self.masters, self._trained, optimizer)

    def vectors(self, ids: list[list[int]]) -> Tensor:
        """[N, D] unit rows with their gradient, for token ids."""
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        parts = []
        for at in range(0, len(order), CHUNK):  # of like length: little padding
            rows = [ids[row] for row in order[at : at + CHUNK]]
            parts.append(self.module(*pad_right(rows, int(self.tokenizer.pad_token_id))))
        back = torch.tensor(order).argsort()
        return torch.cat(parts)[back]

    def save(self, folder: Path, log: dict[str, Any]) -> None:
        """A PEFT folder in bf16 with its projection and the run's log; the old one is replaced
        only once the new one is whole.
        """
        state = {
            "base_model.model." + name.removeprefix("base."): value.detach().bfloat16()
            for name, value in self.module.named_parameters()
            if value.requires_grad and name.startswith("base.")
        }
        staging = folder.with_name(folder.name + ".staging")
        save_adapter(self.adapted, state, staging, "builtin:smollm2")
        projection = self.module.projection
        assert projection is not None
        save_file({"weight": projection.weight.detach().bfloat16()}, staging / PROJECTION_FILE)
        (staging / "encoder.json").write_text(json.dumps(SHAPE, indent=1), encoding="utf-8")
        (staging / "log.json").write_text(json.dumps(log, indent=1), encoding="utf-8")
        old = folder.with_name(folder.name + ".old")
        if folder.exists():
            folder.rename(old)
        staging.rename(folder)
        for path in old.glob("*"):
            path.unlink()
        if old.exists():
            old.rmdir()

    def _load(self, folder: Path) -> None:
        copy_adapter(self.adapted, folder)
        own = dict(self.module.named_parameters())
        with torch.no_grad():
            own["projection.weight"].copy_(load_projection(folder))


def train(args: argparse.Namespace) -> None:
    """The loop; writes the folder every 250 steps, with held-out figures every 500."""
    torch.set_num_threads(args.threads)
    data = read_data(args.data, args.seed, args.wiki)
    sizes = {name: len(rows) for name, rows in data.held_out.items()}
    print(f"{len(data.pairs)} pairs, {len(data.passages)} passages, held out {sizes}", flush=True)
    teacher = CoarseEncoder("builtin:minilm", 256, "")
    in_bank = sorted(random.Random(args.seed).sample(range(len(data.passages)), BANK))
    cut = [(data.passages[p][0], _cut(data.passages[p][1], BANK_WORDS)) for p in in_bank]
    bank = torch.from_numpy(_bank(teacher, cut, args.out.with_suffix(".bank.npy")))
    lower = [f"{title} {text}".casefold() for title, text in data.passages]
    student = Student(args.seed, args.init)
    size = sum(p.numel() for p in student.masters) / 1e6
    print(f"{size:.2f} M trainable, bank {tuple(bank.shape)}", flush=True)
    optimizer = torch.optim.AdamW(student.masters, lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / 50, 1.0) * max(0.02, 1 - t / args.steps)
    )
    history: list[dict[str, Any]] = []
    log: dict[str, Any] = {
        "seed": args.seed, "steps": args.steps, "lr": args.lr, "init": str(args.init or ""),
        "first_step": args.first_step, "layers": LAYERS, "rank": RANK, "batch": BATCH,
        "weights": [W_COS, W_KL, W_NCE, W_INV], "history": history,
    }  # fmt: skip
    start = time.time()
    for step in range(args.first_step, args.first_step + args.steps):
        done = step - args.first_step
        parts = _losses(student, teacher, data, bank, in_bank, lower, args.seed, step, done)
        loss = sum(weight * part for weight, part in parts.values())
        assert isinstance(loss, Tensor)
        loss.backward()
        student.step(optimizer)
        schedule.step()
        if done % 25 == 0:
            values = " ".join(f"{name} {part.item():.3f}" for name, (_, part) in parts.items())
            print(f"{step} {time.time() - start:.0f}s {values}", flush=True)
        if (done + 1) % 500 == 0 or done + 1 == 250 or done + 1 == args.steps:
            history.append(
                {"step": step + 1, "seconds": round(time.time() - start)} | measure(student, data)
            )
            print("HELD-OUT", history[-1], flush=True)
        if (done + 1) % 250 == 0 or done + 1 == args.steps:
            student.save(args.out, log)
    print("MINILM", measure_teacher(teacher, data), flush=True)


def _losses(
    student: Student,
    teacher: CoarseEncoder,
    data: Data,
    bank: Tensor,
    in_bank: list[int],
    lower: list[str],
    seed: int,
    step: int,
    done: int,
) -> dict[str, tuple[float, Tensor]]:
    """(weight, value) of each loss of a step; what is drawn depends on (seed, step) only."""
    draw = random.Random(f"{seed}:{step}")
    first = step * BATCH % len(data.pairs)
    batch = [data.pairs[(first + i) % len(data.pairs)] for i in range(BATCH)]
    places = list(dict.fromkeys(pair.positive for pair in batch))
    places += draw.sample(range(len(data.passages)), ALONE)
    places = list(dict.fromkeys(places))
    words = draw.choice(WORDS)
    texts = [(data.passages[p][0], _cut(data.passages[p][1], words)) for p in places]
    wordings = [_wordings(pair, seed + step) for pair in batch]
    with torch.no_grad():
        # A shorter cut has another vector than the bank's.
        passages_t = torch.from_numpy(_teach(teacher, texts))
        questions_t = torch.from_numpy(
            _teach(teacher, [("", pair.question) for pair in batch])
        )  # [B, D]
        scores_t = questions_t @ bank.T  # [B, bank]
        mined = _mined(scores_t, batch, in_bank, lower)
    flat = [text for family in wordings for text in family]
    queries = student.vectors(query_ids(student.tokenizer, flat, student.spec))
    queries = queries.view(BATCH, 1 + REWRITES, WIDTH)  # [B, E, D]
    passages = student.vectors(passage_ids(student.tokenizer, texts, student.spec))
    kl_rows = torch.cat([queries.flatten(0, 1), passages])
    rows_t = torch.cat([questions_t.repeat_interleave(1 + REWRITES, 0), passages_t])
    cosine = (1 - (kl_rows * rows_t).sum(-1)).mean()
    with torch.no_grad():
        target = (
            torch.cat([scores_t.repeat_interleave(1 + REWRITES, 0), passages_t @ bank.T])
            .div_(TAU)
            .softmax(-1)
        )
    kl = functional.kl_div(
        (kl_rows @ bank.T).div(TAU).log_softmax(-1), target, reduction="batchmean"
    )
    slots = places + [in_bank[row] for row in mined]
    candidates = torch.cat([passages, bank[mined]])  # [C, D]
    cosines = torch.einsum("bed,cd->bec", queries, candidates)
    positive = torch.tensor([places.index(pair.positive) for pair in batch])
    copies = torch.tensor([[p != pair.positive for p in slots] for pair in batch])
    no_answers = copies & torch.tensor(
        [[not _holds(pair.answers, lower[p]) for p in slots] for pair in batch]
    )
    nce = contrastive_loss(cosines, positive, no_answers, temperature=TAU).loss
    inv = invariance_loss(
        cosines, positive, copies,
        temperature=TAU_INV, pattern="soft", top_m=10, share=0.8, kappa=2.0,
    ).loss  # fmt: skip
    ramp = min(1.0, max(0.0, (done - INV_FROM) / 200))
    return {
        "cos": (W_COS, cosine), "kl": (W_KL, kl), "nce": (W_NCE, nce), "inv": (W_INV * ramp, inv),
    }  # fmt: skip


def _mined(scores: Tensor, batch: list[Pair], in_bank: list[int], lower: list[str]) -> list[int]:
    """Bank rows that the teacher ranks high for a question and that do not answer it."""
    found: dict[int, None] = {}
    for pair, best in zip(batch, scores.topk(24, dim=-1).indices.tolist(), strict=True):
        fits = [
            row
            for row in best
            if in_bank[row] != pair.positive and not _holds(pair.answers, lower[in_bank[row]])
        ]
        found |= dict.fromkeys(fits[:MINED])
    return list(found)


def _wordings(pair: Pair, seed: int) -> list[str]:
    example = Example(pair.id, pair.question, pair.answers, ("",))
    rewrites = [r.text for r in RuleRewriter().rewrite(example, REWRITES, seed)]
    return ([pair.question, *rewrites] + [pair.question] * REWRITES)[: 1 + REWRITES]


def _holds(answers: tuple[str, ...], text: str) -> bool:
    return any(answer.casefold() in text for answer in answers if answer)


def _cut(text: str, words: int) -> str:
    return " ".join(text.split(" ")[:words])


@torch.no_grad()
def _teach(teacher: CoarseEncoder, texts: list[tuple[str, str]]) -> np.ndarray[Any, Any]:
    with torch.autocast("cpu", torch.bfloat16):
        return np.asarray(teacher.encode_passages(texts), dtype=np.float32)


def _bank(
    teacher: CoarseEncoder, passages: list[tuple[str, str]], file: Path
) -> np.ndarray[Any, Any]:
    key = hashlib.sha256(json.dumps(passages).encode()).hexdigest()[:12]
    file = file.with_name(f"{file.stem}-{key}.npy")
    if file.exists():
        return np.load(file, allow_pickle=False)
    start = time.time()
    parts = []
    for at in range(0, len(passages), 2048):
        parts.append(_teach(teacher, passages[at : at + 2048]))
        print(f"bank {at + 2048} of {len(passages)}, {time.time() - start:.0f}s", flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.save(file, np.concatenate(parts))
    return np.concatenate(parts)


def _sets(data: Data) -> dict[str, tuple[list[Pair], list[int]]]:
    """Held-out questions of each set and the 1,500 places that they are searched in."""
    found = {}
    for name, pairs in data.held_out.items():
        draw = random.Random(1)
        chosen = draw.sample(pairs, min(300, len(pairs)))
        places = list(dict.fromkeys(pair.positive for pair in chosen))
        others = sorted({pair.positive for pair in pairs} - set(places))
        draw.shuffle(others)
        places += others[: 1500 - len(places)]
        rest = draw.sample(range(len(data.passages)), 2000)
        places += [p for p in rest if p not in set(places)][: 1500 - len(places)]
        if len(chosen) >= 100:
            found[name] = chosen, places
    return found


def measure(student: Student, data: Data) -> dict[str, Any]:
    """Recall and steadiness on held-out train questions."""
    encoder = Encoder(student.module, student.tokenizer, student.spec)
    try:
        return _measured(encoder, data)
    finally:
        student.module.train()


def measure_teacher(teacher: CoarseEncoder, data: Data) -> dict[str, Any]:
    """The same figures of MiniLM."""
    with torch.autocast("cpu", torch.bfloat16):
        return _measured(teacher, data)


@torch.no_grad()
def _measured(encoder: Any, data: Data) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (pairs, places) in _sets(data).items():
        passages = torch.from_numpy(
            np.asarray(encoder.encode_passages([data.passages[p] for p in places]))
        )
        families = [_wordings(pair, 0) for pair in pairs]
        queries = [
            torch.from_numpy(np.asarray(encoder.encode_queries([f[e] for f in families])))
            for e in range(1 + REWRITES)
        ]
        gold = torch.tensor([places.index(pair.positive) for pair in pairs])[:, None]
        scores = torch.stack([q.float() @ passages.float().T for q in queries])  # [E, Q, P]
        rank = (scores > scores.gather(2, gold.expand(len(queries), -1, 1))).sum(2)
        top = scores.topk(10, -1).indices
        shared = (top[0][None, :, :, None] == top[1:, :, None, :]).any(-1).sum(-1).float()
        found[name] = {
            "recall@1": round((rank[0] < 1).float().mean().item(), 3),
            "recall@5": round((rank[0] < 5).float().mean().item(), 3),
            "worst@5": round((rank < 5).all(0).float().mean().item(), 3),
            "overlap@10": round((shared / (20 - shared)).mean().item(), 3),
        }
    return found


def _is_held_out(title: str) -> bool:
    return int(hashlib.sha256(title.casefold().encode()).hexdigest(), 16) % 20 == 0


def _rows(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def main() -> None:
    """Read the arguments and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with squad/, nq/ ..")
    parser.add_argument("--out", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--init", type=Path, help="adapter to go on from")
    parser.add_argument("--first-step", type=int, default=0, help="where in the data to go on")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--wiki", type=int, default=12000, help="passages without a question")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    train(args)


if __name__ == "__main__":
    main()
