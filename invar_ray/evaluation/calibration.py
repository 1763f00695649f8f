"""Whether confidence means anything: of answers given with probability p, a share p ought to be
right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True, slots=True)
class Bin:
    """Answers whose confidence lies in [low, high).

    Attributes:
        count: how many; bins without any are left out.
        confidence: their mean confidence.
        accuracy: the share of them that is right.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def calibration_bins(
    confidences: Sequence[float], right: Sequence[float], num_bins: int = 10
) -> list[Bin]:
    """Bins of equal width over [0, 1]; a confidence of 1 is in the last.

    Raises:
        ValueError: sizes differ, a confidence is outside [0, 1], or there is no bin.
    """
    if len(confidences) != len(right):
        raise ValueError(f"right: got {len(right)} values, expected {len(confidences)}")
    if num_bins < 1 or not all(0.0 <= value <= 1.0 for value in confidences):
        raise ValueError("expected confidences in [0, 1] and at least one bin")
    members: dict[int, list[int]] = {}
    for number, value in enumerate(confidences):
        members.setdefault(min(num_bins - 1, int(value * num_bins)), []).append(number)
    return [
        Bin(
            place / num_bins,
            (place + 1) / num_bins,
            len(inside),
            fmean(confidences[number] for number in inside),
            fmean(right[number] for number in inside),
        )
        for place, inside in sorted(members.items())
    ]


def expected_calibration_error(bins: Sequence[Bin]) -> float | None:
    """Mean over answers of |accuracy - confidence| of their bin, in [0, 1]; ``None`` without
    answers.

    Source: Guo et al., "On Calibration of Modern Neural Networks", arXiv 1706.04599, equation 3.
    """
    total = sum(entry.count for entry in bins)
    if not total:
        return None
    return sum(entry.count * abs(entry.accuracy - entry.confidence) for entry in bins) / total


@dataclass(frozen=True, slots=True)
class RiskPoint:
    """Of answers with at least this probability.

    Attributes:
        threshold: the least probability.
        coverage: the share of questions that is answered.
        risk: the share of wrong answers among those.
    """

    threshold: float
    coverage: float
    risk: float


def risk_coverage(
    probabilities: Sequence[float], right: Sequence[bool], asked: int | None = None
) -> list[RiskPoint]:
    """The risk at every threshold that makes a difference, the highest threshold first.

    Args:
        probabilities: of the answers.
        right: whether each is.
        asked: how many questions there were, refused ones among them; by default all are answered.

    Source: El-Yaniv and Wiener, "On the Foundations of Noise-free Selective Classification", JMLR
    2010.
    """
    order = sorted(zip(probabilities, right, strict=True), key=lambda pair: -pair[0])
    points, wrong = [], 0
    for count, (probability, is_right) in enumerate(order, start=1):
        wrong += not is_right
        if count == len(order) or order[count][0] < probability:  # ties are answered together
            points.append(RiskPoint(probability, count / (asked or len(order)), wrong / count))
    return points
