"""How much hits and answer depend on the wording: the question is reworded by rule, everything is
asked again.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from invar_ray.evaluation.metrics import f1
from invar_ray.evaluation.variance import overlap_at_k
from invar_ray.questions.rules import RuleRewriter
from invar_ray.schema import Example, Hit, Rewrite
from invar_ray.text.answers import normalise_answer
from serve.errors import Unavailable
from serve.records import Context, Found, Question, Reply


@dataclass(frozen=True, slots=True)
class Wording:
    """One wording and what it led to; ``reply`` is ``None`` where no answers were asked for."""

    text: str
    kind: str
    found: Found
    reply: Reply | None


class Asked(Protocol):
    """What answers the wordings; :class:`serve.service.Service` is one."""

    async def retrieve(self, question: str, top_k: int, context: Context) -> Found:
        """Passages for a question."""
        ...

    async def answer(self, question: Question, context: Context) -> Reply:
        """The answer to a question from its passages."""
        ...


def rewrite(question: str, count: int, seed: int) -> list[Rewrite]:
    """At most ``count`` rewrites by the rules of ``questions/rules``; the same seed gives the
    same ones.
    """
    return RuleRewriter().rewrite(Example("asked", question, (), ()), count, seed)


def pair_overlap(a: Sequence[Hit], b: Sequence[Hit], top_k: int) -> float:
    """Jaccard overlap of two lists of passages."""
    return overlap_at_k([hit.passage_id for hit in a], [hit.passage_id for hit in b], top_k)


def mean_overlap(wordings: Sequence[Wording], top_k: int) -> float:
    """Mean over all pairs of wordings; 1 for a lone one."""
    pairs = [
        pair_overlap(a.found.hits, b.found.hits, top_k)
        for a, b in itertools.combinations(wordings, 2)
    ]
    return sum(pairs) / len(pairs) if pairs else 1.0


def agreement(a: Reply, b: Reply) -> float:
    """Token F1 of two answers; two refusals agree, a refusal and an answer do not."""
    if a.answer.refused or b.answer.refused:
        return float(a.answer.refused and b.answer.refused)
    return f1(a.answer.text, [b.answer.text])


def share_equal(replies: Sequence[Reply]) -> float:
    """Share of pairs whose answers are equal after SQuAD's normalisation; 1 for a lone one."""
    keys = [
        (each.answer.refused, "" if each.answer.refused else normalise_answer(each.answer.text))
        for each in replies
    ]
    pairs = [float(a == b) for a, b in itertools.combinations(keys, 2)]
    return sum(pairs) / len(pairs) if pairs else 1.0


async def ask_all(
    service: Asked,
    question: str,
    rewrites: int,
    seed: int,
    top_k: int,
    max_new_tokens: int | None,
    context: Context,
) -> list[Wording]:
    """Ask a question as given and in ``rewrites`` other wordings; all from one version of
    everything.

    Args:
        max_new_tokens: ``None`` compares passages only.

    Raises:
        ServiceError: 503 if versions changed in three attempts.
    """
    texts = [(question, "anchor"), *((v.text, v.kind) for v in rewrite(question, rewrites, seed))]
    for _ in range(3):
        found = await asyncio.gather(*(service.retrieve(text, top_k, context) for text, _ in texts))
        replies: list[Reply | None] = [None] * len(texts)
        if max_new_tokens is not None:
            questions = [
                Question(text, each.hits, max_new_tokens)
                for (text, _), each in zip(texts, found, strict=True)
            ]
            replies = list(
                await asyncio.gather(*(service.answer(each, context) for each in questions))
            )
        versions = {tuple(sorted(each.versions.items())) for each in found}
        versions_of_answers = {
            tuple(sorted(each.versions.items())) for each in replies if each is not None
        }
        if len(versions) == 1 and len(versions_of_answers) <= 1:
            return [
                Wording(text, kind, each, reply)
                for (text, kind), each, reply in zip(texts, found, replies, strict=True)
            ]
    raise Unavailable("what is served changed between two wordings, three times", 1.0)
