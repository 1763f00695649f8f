"""Train SmolLM2 to answer from passages, to cite and to refuse, before any user's data. What comes
out is not good enough to ship (docs/log.md, 2026-11-28).

No Ray: 50 minutes of two cores, not a step of the pipeline. Two phases over the train questions of
:mod:`benchmarks.train_starter`, with the same titles held out and closed:

- *shared*: a prompt of two to four passages is read once, and up to ``ASKED`` questions follow it,
  each of which sees the passages and itself only. Most are of one article's neighbouring passages,
  so that the passage to cite stands in any place, and a question whose sentence or passage is not
  shown is to be refused. 4.7 times as many answers a second as with a prompt each.
- *single*: prompts as they are served, each with a question of its own before and after what BM25
  found for it.

    python -m benchmarks.train_generator --data DATA --out runs/reader
    python -m benchmarks.train_generator --data DATA --out runs/reader --measure 60
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import bm25s
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.train_starter import Data, Pair, master_step, read_data
from invar_ray.answering.rag import answer_batch
from invar_ray.config import ExperimentalGenerator, GeneratorConfig, LoraConfig
from invar_ray.evaluation.scoring import answer_rule
from invar_ray.heap import keep_freed_memory
from invar_ray.models.adapters import copy_adapter, load_adapter, new_adapter, save_adapter
from invar_ray.models.generator import Generator, encode_prompt
from invar_ray.models.smollm2 import load_smollm2
from invar_ray.questions.rules import RuleRewriter
from invar_ray.schema import Answer, Example, Hit
from invar_ray.text.answers import contains_answer
from invar_ray.text.prompts import INSTRUCTION, REFUSAL, format_target
from invar_ray.text.sentences import sentences_of
from invar_ray.text.tokens import text_ids
from invar_ray.training.sequences import ReadingSet

FIRST_LAYER, RANK = 12, 16
LORA = LoraConfig(
    rank=RANK,
    alpha=2 * RANK,
    dropout=0.0,
    target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)
SETTINGS = GeneratorConfig(
    lora=LORA, first_layer=FIRST_LAYER, top_k=5, distractor_share=0.3, max_tokens=512
)
SHARES = {"squad": 0.6, "nq": 0.32, "popqa": 0.08}
WORDS = (40, 60, 80, 100)  # a passage is cut to about one of these
ASKED, REFUSED = 8, 0.3  # questions after a shared prompt, and most of them to be refused
PROMPTS, SINGLES = 3, 6  # of a step of either phase
REWRITTEN = 0.25  # share of questions asked in another wording


class Asked(NamedTuple):
    """A question after passages: its target is an answer with its number, or the refusal."""

    question: str
    target: str


class Material:
    """Train pairs by set, title and passage, and BM25 over all passages."""

    def __init__(self, data: Data) -> None:
        self.passages = data.passages
        self.by_set: dict[str, list[Pair]] = defaultdict(list)
        self.of_passage: dict[int, list[Pair]] = defaultdict(list)
        self.of_title: dict[str, list[int]] = defaultdict(list)
        for pair in dict.fromkeys(data.pairs):
            self.by_set[pair.id.split(":")[0]].append(pair)
            self.of_passage[pair.positive].append(pair)
        for place, (title, _) in enumerate(data.passages):
            self.of_title[title].append(place)
        self._bm25 = bm25s.BM25()
        texts = [f"{title} {text}" for title, text in data.passages]
        self._bm25.index(
            bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False
        )

    def near(self, question: str, count: int) -> list[int]:
        """Places of the passages that BM25 ranks highest."""
        words = bm25s.tokenize([question], stopwords="en", show_progress=False)
        found, _ = self._bm25.retrieve(words, k=count, show_progress=False)
        return [int(place) for place in found[0]]

    def chosen(self, draw: random.Random) -> Pair:
        """A train pair, the sets by their shares."""
        name = draw.choices(list(SHARES), list(SHARES.values()))[0]
        return draw.choice(self.by_set[name])

    def window(self, place: int, words: int, draw: random.Random, keep: Pair | None) -> str:
        """Neighbouring sentences of a passage, about so many words; those around the answer of
        ``keep`` if it is given.
        """
        sentences = sentences_of(self.passages[place][1])
        sizes = [len(each.split()) for each in sentences]
        start = draw.randrange(len(sentences)) if sentences else 0
        if keep is not None:
            holding = [n for n, s in enumerate(sentences) if contains_answer(s, keep.answers)]
            start = draw.choice(holding) if holding else start
        first = last = start
        size = sizes[start] if sizes else 0
        while sizes and size < words and (first > 0 or last < len(sizes) - 1):
            before = first > 0 and (last == len(sizes) - 1 or draw.random() < 0.5)
            first, last = (first - 1, last) if before else (first, last + 1)
            size += sizes[first if before else last]
        return " ".join(" ".join(sentences[first : last + 1]).split()[: 2 * words])


def wording(pair: Pair, draw: random.Random) -> str:
    """The question, or one of its rewrites."""
    if draw.random() >= REWRITTEN:
        return pair.question
    example = Example(pair.id, pair.question, pair.answers, ("",))
    made = RuleRewriter().rewrite(example, 2, draw.randrange(1 << 30))
    return draw.choice(made).text if made else pair.question


def shared(material: Material, draw: random.Random) -> tuple[list[tuple[str, str]], list[Asked]]:
    """Passages and the questions that are asked of them."""
    pair = material.chosen(draw)
    title = material.passages[pair.positive][0]
    count = draw.choice((2, 3, 3, 4))
    own = [p for p in material.of_title[title] if p != pair.positive]
    own.sort(key=lambda place: abs(place - pair.positive))
    near = own[:6] if pair.id.startswith("squad") else []
    if len(near) < 4:
        near += [p for p in material.near(pair.question, 12) if p != pair.positive]
    near = list(dict.fromkeys(near))[:8]
    draw.shuffle(near)
    # Those that have questions of their own first, one of two times: more is asked of a prompt.
    if draw.random() < 0.5:
        near.sort(key=lambda place: place not in material.of_passage)
    places = [pair.positive, *near[: count - 1]]
    draw.shuffle(places)
    shown = []
    for place in places:
        pairs = material.of_passage.get(place, [])
        keep = pair if place == pair.positive else draw.choice(pairs) if pairs else None
        shown.append(material.window(place, draw.choice(WORDS), draw, keep))
    candidates = [each for place in (*places, *near[count - 1 :]) for each in
                  material.of_passage.get(place, [])]  # fmt: skip
    candidates = list(dict.fromkeys(candidates))
    draw.shuffle(candidates)
    answered: list[Asked] = []
    refused: list[Asked] = []
    for each in candidates:
        place = places.index(each.positive) if each.positive in places else None
        standing = (
            [] if place is None else [a for a in each.answers if contains_answer(shown[place], [a])]
        )
        if place is not None and standing:
            if len(answered) < ASKED:
                answered.append(Asked(wording(each, draw), format_target(standing[0], place + 1)))
        elif len(refused) < ASKED and not any(
            contains_answer(f"{material.passages[p][0]} {text}", each.answers)
            for p, text in zip(places, shown, strict=True)
        ):
            refused.append(Asked(wording(each, draw), REFUSAL))
    most = max(1, round(REFUSED * ASKED))
    asked = answered[: ASKED - min(most, len(refused))]
    asked += refused[: min(most, max(1, round(len(asked) * REFUSED / (1 - REFUSED))))]
    draw.shuffle(asked)
    texts = [(material.passages[p][0], text) for p, text in zip(places, shown, strict=True)]
    return texts, asked


def row(material: Material, pair: Pair, draw: random.Random) -> dict[str, Any]:
    """A question with what is found for it, as a row of the artifact ``readings``."""
    title = material.passages[pair.positive][0]
    near = [p for p in material.near(pair.question, 10) if p != pair.positive]
    if draw.random() < 0.5:
        own = [p for p in material.of_title[title] if p != pair.positive]
        near = draw.sample(own, min(3, len(own))) + near
    places = [pair.positive, *list(dict.fromkeys(near))[:7]]
    words = draw.choice(WORDS)
    hits = []
    for place in places:
        text = material.window(place, words, draw, pair)
        hits.append({
            "passage_id": str(place), "document_id": str(place),
            "title": material.passages[place][0], "texts": [text],
        })  # fmt: skip
    return {
        "question_id": pair.id, "answers": list(pair.answers),
        "positive_ids": [str(pair.positive)], "wordings": [wording(pair, draw)], "hits": [hits],
    }  # fmt: skip


class Rows(ReadingSet):
    """Rows in memory."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows


