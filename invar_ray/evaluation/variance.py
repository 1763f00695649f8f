"""Retrieval variance: how much a question's results change when it is said otherwise.

A *family* is one question in all its environments (rewrites, windows, or index settings), the
anchor first.  Lists are ids, best first; across windows compare hits as documents
(``metrics.first_ranks``).  A collapsed encoder, which returns one list for everything, has no
variance at all, so the overlap between *different* questions always stands beside it.

Source: METHOD "What is measured".
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, pstdev

from invar_ray.evaluation.metrics import first_ranks, gold_rank, recall_at_k


@dataclass(frozen=True, slots=True)
class Family:
    """One question in all its environments.

    Attributes:
        ranked: ranked ids of each environment, the anchor's first.
        gold: gold ids, the same for all environments; at least one.
    """

    ranked: Sequence[Sequence[str]]
    gold: Sequence[str]


def overlap_at_k(a: Sequence[str], b: Sequence[str], k: int) -> float:
    """Jaccard overlap of the two top-k sets, |A & B| / |A | B|, in [0, 1]; 1 for two empty lists.

    Two lists of k that share n ids have n / (2k - n), so 4 of 5 shared is 0.667.

    Raises:
        ValueError: k is below 1.
    """
    if k < 1:
        raise ValueError(f"k: got {k}, expected at least 1")
    first, second = set(a[:k]), set(b[:k])
    union = first | second
    return len(first & second) / len(union) if union else 1.0


def rbo(a: Sequence[str], b: Sequence[str], p: float = 0.9) -> float:
    """Rank-biased overlap of two ranked lists, extrapolated, in [0, 1].

    Formula, with s <= l the two lengths and X_d the number of ids that the two top-d sets share::

        RBO = (1 - p) / p * (sum_{d=1..l} X_d / d p^d + sum_{d=s+1..l} X_s (d - s) / (s d) p^d)
              + ((X_l - X_s) / l + X_s / s) p^l

    Args:
        a, b: ids, best first; repeats count at their best rank.
        p: persistence in (0, 1): the weight of the top 10 ranks is about 0.86 at 0.9.

    Returns:
        1 for equal lists (two empty ones too), 0 for disjoint ones.

    Raises:
        ValueError: p is outside (0, 1).

    Source: Webber, Moffat, Zobel, "A similarity measure for indefinite rankings", TOIS 28(4), 2010,
    equation 32 (RBO_EXT for lists of different lengths, without ties).
    """
    if not 0.0 < p < 1.0:
        raise ValueError(f"p: got {p}, expected a number in (0, 1)")
    short, long = sorted((first_ranks(a), first_ranks(b)), key=len)
    s, length = len(short), len(long)
    if s == 0:
        return float(length == 0)
    shared = 0
    total = 0.0
    shared_at_s = 0
    seen_short: set[str] = set()
    seen_long: set[str] = set()
    for depth in range(1, length + 1):
        ours = long[depth - 1]
        seen_long.add(ours)
        shared += ours in seen_short
        if depth <= s:
            theirs = short[depth - 1]
            seen_short.add(theirs)
            shared += theirs in seen_long
        weight = p**depth
        total += shared / depth * weight
        if depth == s:
            shared_at_s = shared
        if depth > s:
            total += shared_at_s * (depth - s) / (s * depth) * weight
    tail = ((shared - shared_at_s) / length + shared_at_s / s) * p**length
    return min(1.0, (1.0 - p) / p * total + tail)


def summarise_families(
    families: Sequence[Family],
    *,
    overlap_k: int = 5,
    ks: Sequence[int] = (1, 5, 20),
    rbo_p: float = 0.9,
    depth: int | None = None,
    pairs: int = 2000,
    seed: int = 0,
) -> dict[str, float]:
    """Means over families of everything that says how much retrieval varies.

    Args:
        families: at least one.
        overlap_k: k of overlap@k.
        ks: cut-offs of recall.
        rbo_p: persistence of rank-biased overlap.
        depth: a gold id that a list lacks counts as rank ``depth + 1``; ``None`` takes the longest
            list of all families as the depth.
        pairs, seed: see :func:`between_question_overlap`.

    Returns:
        Always: ``num_families``, ``recall_at_<k>`` (of the anchors), and, with 2 families or more
        that share no gold id, ``overlap_between_questions_at_<overlap_k>``.  Only if a family has 2
        environments or more, as means over such families: ``overlap_at_<overlap_k>``,
        ``overlap_at_10`` (lists of ``depth`` 10 or more only), ``rbo_at_<overlap_k>`` and ``rbo``
        of the whole lists (mean over the other environments of the agreement with the anchor's),
        ``reworded_recall_at_<k>`` (mean over the other environments), ``worst_recall_at_<k>`` (1
        only if *every* environment has it), ``recall_at_<k>_std`` and ``gold_rank_std`` (population
        standard deviations within the family; ranks as above).

    Raises:
        ValueError: there are no families, or one has no list or no gold id.
    """
    if not families:
        raise ValueError("families: got none, expected at least one")
    for number, family in enumerate(families):
        if not family.ranked or not family.gold:
            raise ValueError(f"family {number}: expected at least one list and one gold id")
    found = {"num_families": float(len(families))}
    values = family_values(families, overlap_k=overlap_k, ks=ks, rbo_p=rbo_p, depth=depth)
    between = between_question_overlap(
        [family.ranked[0] for family in families],
        overlap_k,
        groups=[family.gold for family in families],
        pairs=pairs,
        seed=seed,
    )
    if between is not None:
        found[f"overlap_between_questions_at_{overlap_k}"] = between
    return found | {name: fmean(kept) for name, column in values.items() if (kept := known(column))}


def family_values(
    families: Sequence[Family],
    *,
    overlap_k: int = 5,
    ks: Sequence[int] = (1, 5, 20),
    rbo_p: float = 0.9,
    depth: int | None = None,
) -> dict[str, list[float | None]]:
    """What :func:`summarise_families` averages, family by family: metric -> one value per family,
    in their order.

    ``None`` stands where a family has no such value: agreement and spread need two environments,
    and recalls and ranks need a gold id (benchmarks that name answers only have none).
    """
    deepest = max((len(ranked) for family in families for ranked in family.ranked), default=0)
    missing = (deepest if depth is None else depth) + 1
    columns: dict[str, list[float | None]] = {}
    for family in families:
        row = _family_row(family, overlap_k, ks, rbo_p, missing)
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return columns


def known(column: Iterable[float | None]) -> list[float]:
    """The values of a column that are there."""
    return [value for value in column if value is not None]


def _family_row(
    family: Family, overlap_k: int, ks: Sequence[int], rbo_p: float, missing: int
) -> dict[str, float | None]:
    anchor, *others = family.ranked
    gold, varied = family.gold, bool(others)
    row: dict[str, float | None] = {}
    for k in ks:
        row[f"recall_at_{k}"] = recall_at_k(anchor, gold, k) if gold else None
    for k in dict.fromkeys((overlap_k, *(() if missing <= 10 else (10,)))):
        row[f"overlap_at_{k}"] = (
            fmean(overlap_at_k(anchor, o, k) for o in others) if varied else None
        )
    for name, depth in ((f"rbo_at_{overlap_k}", overlap_k), ("rbo", None)):
        agreement = [rbo(anchor[:depth], other[:depth], rbo_p) for other in others]
        row[name] = fmean(agreement) if varied else None
    for k in ks:
        recalls = (
            [recall_at_k(ranked, gold, k) for ranked in family.ranked] if gold and varied else []
        )
        row[f"reworded_recall_at_{k}"] = fmean(recalls[1:]) if recalls else None
        row[f"worst_recall_at_{k}"] = min(recalls, default=None)
        row[f"recall_at_{k}_std"] = pstdev(recalls) if recalls else None
    ranks = [gold_rank(ranked, gold) or missing for ranked in family.ranked]
    row["gold_rank_std"] = pstdev(ranks) if gold and varied else None
    return row


def flip_rate(right: Iterable[Sequence[bool]]) -> float | None:
    """How often an answer turns wrong when its question is reworded, given that the anchor's answer
    is right.

    Args:
        right: for each family whether each environment's answer is right, the anchor first.

    Returns:
        Mean, over the families whose anchor is right and that have other environments, of the share
        of those that are answered wrong; ``None`` if there is no such family (0 would look like
        stability).
    """
    shares = [
        fmean(not value for value in family[1:])
        for family in right
        if len(family) > 1 and family[0]
    ]
    return fmean(shares) if shares else None


def worst_wording_loss(
    anchor: Sequence[float | None], worst: Sequence[float | None]
) -> float | None:
    """The share of what the questions as asked find that some wording of them loses:
    1 - mean(worst) / mean(anchor).

    Args:
        anchor: recall of each family's anchor.
        worst: the least recall of its environments; ``None`` where it has only one, and such
            families count nowhere.

    Returns:
        In [0, 1]; ``None`` where the anchors find nothing.
    """
    pairs = [(a, w) for a, w in zip(anchor, worst, strict=True) if a is not None and w is not None]
    found = sum(a for a, _ in pairs)
    return 1.0 - sum(w for _, w in pairs) / found if found > 0.0 else None


def between_question_overlap(
    ranked: Sequence[Sequence[str]],
    k: int,
    *,
    groups: Sequence[Iterable[str]] | None = None,
    pairs: int = 2000,
    seed: int = 0,
) -> float | None:
    """Mean overlap@k between *different* questions: near 1 where the encoder has collapsed.

    Args:
        ranked: one list (the anchor's) for each question.
        k: of overlap@k.
        groups: for each question its gold ids; pairs that share one are left out, since they ought
            to overlap.
        pairs: average over at most this many pairs, drawn with ``seed``; all pairs if there are no
            more.
        seed: of the draw.

    Returns:
        The mean, or ``None`` if there is no pair.
    """
    keys = (
        [frozenset(group) for group in groups]
        if groups is not None
        else [frozenset[str]()] * len(ranked)
    )
    size = len(ranked)
    if size * (size - 1) // 2 <= pairs:
        drawn: Iterable[tuple[int, int]] = combinations(range(size), 2)
    else:
        generator = random.Random(seed)
        drawn = (_pair(generator, size) for _ in range(pairs))
    overlaps = [overlap_at_k(ranked[i], ranked[j], k) for i, j in drawn if not keys[i] & keys[j]]
    return fmean(overlaps) if overlaps else None


def _pair(generator: random.Random, size: int) -> tuple[int, int]:
    first, second = generator.sample(range(size), 2)
    return first, second
