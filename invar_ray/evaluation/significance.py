"""Intervals for means over questions, by resampling whole clusters.

Rewrites of one question and questions on one passage are not independent: an interval that treats
them so is too narrow.  Clusters (passage ids) are drawn with replacement, each with all its
questions.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

_BLOCK = 4_000_000  # counts that are drawn at a time: 32 MB


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with a percentile interval.

    Attributes:
        mean: over all values (each value weighs the same, whatever its cluster's size).
        low, high: of the interval.
        level: its nominal coverage, e.g. 0.95.
        clusters: how many clusters stood behind it; with fewer than about 20 it is not to be
            trusted.
    """

    mean: float
    low: float
    high: float
    level: float
    clusters: int

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside: for a paired difference, whether the two systems differ at this
        level.
        """
        return self.low > 0.0 or self.high < 0.0


def cluster_bootstrap(
    values: ArrayLike,
    clusters: Sequence[Hashable],
    *,
    samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap interval of a mean over clustered values.

    Each of ``samples`` resamples draws as many clusters as there are, with replacement, and takes
    the mean of all their values.

    Args:
        values: [n], or [seeds, n]: a metric of each question, for several training seeds averaged
            over them first (the interval is over questions; it does not show the spread over
            seeds).
        clusters: [n], the cluster of each value: its gold passage's id.
        samples: resamples.
        seed: of the draws; same input and seed, same interval, whatever the order of the values
            within their cluster.
        level: coverage in (0, 1).

    Raises:
        ValueError: sizes differ, there is no value, a value is not finite, or a setting is out of
            its range.

    Source: Field and Welsh, "Bootstrapping clustered data", JRSS B 69(3), 2007 (cluster bootstrap);
    Efron and Tibshirani, "An Introduction to the Bootstrap", chapter 13 (percentile interval).
    """
    data = _averaged(values, "values")
    if len(clusters) != data.size:
        raise ValueError(
            f"clusters: got {len(clusters)}, expected one for each of the {data.size} values"
        )
    if samples < 1 or not 0.0 < level < 1.0:
        raise ValueError(
            f"samples, level: got {samples}, {level}, expected at least 1 and a number in (0, 1)"
        )
    codes, size = _codes(clusters)
    sums = np.bincount(codes, weights=data, minlength=size)
    counts = np.bincount(codes, minlength=size)

    generator = np.random.default_rng(seed)
    means = np.empty(samples)
    step = max(1, _BLOCK // size)
    for start in range(0, samples, step):
        stop = min(samples, start + step)
        drawn = generator.integers(size, size=(stop - start, size))
        means[start:stop] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(float(data.mean()), float(low), float(high), level, size)


def paired_cluster_bootstrap(
    first: ArrayLike,
    second: ArrayLike,
    clusters: Sequence[Hashable],
    *,
    samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Interval of the mean difference ``first - second`` of two systems on the same questions.

    Pairing takes the difficulty of the questions out, so that it is much narrower than two
    intervals side by side.

    Args:
        first, second: [n] or [seeds, n] (averaged over seeds first; the numbers of seeds may
            differ), in the same order of questions.
        clusters, samples, seed, level: as in :func:`cluster_bootstrap`.

    Raises:
        ValueError: as :func:`cluster_bootstrap`, or the two differ in length.
    """
    a, b = _averaged(first, "first"), _averaged(second, "second")
    if a.size != b.size:
        raise ValueError(
            f"second: got {b.size} values, expected {a.size}, one for each of the first system's"
        )
    return cluster_bootstrap(a - b, clusters, samples=samples, seed=seed, level=level)


def bootstrap_columns(
    columns: Mapping[str, Sequence[float | None]],
    clusters: Sequence[Hashable],
    *,
    samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """:func:`cluster_bootstrap` of many metrics of the same questions, from one set of draws.

    Args:
        columns: metric -> [n] values; ``None`` where a question has none.  A column without any
            value is left out.
        clusters, samples, seed, level: as in :func:`cluster_bootstrap`, which gives the same
            interval for a column without ``None``.

    Raises:
        ValueError: a column's length differs from the clusters', or as :func:`cluster_bootstrap`.
    """
    if samples < 1 or not 0.0 < level < 1.0:
        raise ValueError(
            f"samples, level: got {samples}, {level}, expected at least 1 and a number in (0, 1)"
        )
    codes, size = _codes(clusters)
    names, sums, counts, means = [], [], [], []
    for name, column in columns.items():
        if len(column) != len(clusters):
            raise ValueError(
                f"{name}: got {len(column)} values, expected one for each of {len(clusters)} "
                "clusters"
            )
        data = np.array([np.nan if value is None else value for value in column], dtype=np.float64)
        there = ~np.isnan(data)
        if not np.isfinite(data[there]).all():
            raise ValueError(f"{name}: got a value that is not finite")
        if there.any():
            names.append(name)
            sums.append(np.bincount(codes[there], weights=data[there], minlength=size))
            counts.append(np.bincount(codes[there], minlength=size).astype(np.float64))
            means.append(float(data[there].mean()))
    if not names:
        return {}
    top, bottom = np.stack(sums), np.stack(counts)  # [M, clusters]
    generator = np.random.default_rng(seed)
    resampled = np.full((len(names), samples), np.nan)
    step = max(1, _BLOCK // size)
    for start in range(0, samples, step):
        stop = min(samples, start + step)
        drawn = generator.integers(size, size=(stop - start, size))
        # How often each resample drew each cluster: [samples, clusters].
        offsets = np.arange(stop - start)[:, None] * size
        times = (
            np.bincount((drawn + offsets).ravel(), minlength=(stop - start) * size)
            .reshape(-1, size)
            .astype(float)
        )
        weights = bottom @ times.T
        np.divide(top @ times.T, weights, out=resampled[:, start:stop], where=weights > 0)
    quantiles = np.nanquantile(resampled, [(1.0 - level) / 2.0, (1.0 + level) / 2.0], axis=1)
    return {
        name: Interval(mean, float(low), float(high), level, int((row > 0).sum()))
        for name, mean, low, high, row in zip(names, means, *quantiles, counts, strict=True)
    }


def question_clusters(
    golds: Sequence[Iterable[Hashable]], ids: Sequence[Hashable]
) -> list[Hashable]:
    """The cluster of each question: questions that share a gold document, also by way of others,
    belong together.

    Args:
        golds: each question's gold documents; a question without any is a cluster of its own.
        ids: the questions' ids, which name the clusters (by their first question).
    """
    parent: dict[Hashable, Hashable] = {}

    def root(node: Hashable) -> Hashable:
        while parent.setdefault(node, node) != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for number, gold in enumerate(golds):
        for name in gold:
            parent[root(("document", name))] = root(number)
    first: dict[Hashable, Hashable] = {}
    return [first.setdefault(root(number), ids[number]) for number in range(len(golds))]


def _codes(clusters: Sequence[Hashable]) -> tuple[NDArray[np.int64], int]:
    numbers: dict[Hashable, int] = {}
    codes = np.array([numbers.setdefault(name, len(numbers)) for name in clusters], dtype=np.int64)
    return codes, len(numbers)


def _averaged(values: ArrayLike, name: str) -> NDArray[np.float64]:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim == 2 and data.shape[0] > 0:
        data = data.mean(axis=0)
    if data.ndim != 1 or data.size == 0:
        raise ValueError(
            f"{name}: got shape {data.shape}, expected [n] or [seeds, n] with n at least 1"
        )
    if not np.isfinite(data).all():
        raise ValueError(f"{name}: got a value that is not finite")
    return data
