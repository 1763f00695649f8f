"""What a new index has to show before it is served: it finds its own passages, about as well as the
old one does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

from invar_ray.errors import ArtifactError
from invar_ray.evaluation.variance import overlap_at_k
from invar_ray.questions.rules import RuleRewriter
from invar_ray.schema import Example, Hit

if TYPE_CHECKING:
    from invar_ray.answering.retriever import Retriever

Search = Callable[[Sequence[str], int], list[list[Hit]]]
NUM_PROBES, MOST_HITS, WORDS = 16, 5, 12


@dataclass(frozen=True, slots=True)
class Shadow:
    """How an index answers probe queries: the opening words of some of its own passages.

    Attributes:
        recall: share of queries whose own passage is among the first hits: five, or fewer in a very
            small index, where it would be among five by chance.
        overlap: mean overlap of what a query and a rewrite of it find (1: the wording does not
            matter).
    """

    recall: float
    overlap: float


def probe_queries(retriever: Retriever) -> list[tuple[str, str]]:
    """(passage id, query) for passages spread evenly over the index."""
    size = len(retriever.passages)
    rows = sorted({number * size // NUM_PROBES for number in range(NUM_PROBES)})
    return [
        (passage.id, " ".join(f"{passage.title} {passage.text}".split()[:WORDS]))
        for passage in retriever.passages.rows(rows)
    ]


def _depth(retriever: Retriever) -> int:
    return max(1, min(MOST_HITS, len(retriever.passages) // 4))


def measure(
    probes: Sequence[tuple[str, str]], search: Search, depth: int
) -> tuple[Shadow, list[list[str]]]:
    """Recall and overlap of an index on its probes with ``depth`` hits each, and the ids that each
    probe found.
    """
    rewriter = RuleRewriter()
    rewrites = [
        next((v.text for v in rewriter.rewrite(Example(name, query, (), ()), 1, 0)), query)
        for name, query in probes
    ]
    found = search([query for _, query in probes] + rewrites, depth)
    ids = [[hit.passage_id for hit in hits] for hits in found]
    plain, other = ids[: len(probes)], ids[len(probes) :]
    recall = sum(name in each for (name, _), each in zip(probes, plain, strict=True)) / len(probes)
    overlap = sum(overlap_at_k(a, b, depth) for a, b in zip(plain, other, strict=True)) / len(
        probes
    )
    return Shadow(recall, overlap), plain


def compare(
    new: Retriever, old: Retriever, search_old: Search, allowed_drop: float
) -> dict[str, float]:
    """Search both indexes for their own probes, by vectors: words would find a probe's passage
    whatever is wrong with the vectors.

    Args:
        new, old: the index to be served, and the one that is.
        search_old: searches the old one by vectors; it may be busy serving.
        allowed_drop: by how much recall and overlap may be lower than the old index's.

    Returns:
        Both measures of both, and ``same_hits``: how much the two find in common for the new one's
        probes.

    Raises:
        ArtifactError: if the new index is worse by more than that.
    """
    probes = probe_queries(new)
    depth = _depth(new)
    fresh, fresh_ids = measure(probes, partial(new.retrieve, mode="dense"), depth)
    known, _ = measure(probe_queries(old), search_old, _depth(old))
    old_ids = [
        [hit.passage_id for hit in hits]
        for hits in search_old([query for _, query in probes], depth)
    ]
    same = sum(overlap_at_k(a, b, depth) for a, b in zip(fresh_ids, old_ids, strict=True)) / len(
        probes
    )
    report = {f"new_{name}": value for name, value in asdict(fresh).items()}
    report |= {f"old_{name}": value for name, value in asdict(known).items()} | {"same_hits": same}
    for name, fresh_value, known_value in (
        ("recall", fresh.recall, known.recall),
        ("overlap", fresh.overlap, known.overlap),
    ):
        if fresh_value < known_value - allowed_drop:
            raise ArtifactError(
                f"the shadow search's {name} is {fresh_value:.3f} with the new index, "
                f"{known_value:.3f} with the old",
                expected=f"at least {known_value - allowed_drop:.3f}",
                action="look at how the index was built; raise shadow_allowed_drop if it is meant "
                "to be so",
            )
    return report
