"""Several ranked lists into one: by scores, of vectors and of words; by ranks, of rewrites made at
query time.  And one list in another order, by a reranker's scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from invar_ray.questions.phrases import WORDING
from invar_ray.questions.rules import RuleRewriter
from invar_ray.schema import Example, Hit
from invar_ray.text.stable import stable_hash

QUERY_REWRITES = 2
"""Rewrites at query time that a report's rows ``*_rewrites`` fuse."""
RANK_CONSTANT = 60
"""k of reciprocal rank fusion (published: 60)."""
DENSE_WEIGHT = 0.4
"""Weight of vectors against words in a hybrid search where an index does not say another: of
encoders that were not trained (measured in docs/log.md)."""
_DEPTH = 100
"""How much of each list a hybrid search fuses, at least."""


def fusion_depth(top_k: int) -> int:
    """How long the two lists of a hybrid search are where ``top_k`` hits are wanted."""
    return max(_DEPTH, top_k)


def fuse_lists(
    dense: Sequence[Hit], bm25: Sequence[Hit], top_k: int, dense_weight: float = DENSE_WEIGHT
) -> list[Hit]:
    """The list of a hybrid search: a weighted sum of both scores, each brought to [0, 1].

    A cosine is scaled between the last and the first of its list, a score of BM25 between 0 and the
    first.  What a list does not hold has 0 there.

    Args:
        dense: hits by vectors, best first; ``score`` is a cosine.
        bm25: hits by words, best first.
        top_k: keep at most this many.
        dense_weight: of the cosines, in [0, 1]; words have the rest.

    Returns:
        Hits with new ranks and the fused ``score`` in [0, 1]; ties go by best rank, dense first.

    Source: Bruch, Gai, Ingber, "An Analysis of Fusion Functions for Hybrid Retrieval", arXiv
    2210.11934 (convex combination).  The weight was chosen on train questions that no stage saw.
    """
    scores: dict[str, float] = {}
    best: dict[str, tuple[int, int]] = {}
    hits: dict[str, Hit] = {}
    lowest = dense[-1].score if dense else 0.0
    for number, (ranked, low, weight) in enumerate(
        [(dense, lowest, dense_weight), (bm25, 0.0, 1.0 - dense_weight)]
    ):
        span = ranked[0].score - low if ranked else 0.0
        for rank, hit in enumerate(ranked, start=1):
            name, scaled = hit.passage_id, (hit.score - low) / span if span > 0.0 else 1.0
            scores[name] = scores.get(name, 0.0) + weight * scaled
            best[name] = min(best.get(name, (rank, number)), (rank, number))
            hits.setdefault(name, hit)
    return _ranked(hits, scores, best, top_k)


def fuse_hits(
    lists: Sequence[Sequence[Hit]], top_k: int, rank_constant: int = RANK_CONSTANT
) -> list[Hit]:
    """Reciprocal rank fusion: a passage's score is the sum over lists of 1 / (rank_constant +
    rank).

    Args:
        lists: ranked hits, best first; a passage counts once a list, at its best rank.
        top_k: keep at most this many.
        rank_constant: the larger, the less the first ranks stand out.

    Returns:
        Hits with new ranks and the fused ``score``; ties go by best rank, then by the order of the
        lists.

    Source: Cormack, Clarke, Buettcher, "Reciprocal Rank Fusion outperforms Condorcet and individual
    Rank Learning Methods", SIGIR 2009.
    """
    scores: dict[str, float] = {}
    best: dict[str, tuple[int, int]] = {}
    hits: dict[str, Hit] = {}
    for number, ranked in enumerate(lists):
        seen: set[str] = set()
        for rank, hit in enumerate(ranked, start=1):
            name = hit.passage_id
            if name in seen:
                continue
            seen.add(name)
            scores[name] = scores.get(name, 0.0) + 1.0 / (rank_constant + rank)
            best[name] = min(best.get(name, (rank, number)), (rank, number))
            hits.setdefault(name, hit)
    return _ranked(hits, scores, best, top_k)


def reordered(hits: Sequence[Hit], scores: Sequence[float], top_k: int) -> list[Hit]:
    """Hits by a reranker's scores, best first, with new ranks; ties keep their order."""
    order = sorted(range(len(hits)), key=lambda number: -scores[number])[:top_k]
    return [
        replace(hits[number], rank=rank, score=scores[number])
        for rank, number in enumerate(order, start=1)
    ]


def read_with_title(hit: Hit) -> str:
    """A hit as a reranker reads it."""
    return f"{hit.title} {hit.text}".strip()


def _ranked(
    hits: dict[str, Hit], scores: dict[str, float], best: dict[str, tuple[int, int]], top_k: int
) -> list[Hit]:
    # Sums of the same terms in another order differ in their last bits: without rounding they would
    # not tie.
    order = sorted(hits, key=lambda name: (-round(scores[name], 12), best[name]))[:top_k]
    return [
        replace(hits[name], rank=rank, score=scores[name])
        for rank, name in enumerate(order, start=1)
    ]


def query_rewrites(wording: str, count: int, seed: int) -> list[str]:
    """Rewrites of one wording, made by rule from nothing but itself, as a service could at query
    time.

    Only rules that say it otherwise (no typos or misheard words); short questions may have fewer
    than ``count``.  They depend on the wording alone, never on the question that it is a wording
    of.
    """
    name = f"query-{stable_hash(wording):016x}"
    made = RuleRewriter().rewrite(Example(name, wording, (), ()), 2 * count + 2, seed)
    return [rewrite.text for rewrite in made if rewrite.kind in WORDING][:count]