class Tokens(NamedTuple):
    """Tokens of a forward: ids, positions [T], which may see which [T, T] or ``None`` for causal,
    and (place, token to be predicted there) of each answer token.
    """

    ids: list[int]
    positions: list[int]
    mask: Tensor | None
    predicts: list[tuple[int, int]]


def tokens_of(tokenizer: Any, passages: list[tuple[str, str]], asked: list[Asked]) -> Tokens:
    """A shared prompt with its questions."""
    listing = "\n".join(f"[{n}] {title}: {text}" for n, (title, text) in enumerate(passages, 1))
    ids = encode_prompt(tokenizer, f"{INSTRUCTION}\n\n{listing}\n\n")
    size = len(ids)
    positions, segments, predicts = list(range(size)), [0] * size, []
    for number, each in enumerate(asked, start=1):
        head = text_ids(tokenizer, [f"Question: {each.question}\nAnswer:"], framed=False)[0]
        tail = [*text_ids(tokenizer, [f" {each.target}"], framed=False)[0], tokenizer.eos_token_id]
        start = len(ids) + len(head)
        predicts += [(start + n - 1, token) for n, token in enumerate(tail)]
        ids += [*head, *tail]
        positions += range(size, size + len(head) + len(tail))
        segments += [number] * (len(head) + len(tail))
    kind = torch.tensor(segments)
    causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    mask = causal & ((kind[:, None] == kind[None]) | (kind[None] == 0))
    return Tokens(ids, positions, mask, predicts)


