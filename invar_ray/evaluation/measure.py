"""Hits and answers into numbers, question by question.

A *column* is a metric's values, one a question in the order of the families, ``None`` where a
question has none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from invar_ray.evaluation.metrics import (
    answer_recall_at_k,
    average_precision,
    first_ranks,
    ndcg_at_k,
    reciprocal_rank,
)
from invar_ray.evaluation.scoring import AnswerRule
from invar_ray.evaluation.variance import (
    Family,
    between_question_overlap,
    family_values,
    flip_rate,
    known,
    overlap_at_k,
)
from invar_ray.schema import Hit

KS = (1, 5, 20, 100)
Columns = dict[str, list[float | None]]


@dataclass(frozen=True)
class FoundFamily:
    """A question in all its wordings with what each of them found; the anchor comes first."""

    question_id: str
    wordings: tuple[str, ...]
    answers: tuple[str, ...]
    positive_ids: tuple[str, ...]
    hits: tuple[tuple[Hit, ...], ...]


@dataclass(frozen=True)
class Answered:
    """What a generator said in one wording.

    Attributes:
        text: without citation marks.
        refused: it said that the passages do not answer.
        confidence: mean log-probability of its tokens in nats, if known.
        cited: documents of the passages that it cited, without repeats.
        shown: documents of the passages in its prompt, without repeats.
        seconds: its even share of its batch's time.
        removed: citations that pointed nowhere and were removed.
        probability: that ``text`` is right, calibrated, if known.
        unsure: too unsure to be given: a service refuses, with ``text`` as its guess.
        reordered: what it said from the same passages in reverse, if it was asked.
    """

    text: str
    refused: bool
    confidence: float | None
    cited: tuple[str, ...]
    shown: tuple[str, ...]
    seconds: float
    removed: int = 0
    probability: float | None = None
    unsure: bool = False
    reordered: str | None = None


def ranked_documents(family: FoundFamily) -> list[list[str]]:
    """The documents that each wording found; a document counts at its best passage."""
    return [first_ranks(hit.document_id for hit in hits) for hits in family.hits]


def depth_of(families: Sequence[FoundFamily]) -> int:
    """The longest list of passages."""
    return max((len(hits) for family in families for hits in family.hits), default=0)


def retrieval_columns(
    families: Sequence[FoundFamily], overlap_k: int, top_k: int, rule: AnswerRule
) -> Columns:
    """Everything about retrieval; ranks are over *documents*.

    Args:
        families: one a question.
        overlap_k: k of overlap@k.
        top_k: how many passages were asked for; recall beyond that depth is left out.
        rule: says what counts as holding an answer.
    """
    lists = [ranked_documents(family) for family in families]
    golds = [family.positive_ids for family in families]
    columns: Columns = family_values(
        [Family(ranked, gold) for ranked, gold in zip(lists, golds, strict=True)],
        overlap_k=overlap_k,
        ks=[k for k in KS if k <= top_k],
        depth=top_k,
    )
    anchors = [(ranked[0], gold) for ranked, gold in zip(lists, golds, strict=True)]
    columns["mrr_at_10"] = [
        reciprocal_rank(ranked, gold) if gold else None for ranked, gold in anchors
    ]
    columns["ndcg_at_10"] = [
        ndcg_at_k(ranked, gold, 10) if gold else None for ranked, gold in anchors
    ]
    columns["map"] = [average_precision(ranked, gold) if gold else None for ranked, gold in anchors]
    texts = [[f"{hit.title} {hit.text}" for hit in family.hits[0]] for family in families]
    for k in (5, 20):
        if k <= top_k:
            columns[f"answer_recall_at_{k}"] = [
                answer_recall_at_k(found, family.answers, k, rule.contains)
                if family.answers
                else None
                for found, family in zip(texts, families, strict=True)
            ]
    columns[f"change_by_rewrite_at_{overlap_k}"] = [
        None if value is None else 1.0 - value for value in columns[f"overlap_at_{overlap_k}"]
    ]
    return columns


def between_questions(families: Sequence[FoundFamily], overlap_k: int) -> float | None:
    """Overlap@k between different questions: near 1 where the encoder has collapsed."""
    ranked = [ranked_documents(family)[0] for family in families]
    return between_question_overlap(
        ranked, overlap_k, groups=[family.positive_ids for family in families]
    )


def change_column(
    families: Sequence[FoundFamily], others: Sequence[FoundFamily], overlap_k: int
) -> list[float | None]:
    """1 - overlap@k, over documents, between what the anchors found in two settings.

    Raises:
        ValueError: they are hits of different questions.
    """
    if [family.question_id for family in families] != [family.question_id for family in others]:
        raise ValueError("hits of different questions")
    return [
        1.0 - overlap_at_k(ranked_documents(first)[0], ranked_documents(second)[0], overlap_k)
        for first, second in zip(families, others, strict=True)
    ]


def answer_columns(
    families: Sequence[FoundFamily], answers: Sequence[Sequence[Answered]], rule: AnswerRule
) -> Columns:
    """Everything about answers: of the anchors', and how they change where rewrites were answered
    too.

    ``answer_agreement`` is the share of rewrites whose answer equals the anchor's after the rule's
    normalisation, right or wrong, and ``answer_agreement_f1`` the words that they share; two
    refusals agree, a refusal and an answer do not.
    ``order_flip_rate`` is 1 where a right answer turns wrong when only the order of its passages
    changes, 0 where it stays right; wrong answers are not asked again.
    ``wrong_given`` is 1 where the answer is given and holds no gold answer.
    ``citation_precision`` is the share of cited documents that are gold, of answers that cite;
    ``citation_recall`` the share of the gold documents in the prompt that are cited, where there
    are any; ``removed_citations`` the number of marks that pointed to no passage of the prompt.
    """
    columns: Columns = {}
    for family, texts in zip(families, answers, strict=True):
        anchor = texts[0]
        score = rule.score(anchor.text, family.answers)
        gold = set(family.positive_ids)
        shown = gold.intersection(anchor.shown)
        withheld = anchor.refused or anchor.unsure
        right = [rule.score(answer.text, family.answers).exact_match == 1.0 for answer in texts]
        row: dict[str, float | None] = {
            "exact_match": score.exact_match,
            "f1": score.f1,
            "accuracy": score.accuracy,
            "abstained": float(withheld),
            "wrong_given": float(not withheld and score.accuracy == 0.0),
            "flip_rate": flip_rate([right]),
            "order_flip_rate": None
            if anchor.reordered is None
            else 1.0 - rule.score(anchor.reordered, family.answers).exact_match,
            **_agreement(anchor, texts[1:], rule),
            "citation_precision": fmean(name in gold for name in anchor.cited)
            if anchor.cited and gold
            else None,
            "removed_citations": float(anchor.removed),
            "citation_recall": len(shown.intersection(anchor.cited)) / len(shown)
            if shown
            else None,
        }
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return columns


def _agreement(
    anchor: Answered, others: Sequence[Answered], rule: AnswerRule
) -> dict[str, float | None]:
    exact: list[float] = []
    shared: list[float | None] = []
    for other in others:
        if anchor.refused or other.refused:
            both = float(anchor.refused and other.refused)
            exact.append(both)
            shared.append(both)
        else:
            score = rule.score(other.text, (anchor.text,))
            exact.append(score.exact_match)
            shared.append(score.f1)
    return {
        "answer_agreement": fmean(exact) if exact else None,
        "answer_agreement_f1": fmean(words) if (words := known(shared)) else None,
    }


def probability(answer: Answered) -> float | None:
    """That an answer is right, as its generator has it: calibrated, else the geometric mean of its
    tokens' probabilities.
    """
    if answer.probability is not None:
        return answer.probability
    return None if answer.confidence is None else math.exp(min(0.0, answer.confidence))
