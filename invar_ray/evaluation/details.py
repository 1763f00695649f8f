"""What the report draws beside its tables: recall curves, shifts of the gold rank, questions that
change most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from invar_ray.evaluation.metrics import gold_rank, recall_at_k
from invar_ray.evaluation.variance import overlap_at_k

SHIFTS = (
    "lost",
    "11 or more down",
    "4 to 10 down",
    "1 to 3 down",
    "same",
    "1 to 3 up",
    "4 or more up",
    "found",
)
"""Bars of the rank-shift histogram: what a rewrite does to the rank of the gold document."""


@dataclass(frozen=True, slots=True)
class RankedFamily:
    """A question with what each of its wordings found.

    Attributes:
        wordings, ranked: the anchor first; ``ranked`` are document ids, best first.
        titles: of the best passage of each wording.
        gold: gold document ids; may be empty.
    """

    question_id: str
    wordings: Sequence[str]
    ranked: Sequence[Sequence[str]]
    titles: Sequence[str]
    answers: Sequence[str]
    gold: Sequence[str]


def recall_curve(families: Sequence[RankedFamily], depth: int) -> list[float]:
    """Recall@1 .. Recall@depth of the anchors; empty if no question has a gold document."""
    ranks = [gold_rank(family.ranked[0], family.gold) for family in families if family.gold]
    return (
        [fmean(rank is not None and rank <= k for rank in ranks) for k in range(1, depth + 1)]
        if ranks
        else []
    )


def rank_shifts(families: Sequence[RankedFamily]) -> dict[str, float]:
    """Share of rewrites by what they do to the gold document's rank; see :data:`SHIFTS`.

    Rewrites that miss it as the anchor does are left out of the count, and of the histogram.
    """
    counts = dict.fromkeys(SHIFTS, 0)
    for family in families:
        if not family.gold:
            continue
        anchor = gold_rank(family.ranked[0], family.gold)
        for ranked in family.ranked[1:]:
            name = _shift(anchor, gold_rank(ranked, family.gold))
            if name is not None:
                counts[name] += 1
    total = sum(counts.values())
    return {name: count / total for name, count in counts.items()} if total else {}


def worst_questions(families: Sequence[RankedFamily], k: int, count: int) -> list[dict[str, Any]]:
    """The questions whose results change most with the wording: first those that some wordings
    answer and others do not, then by the overlap of the lists.

    Returns:
        JSON-able rows: the question's id, answers and gold, and for each wording its text, the gold
        document's rank (``None`` where it was not found), the overlap@k with the anchor's list and
        the title on top.
    """

    def badness(family: RankedFamily) -> tuple[float, float]:
        recalls = (
            [recall_at_k(ranked, family.gold, k) for ranked in family.ranked]
            if family.gold
            else [0.0]
        )
        overlap = fmean(overlap_at_k(family.ranked[0], other, k) for other in family.ranked[1:])
        return (min(recalls) - max(recalls), overlap)

    varied = [family for family in families if len(family.ranked) > 1]
    return [
        {
            "question_id": family.question_id,
            "answers": list(family.answers)[:3],
            "wordings": [
                {
                    "text": text,
                    "gold_rank": gold_rank(ranked, family.gold) if family.gold else None,
                    "overlap": overlap_at_k(family.ranked[0], ranked, k),
                    "top": title,
                }
                for text, ranked, title in zip(
                    family.wordings, family.ranked, family.titles, strict=True
                )
            ],
        }
        for family in sorted(varied, key=badness)[:count]
    ]


def _shift(anchor: int | None, reworded: int | None) -> str | None:
    if anchor is None:
        return None if reworded is None else "found"
    if reworded is None:
        return "lost"
    down = reworded - anchor
    if down == 0:
        return "same"
    if down > 0:
        return "1 to 3 down" if down <= 3 else "4 to 10 down" if down <= 10 else "11 or more down"
    return "1 to 3 up" if down >= -3 else "4 or more up"