def single(tokenizer: Any, material: Material, draw: random.Random) -> Tokens:
    """A prompt as it is served, with its answer."""
    rows = Rows([row(material, material.chosen(draw), draw)])
    extra = ExperimentalGenerator(vary_windows=False, vary_top_k=draw.random() < 0.4)
    made = rows.sequence(0, SETTINGS, extra, tokenizer, draw)
    ids = encode_prompt(tokenizer, made.prompt)
    tail = [*text_ids(tokenizer, [f" {made.target}"], framed=False)[0], tokenizer.eos_token_id]
    predicts = [(len(ids) + n - 1, token) for n, token in enumerate(tail)]
    ids = [*ids, *tail]
    return Tokens(ids, list(range(len(ids))), None, predicts)


class Student:
    """SmolLM2 with its adapter: products in bf16, masters in fp32."""

    def __init__(self, seed: int, init: Path | None) -> None:
        base, self.tokenizer = load_smollm2()
        base.set_attn_implementation("eager")  # torch's flash backward is slow in bf16
        self.adapted = new_adapter(base, LORA, seed, first_layer=FIRST_LAYER)
        if init is not None:
            copy_adapter(self.adapted, init)
        self.model: Any = self.adapted.get_base_model()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.masters = [p.detach().clone().float().requires_grad_() for p in self.trained]
        for parameter in self.model.parameters():
            parameter.data = parameter.data.bfloat16()

    def loss(self, made: Tokens) -> Tensor:
        """Summed cross-entropy of the answer tokens."""
        mask = None
        if made.mask is not None:
            mask = torch.zeros(made.mask.shape, dtype=torch.bfloat16)
            mask = mask.masked_fill(~made.mask, torch.finfo(torch.bfloat16).min)[None, None]
        hidden = self.model.model(
            input_ids=torch.tensor([made.ids]),
            position_ids=torch.tensor([made.positions]),
            attention_mask=mask,
            use_cache=False,
        ).last_hidden_state[0]
        places = torch.tensor([place for place, _ in made.predicts])
        logits = self.model.lm_head(hidden[places]).float()
        wanted = torch.tensor([token for _, token in made.predicts])
        return functional.cross_entropy(logits, wanted, reduction="sum")

    def save(self, folder: Path, log: dict[str, Any]) -> None:
        """A PEFT folder in bf16 with the run's log."""
        masters = {id(p): m for p, m in zip(self.trained, self.masters, strict=True)}
        state = {
            "base_model.model." + name: masters[id(value)].detach().bfloat16()
            for name, value in self.model.named_parameters()
            if value.requires_grad
        }
        save_adapter(self.adapted, state, folder, "builtin:smollm2")
        (folder / "log.json").write_text(json.dumps(log, indent=1), encoding="utf-8")


