"""How well a base reads: greedy exact match, found without generating."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from invar_ray.pretraining.align import pooled
from invar_ray.pretraining.reading import Asked, Item, ReadingMixture
from invar_ray.pretraining.train import Pretraining
from invar_ray.text import facts
from invar_ray.text.prompts import format_answer_prompt, format_target
from invar_ray.text.tokens import text_ids

_BATCH = 16


def reading_tasks(data: ReadingMixture, count: int, seed: int = 99) -> dict[str, list[Item]]:
    """Tasks that training never sees.

    ``copying 0`` to ``copying 2``: made-up facts, whose subjects are new each time; ``squad``: windows of held-out
    articles; ``facts``, ``facts of 3``: train questions of the demo corpus, with the gold passage alone and among two
    of the same table (the demo's corpus is in no part of pre-training, and its dev questions are left for its report).
    """
    rng = random.Random(seed)
    tasks = {f"copying {level}": [data.copying(rng, level) for _ in range(count)] for level in (0, 1, 2)}
    tasks["squad"] = [_single(data, rng) for _ in range(count)]
    documents = {document.id: document for document in facts.documents()}
    for name, others in (("facts", 0), ("facts of 3", 2)):
        tasks[name] = []
        for example in facts.questions("train")[:count]:
            gold = documents[example.positive_ids[0]]
            table = gold.id.split("-")[1]
            rest = [one for one in documents.values() if one.id.split("-")[1] == table and one.id != gold.id]
            shown = [gold, *rng.sample(rest, others)]
            rng.shuffle(shown)
            prompt = format_answer_prompt(example.question, [(one.title, one.text) for one in shown])
            target = format_target(example.answers[0], shown.index(gold) + 1)
            tasks[name].append(Item([(prompt, f" {target}")], example.answers[0]))
    return tasks


@torch.no_grad()
def retrieval_recall(training: Pretraining, count: int = 200, top_k: int = 5) -> dict[str, float]:
    """Recall@k of questions on held-out articles over all paragraphs of these, by mean and by last-token pooling."""
    held = training.data.held
    texts = sorted({item.text for item in held})
    chosen = random.Random(5).sample(held, min(count, len(held)))
    rows = training.text_rows([item.question for item in chosen] + texts)
    was_training = training.model.training
    training.model.eval()
    vectors: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for begin in range(0, len(order), _BATCH):
        block = order[begin : begin + _BATCH]
        for place, pair in zip(block, torch.stack(pooled(training.states, [rows[i] for i in block]), 1), strict=True):
            vectors[place] = pair
    training.model.train(was_training)
    table = torch.stack(vectors, 1)  # [pooling, N, H]
    found = {}
    for name, matrix in zip(("mean", "last"), table, strict=True):
        ranked = (matrix[: len(chosen)] @ matrix[len(chosen) :].T).topk(top_k).indices.tolist()
        hits = [item.text in [texts[place] for place in places] for item, places in zip(chosen, ranked, strict=True)]
        found[f"recall_at_{top_k} {name}"] = sum(hits) / len(hits)
    return found


@torch.no_grad()
def exact_match(training: Pretraining, tasks: Sequence[Item]) -> tuple[float, float]:
    """Share of tasks whose greedy answer is the target to the letter, without and with its citation and end.

    Greedy decoding writes the target exactly where every token of it is the most likely one after the tokens before
    it, so one forward pass tells.
    """
    model, tokenizer = training.model, training.tokenizer
    was_training = model.training
    model.eval()
    answered = whole = 0
    rows = [training.encode(Item(task.parts[:1], task.answer)) for task in tasks]
    for begin in range(0, len(rows), _BATCH):
        batch = [(row, spans, task) for (row, spans), task in zip(rows, tasks, strict=True)][begin : begin + _BATCH]
        batch = [entry for entry in batch if entry[1]]
        if not batch:
            continue
        ids, states = training.states([row for row, _, _ in batch])
        for number, (_, spans, task) in enumerate(batch):
            span = spans[0]
            chosen = model.lm_head(states[number, span.start - 1 : span.stop - 1].float()).argmax(-1)
            right = chosen == ids[number, span.start : span.stop]
            length = len(span)
            if task.answer is not None:
                length = len(text_ids(tokenizer, [task.answer], framed=False)[0])
            answered += bool(right[:length].all())
            whole += bool(right.all())
    model.train(was_training)
    return answered / len(tasks), whole / len(tasks)


def _single(data: ReadingMixture, rng: random.Random) -> Item:
    item: Asked = rng.choice(data.held)
    return Item([(format_answer_prompt(item.question, [(item.title, item.text)]), f" {item.answer} [1]")], item.answer)
