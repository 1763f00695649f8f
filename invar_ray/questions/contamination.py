"""Training questions that are dev questions in other words: a model that saw them is measured on
what it knows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from invar_ray.text.words import terms

_SLACK = 1e-9  # of sums of floats


@dataclass(frozen=True)
class NearDuplicate:
    """A training text and the dev text that it resembles most.

    Attributes:
        train, dev: keys of the two.
        similarity: in (0, 1].
    """

    train: str
    dev: str
    similarity: float


def near_duplicates(
    train: Mapping[str, Sequence[str]], dev: Mapping[str, Sequence[str]], threshold: float
) -> list[NearDuplicate]:
    """The training questions any wording of which resembles a wording of a dev question.

    Formula::

        sim(a, b) = sum of w(t) over words t in both / sum of w(t) over words t in either
        w(t) = log(1 + N / n(t)),   N all texts, n(t) those with t

    so that questions of one template about different things, which share its common words alone,
    are not alike.  Texts whose numbers differ are not alike at all (who won in 2010, who won in
    2012).

    Args:
        train: key -> wordings.
        dev: key -> wordings.
        threshold: least similarity, in (0, 1].

    Returns:
        In the order of ``train``; of several dev questions the most similar one (the first of
        equals).

    Source: [ours]; weighted Jaccard similarity with prefix filtering, Chaudhuri et al., "A
    Primitive Operator for Similarity Joins in Data Cleaning", ICDE 2006.
    """
    train_sets = {key: [_words(text) for text in texts] for key, texts in train.items()}
    dev_sets = [(key, _words(text)) for key, texts in dev.items() for text in texts]
    counts = Counter(word for _, words in dev_sets for word in words)
    counts.update(word for sets in train_sets.values() for words in sets for word in words)
    total = len(dev_sets) + sum(map(len, train_sets.values()))
    weight = {word: math.log(1 + total / count) for word, count in counts.items()}

    holders: dict[str, list[int]] = {}
    for number, (_, words) in enumerate(dev_sets):
        for word in _prefix(words, weight, threshold):
            holders.setdefault(word, []).append(number)
    found = []
    for key, sets in train_sets.items():
        best: NearDuplicate | None = None
        for words in sets:
            seen = {
                number
                for word in _prefix(words, weight, threshold)
                for number in holders.get(word, ())
            }
            for number in sorted(seen):
                other, theirs = dev_sets[number]
                value = _similarity(words, theirs, weight)
                if value >= threshold - _SLACK and (best is None or value > best.similarity):
                    best = NearDuplicate(key, other, value)
        if best is not None:
            found.append(best)
    return found


def _words(text: str) -> frozenset[str]:
    return frozenset(terms(text))


def _prefix(words: frozenset[str], weight: Mapping[str, float], threshold: float) -> list[str]:
    """Words of which a text that is similar enough has at least one: the others together weigh too
    little.
    """
    ordered = sorted(words, key=lambda word: (-weight[word], word))
    left = sum(weight[word] for word in words)
    enough = threshold * left - _SLACK
    kept = []
    for word in ordered:
        if left < enough:
            break
        kept.append(word)
        left -= weight[word]
    return kept


def _similarity(
    first: frozenset[str], second: frozenset[str], weight: Mapping[str, float]
) -> float:
    if {word for word in first ^ second if any(map(str.isdigit, word))}:
        return 0.0
    either = sum(weight[word] for word in first | second)
    return sum(weight[word] for word in first & second) / either if either else 0.0