def train(args: argparse.Namespace) -> None:
    """The loop; writes the folder every 50 steps."""
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    data = read_data(args.data, args.seed, args.wiki)
    material = Material(data)
    student = Student(args.seed, args.init)
    steps = args.shared_steps + args.single_steps
    print(
        f"{sum(map(len, material.by_set.values()))} questions, {len(data.passages)} passages, "
        f"{sum(p.numel() for p in student.masters) / 1e6:.2f} M trainable", flush=True,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(student.masters, lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / 30, 1.0) * max(0.02, 1 - t / steps)
    )
    log = {
        "seed": args.seed, "shared_steps": args.shared_steps, "single_steps": args.single_steps,
        "lr": args.lr, "init": str(args.init or ""), "first_step": args.first_step,
        "first_layer": FIRST_LAYER, "rank": RANK,
    }  # fmt: skip
    start, seen, losses = time.time(), 0, []
    for done in range(steps):
        draw = random.Random(f"{args.seed}:{args.first_step + done}")
        if done < args.shared_steps:
            made = []
            while len(made) < PROMPTS:
                passages, asked = shared(material, draw)
                if asked:
                    made.append(tokens_of(student.tokenizer, passages, asked))
                    seen += len(asked)
        else:
            made = [single(student.tokenizer, material, draw) for _ in range(SINGLES)]
            seen += SINGLES
        count = sum(len(each.predicts) for each in made)
        total = 0.0
        for each in made:
            loss = student.loss(each) / count
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        master_step(student.masters, student.trained, optimizer)
        schedule.step()
        losses.append(total)
        if (done + 1) % 10 == 0:
            mean = sum(losses[-10:]) / 10
            size = sum(len(each.ids) for each in made)
            print(
                f"{done + 1}/{steps} {time.time() - start:.0f}s {seen} answers, "
                f"{size} tokens, loss {mean:.3f}", flush=True,
            )  # fmt: skip
        if (done + 1) % 50 == 0 or done + 1 == steps:
            student.save(args.out, log | {"answers": seen, "seconds": round(time.time() - start)})


def measure(folder: Path, data: Data, count: int) -> dict[str, Any]:
    """The adapter in ``folder``, or the bare base where there is none, on held-out train questions
    of SQuAD and NQ, half of each, in prompts as they are served: answers where the passage stands
    among four, refusals where no answer does, and right answers that turn wrong in reversed order.
    """
    material, draw = Material(data), random.Random(7)
    pairs = draw.sample(data.held_out["squad"], count // 2)
    pairs += draw.sample(data.held_out["nq"], count - count // 2)
    base, tokenizer = load_smollm2()
    adapted = load_adapter(base, folder, merge=True) if folder.exists() else base
    generator = Generator(adapted.to(torch.bfloat16), tokenizer, SETTINGS.max_tokens)
    rule = answer_rule("squad")

    def ask(given: Sequence[tuple[Pair, list[Hit]]]) -> list[Answer]:
        return answer_batch(
            generator,
            [pair.question for pair, _ in given],
            [hits for _, hits in given],
            max_new_tokens=SETTINGS.max_new_tokens,
            batch_size=16,
        )

    found, without = [], []
    for pair in pairs:
        hits = [
            Hit(h["passage_id"], h["document_id"], n, 0.0, h["title"], h["texts"][0])
            for n, h in enumerate(row(material, pair, draw)["hits"][0], start=1)
        ]
        shown = hits[:4]
        draw.shuffle(shown)
        found.append((pair, shown))
        rest = [h for h in hits if not contains_answer(f"{h.title} {h.text}", pair.answers)]
        without.append((pair, rest[:4]))
    answers = ask(found)
    scores = [rule.score(a.text, p.answers) for (p, _), a in zip(found, answers, strict=True)]
    right = [n for n, (p, _) in enumerate(found) if contains_answer(answers[n].text, p.answers)]
    again = ask([(found[n][0], found[n][1][::-1]) for n in right])
    turned = [
        not contains_answer(answer.text, found[n][0].answers)
        for n, answer in zip(right, again, strict=True)
    ]
    cited = [
        found[n][1][answers[n].citations[0].number - 1].document_id == str(found[n][0].positive)
        for n in right
        if answers[n].citations
    ]
    none = ask(without)
    return {
        "questions": len(pairs),
        "exact_match": fmean(float(score.exact_match) for score in scores),
        "f1": fmean(float(score.f1) for score in scores),
        "right": len(right) / len(pairs),
        "refused": fmean(answer.refused for answer in answers),
        "refused_without": fmean(answer.refused for answer in none),
        "flips": fmean(turned) if turned else 0.0,
        "cited_gold": fmean(cited) if cited else 0.0,
    }


def main() -> None:
    """Read the arguments and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with squad/, nq/ ..")
    parser.add_argument("--out", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--init", type=Path, help="adapter to go on from")
    parser.add_argument("--first-step", type=int, default=0, help="where in the data to go on")
    parser.add_argument("--shared-steps", type=int, default=150)
    parser.add_argument("--single-steps", type=int, default=80)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--wiki", type=int, default=12000, help="passages without a question")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", type=int, help="only measure --out, on so many questions")
    args = parser.parse_args()
    if args.measure:
        torch.set_num_threads(args.threads)
        data = read_data(args.data, args.seed, args.wiki)
        print(json.dumps(measure(args.out, data, args.measure)))
    else:
        train(args)


if __name__ == "__main__":
    main()
