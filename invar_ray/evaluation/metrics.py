"""Metrics of one question: retrieval over ranked ids, and answers over texts.

All return a number in [0, 1]; a table shows their means over questions.  ``ranked`` is a list of
ids, best first. Where hits are passages and gold is documents, map hits to documents and keep the
best rank of each with :func:`first_ranks`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence

from invar_ray.text.answers import contains_answer, f1_words, normalise_answer

OVERLAP_K = 5
"""k of overlap@k in reports."""


def first_ranks(ids: Iterable[str]) -> list[str]:
    """``ids`` without repeats, each at its best rank."""
    return list(dict.fromkeys(ids))


def recall_at_k(ranked: Sequence[str], gold: Collection[str], k: int) -> float:
    """1 if any gold id is in the top k, else 0.

    This is the convention of open-domain question answering (DPR's "top-k accuracy", arXiv
    2004.04906, section 5; also "success" or "hits" @k), where one passage that answers is enough.
    It is not the share of gold ids found, as in BEIR; with one gold id the two are the same.

    Raises:
        ValueError: k is below 1 or there is no gold id.
    """
    _check(gold, k)
    return float(any(name in gold for name in ranked[:k]))


def reciprocal_rank(ranked: Sequence[str], gold: Collection[str], k: int = 10) -> float:
    """1 / rank of the first gold id within the top k, else 0; its mean is MRR@k.

    Raises:
        ValueError: k is below 1 or there is no gold id.
    """
    _check(gold, k)
    rank = gold_rank(ranked[:k], gold)
    return 0.0 if rank is None else 1.0 / rank


def ndcg_at_k(ranked: Sequence[str], gold: Collection[str], k: int) -> float:
    """Normalised discounted cumulative gain with binary relevance: a gold id at rank r gains 1 /
    log2(r + 1).

    The ideal list holds min(k, number of gold ids) gold ids on top.  A gold id that is listed twice
    gains once.

    Raises:
        ValueError: k is below 1 or there is no gold id.
    """
    _check(gold, k)
    golds = set(gold)
    gain, seen = 0.0, set()
    for rank, name in enumerate(ranked[:k], start=1):
        if name in golds and name not in seen:
            seen.add(name)
            gain += 1.0 / math.log2(rank + 1)
    ideal = sum(1.0 / math.log2(rank + 1) for rank in range(1, min(k, len(golds)) + 1))
    return gain / ideal


def average_precision(ranked: Sequence[str], gold: Collection[str]) -> float:
    """Average precision over the whole list; its mean over questions is MAP.

    The sum over ranks that hold a gold id of the precision there, divided by the number of gold
    ids: those that the list lacks count as 0, so that the value depends on how deep the list is.  A
    gold id that is listed twice counts once.

    Raises:
        ValueError: there is no gold id.
    """
    _check(gold)
    golds = set(gold)
    total, seen = 0.0, set()
    for rank, name in enumerate(ranked, start=1):
        if name in golds and name not in seen:
            seen.add(name)
            total += len(seen) / rank
    return total / len(golds)


def gold_rank(ranked: Sequence[str], gold: Collection[str]) -> int | None:
    """Rank (1 is the best) of the first gold id, ``None`` if the list has none."""
    return next((rank for rank, name in enumerate(ranked, start=1) if name in gold), None)


def answer_recall_at_k(
    texts: Sequence[str],
    answers: Sequence[str],
    k: int,
    contains: Callable[[str, Sequence[str]], bool] = contains_answer,
) -> float:
    """1 if any of the top k passages' texts holds a gold answer, else 0.

    Needs no gold ids, so it can be had where a benchmark names answers only; it also counts
    passages that hold the string by chance.

    Args:
        texts: passages, best first.
        answers: gold answers.
        k: how many passages.
        contains: whether a text holds an answer; see :mod:`invar_ray.evaluation.scoring`.

    Raises:
        ValueError: k is below 1 or there is no answer.
    """
    _check(answers, k)
    return float(any(contains(text, answers) for text in texts[:k]))


def exact_match(text: str, answers: Sequence[str]) -> float:
    """1 if ``text`` equals any gold answer after SQuAD normalisation, else 0.

    Raises:
        ValueError: there is no answer.
    """
    _check(answers)
    given = normalise_answer(text)
    return float(any(given == normalise_answer(answer) for answer in answers))


def f1(text: str, answers: Sequence[str]) -> float:
    """SQuAD's token F1 with the gold answer that it agrees with best.

    Tokens are the words after normalisation (:func:`invar_ray.text.answers.f1_words`), counted with
    repeats.  Where one side has none, both must have none (SQuAD 2.0's rule).

    Raises:
        ValueError: there is no answer.
    """
    _check(answers)
    return max(token_f1(f1_words(text), f1_words(answer)) for answer in answers)


def token_f1(given: Sequence[str], wanted: Sequence[str]) -> float:
    """Token F1 of two lists of normalised words; where one is empty, both must be."""
    if not given or not wanted:
        return float(not given and not wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    # 2PR / (P + R) with P = common / len(given) and R = common / len(wanted).
    return 2.0 * common / (len(given) + len(wanted))


def _check(gold: Collection[str], k: int = 1) -> None:
    if k < 1:
        raise ValueError(f"k: got {k}, expected at least 1")
    if not gold:
        raise ValueError(
            "gold: got none, expected at least one; leave questions without gold out of this metric"
        )
