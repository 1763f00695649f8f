"""Near-duplicate passages in a ranked list: the same text indexed twice takes a place that another
one could have.
"""

from __future__ import annotations

from collections.abc import Sequence

from invar_ray.schema import Hit
from invar_ray.text.words import words

SHINGLE = 3
SAME = 0.8
"""Share of common shingles (Jaccard) from which two passages count as one."""


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """Runs of three words, case and punctuation aside; a shorter text is one shingle."""
    found = words(text)
    if len(found) <= SHINGLE:
        return frozenset({tuple(found)})
    return frozenset(tuple(found[at : at + SHINGLE]) for at in range(len(found) - SHINGLE + 1))


def similarity(first: frozenset[tuple[str, ...]], second: frozenset[tuple[str, ...]]) -> float:
    """Jaccard: common shingles over all shingles, in [0, 1]."""
    return len(first & second) / len(first | second)


def distinct(hits: Sequence[Hit], top_k: int, same: float = SAME) -> list[int]:
    """Positions of at most ``top_k`` hits, best first, none of which repeats a better one.

    Source: shingles and their resemblance, Broder, "On the resemblance and containment of
    documents", 1997.
    """
    kept: list[int] = []
    seen: list[frozenset[tuple[str, ...]]] = []
    for position, hit in enumerate(hits):
        if len(kept) == top_k:
            break
        mine = shingles(hit.text)
        if all(similarity(mine, other) < same for other in seen):
            kept.append(position)
            seen.append(mine)
    return kept
