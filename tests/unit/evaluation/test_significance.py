"""Cluster bootstrap intervals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invar_ray.evaluation.significance import Interval, cluster_bootstrap, paired_cluster_bootstrap


def width(interval: Interval) -> float:
    return interval.high - interval.low


def test_against_all_resamples_of_three_clusters() -> None:
    # Clusters A: 0, 0 and 3; B: 1; C: 4.  All 27 equally likely resamples, by hand in code:
    # quantiles of their means.
    groups = {"A": [0.0, 0.0, 3.0], "B": [1.0], "C": [4.0]}
    exact = [
        np.mean([x for name in draw for x in groups[name]])
        for draw in itertools.product("ABC", repeat=3)
    ]
    values = [0.0, 1.0, 0.0, 4.0, 3.0]
    found = cluster_bootstrap(values, ["A", "B", "A", "C", "A"], samples=40_000, seed=0, level=0.5)
    assert found.mean == pytest.approx(8 / 5)
    assert found.clusters == 3
    low, high = np.quantile(exact, [0.25, 0.75], method="inverted_cdf")
    assert found.low == pytest.approx(low, abs=1e-9)
    assert found.high == pytest.approx(high, abs=1e-9)


def test_copies_within_a_cluster_add_no_certainty() -> None:
    values = np.random.default_rng(0).random(60)
    plain = cluster_bootstrap(values, range(60), seed=3)
    tenfold = cluster_bootstrap(
        np.repeat(values, 10), np.repeat(np.arange(60), 10).tolist(), seed=3
    )
    assert (tenfold.mean, tenfold.low, tenfold.high) == pytest.approx(
        (plain.mean, plain.low, plain.high)
    )
    naive = cluster_bootstrap(np.repeat(values, 10), range(600), seed=3)
    assert width(naive) == pytest.approx(width(plain) / np.sqrt(10), rel=0.15)


def test_width_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(1).normal(size=400)
    found = cluster_bootstrap(values, range(400), samples=4000, seed=0)
    assert width(found) == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.08)
    assert found.low < values.mean() < found.high


def test_coverage() -> None:
    # 200 data sets of 40 clusters x 3 values with a shared part; the true mean 0 should be inside
    # about 95 % of the time (percentile intervals are a little narrow at 40), and much less often
    # if clusters are ignored.
    generator = np.random.default_rng(2)
    inside = naive = 0
    clusters = np.repeat(np.arange(40), 3).tolist()
    for seed in range(200):
        values = np.repeat(generator.normal(size=40), 3) + 0.2 * generator.normal(size=120)
        found = cluster_bootstrap(values, clusters, samples=300, seed=seed)
        inside += not found.excludes_zero
        naive += not cluster_bootstrap(values, range(120), samples=300, seed=seed).excludes_zero
    assert 0.89 <= inside / 200 <= 0.99
    assert naive / 200 < 0.85


def test_a_constant_difference_is_certain() -> None:
    second = np.random.default_rng(3).random(50)
    found = paired_cluster_bootstrap(second + 0.25, second, range(50))
    assert (found.mean, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25))
    assert found.excludes_zero
    same = paired_cluster_bootstrap(second, second, range(50))
    assert (same.mean, same.low, same.high) == (0.0, 0.0, 0.0)
    assert not same.excludes_zero


def test_seeds_are_averaged_first() -> None:
    values = np.random.default_rng(4).random((3, 30))
    assert cluster_bootstrap(values, range(30)) == cluster_bootstrap(values.mean(axis=0), range(30))
    assert paired_cluster_bootstrap(values, values[:2], range(30)).mean == pytest.approx(
        values.mean() - values[:2].mean()
    )


@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=30), seed=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_seeded_and_within_the_range_of_values(values: list[float], seed: int) -> None:
    clusters = [index % 7 for index in range(len(values))]
    found = cluster_bootstrap(values, clusters, samples=100, seed=seed)
    assert found == cluster_bootstrap(values, clusters, samples=100, seed=seed)
    assert min(values) - 1e-12 <= found.low <= found.high <= max(values) + 1e-12


def test_blocks_of_draws_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(5).random(50)
    whole = cluster_bootstrap(values, range(50), samples=200)
    monkeypatch.setattr("invar_ray.evaluation.significance._BLOCK", 1000)
    assert cluster_bootstrap(values, range(50), samples=200) == whole


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="clusters"):
        cluster_bootstrap([1.0, 2.0], ["a"])
    with pytest.raises(ValueError, match="values"):
        cluster_bootstrap([], [])
    with pytest.raises(ValueError, match="finite"):
        cluster_bootstrap([float("nan")], ["a"])
    with pytest.raises(ValueError, match="samples"):
        cluster_bootstrap([1.0], ["a"], samples=0)
    with pytest.raises(ValueError, match="second"):
        paired_cluster_bootstrap([1.0, 2.0], [1.0], ["a", "b"])
