"""Search, fusion and one question's numbers for the ablation."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import numpy as np
from ablation_data import EvalSet

from invar_ray.evaluation.metrics import first_ranks, recall_at_k
from invar_ray.evaluation.variance import overlap_at_k
from invar_ray.models.encoder import Encoder

DEPTH = 50  # passages; their documents are what is compared
OVERLAP_K = 10
RRF_K = 60
QUESTION_FIELDS = (
    "recall_at_1",
    "recall_at_5",
    "worst_recall_at_5",
    "reworded_recall_at_5",
    "overlap_at_10",
)


def measure(encoder: Encoder, data: EvalSet, *, fused: bool) -> dict[str, list[list[list[str]]]]:
    """Label -> for each question, for each of its wordings, the document ids, best first."""
    passages = encoder.encode_passages(data.passages)
    owners = np.asarray(data.documents)

    def search(texts: Sequence[str]) -> list[list[str]]:
        scores = encoder.encode_queries(texts) @ passages.T
        best = np.argsort(-scores, axis=1, kind="stable")[:, :DEPTH]
        return [first_ranks(owners[row].tolist()) for row in best]

    def folded(flat: list[list[str]]) -> list[list[list[str]]]:
        lists = iter(flat)
        return [[next(lists) for _ in family] for family in data.families]

    found = {"": folded(search([text for family in data.families for text in family]))}
    if fused:
        wordings = [[text, *more] for family, rewrites in zip(data.families, data.rewrites, strict=True)  # noqa: E501
                    for text, more in zip(family, rewrites, strict=True)]  # fmt: skip
        lists = iter(search([text for group in wordings for text in group]))
        found[" + RRF"] = folded(
            [reciprocal_rank_fusion([next(lists) for _ in group]) for group in wordings]
        )
    return found


def reciprocal_rank_fusion(lists: Sequence[Sequence[str]], k: int = RRF_K) -> list[str]:
    """Ids by the sum of 1 / (k + rank) over the lists (Cormack et al., SIGIR 2009, k = 60); ties by
    the first list.
    """
    scores: dict[str, float] = {}
    for ranked in lists:
        for rank, name in enumerate(ranked, start=1):
            scores[name] = scores.get(name, 0.0) + 1.0 / (k + rank)
    return sorted(scores, key=lambda name: -scores[name])


def question_values(ranked: Sequence[Sequence[str]], gold: Sequence[str]) -> dict[str, float]:
    """One question's numbers, named as in ``QUESTION_FIELDS``."""
    at_5 = [recall_at_k(found, gold, 5) for found in ranked]
    return {
        "recall_at_1": recall_at_k(ranked[0], gold, 1),
        "recall_at_5": at_5[0],
        "worst_recall_at_5": min(at_5),
        "reworded_recall_at_5": fmean(at_5[1:] or at_5),
        "overlap_at_10": fmean(
            [overlap_at_k(ranked[0], other, OVERLAP_K) for other in ranked[1:]] or [1.0]
        ),
    }
