"""Hard negatives: passages that rank high for a question but do not answer it.

They are taken from the union of the lists of all of a question's wordings: what ranks high in some
wordings only (a variant pattern) lives there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from invar_ray.schema import Passage
from invar_ray.text.answers import contains_answer


@dataclass
class MiningReport:
    """How many candidates each rule dropped, over all questions."""

    dropped: Counter[str] = field(default_factory=Counter)
    kept: int = 0


def union_by_best_rank(lists: Sequence[Sequence[int]], first_rank: int = 1) -> list[int]:
    """Rows of several ranked lists, each once, by best rank, ties by the order of the lists;
    without those whose best rank is above ``first_rank`` (ranks count from 1).
    """
    best: dict[int, int] = {}
    for ranked in lists:
        for rank, row in enumerate(ranked):
            best[row] = min(rank, best.get(row, rank))
    ordered = sorted(best, key=best.__getitem__)  # stable: insertion order breaks ties
    return [row for row in ordered if best[row] >= first_rank - 1]


def select_negatives(
    candidates: Sequence[int],
    passages: Mapping[int, Passage],
    positive: int,
    answers: Sequence[str],
    teacher_scores: npt.NDArray[np.float32],
    *,
    count: int,
    margin: float,
    report: MiningReport,
    gold_documents: Collection[str] = (),
) -> list[int]:
    """The first ``count`` candidates that are no answer.

    Dropped: copies of the positive and spans that overlap it; passages that hold a gold answer;
    passages whose teacher score is at least s(positive) - margin * |s(positive)| (the rules of the
    contrastive loss's mask, METHOD "Contrastive").

    Args:
        candidates: rows, best first.
        passages: those in these rows, and the positive's.
        positive: row of the positive.
        teacher_scores: s_T of each candidate, then of the positive as the last entry.
        report: counts are added to it.
        gold_documents: documents that are annotated as answering.  Other passages of the positive's
            own document stay: they are the hardest negatives.
    """
    gold = passages[positive]
    limit = float(teacher_scores[-1] - margin * abs(teacher_scores[-1]))
    chosen: list[int] = []
    for row, score in zip(candidates, teacher_scores, strict=False):
        if len(chosen) == count:
            break
        passage = passages[row]
        if row == positive or passage.text == gold.text:
            report.dropped["copy of the positive"] += 1
        elif (
            passage.document_id == gold.document_id
            and passage.start < gold.end
            and passage.end > gold.start
        ):
            report.dropped["overlaps the positive"] += 1
        elif passage.document_id in gold_documents and passage.document_id != gold.document_id:
            report.dropped["another gold document"] += 1
        elif contains_answer(f"{passage.title} {passage.text}", answers):
            report.dropped["holds a gold answer"] += 1
        elif score >= limit:
            report.dropped["teacher score too high"] += 1
        else:
            chosen.append(row)
    report.kept += len(chosen)
    return chosen
