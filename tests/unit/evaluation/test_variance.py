"""Variance over families of environments."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invar_ray.evaluation.variance import (
    Family,
    between_question_overlap,
    flip_rate,
    overlap_at_k,
    rbo,
    summarise_families,
    worst_wording_loss,
)

ids = st.lists(st.sampled_from("abcdefghij"), max_size=10, unique=True)


def test_overlap_is_jaccard_of_the_top_k() -> None:
    assert overlap_at_k(list("abcde"), list("abcdx"), 5) == pytest.approx(4 / 6)
    assert overlap_at_k(list("abcde"), list("edcba"), 5) == 1.0
    assert overlap_at_k(list("abc"), list("cab"), 2) == pytest.approx(1 / 3)  # {a, b} and {c, a}
    assert overlap_at_k([], [], 5) == 1.0
    assert overlap_at_k(["a"], [], 5) == 0.0
    with pytest.raises(ValueError, match="k: got 0"):
        overlap_at_k([], [], 0)


def test_rbo_of_equally_long_lists() -> None:
    # (x, y, z) and (x, z, y), p 1/2: X = 1, 1, 3, agreements 1, 1/2, 1.
    # 1 * (1/2 + 1/2 * 1/4 + 1 * 1/8) + 1 * 1/8 = 0.875.
    assert rbo(list("xyz"), list("xzy"), 0.5) == pytest.approx(0.875)
    # (x, y) and (z, y): X = 0, 1: 1/2 * 1/4 + 1/2 * 1/4 = 0.25.
    assert rbo(list("xy"), list("zy"), 0.5) == pytest.approx(0.25)


def test_rbo_of_unequal_lists() -> None:
    # S = (y), L = (x, y), p 1/2: s = 1, l = 2, X_1 = 0, X_2 = 1.
    # Sums: 1/2 * 1/4 = 0.125 and nothing, as X_s = 0; tail ((1 - 0) / 2 + 0) / 4 = 0.125.
    assert rbo(list("y"), list("xy"), 0.5) == pytest.approx(0.25)
    # A prefix agrees as far as can be seen: S = (x), L = (x, y): X = 1, 1.
    # 1/2 + 1/2 * 1/4, + 1 * 1 / (1 * 2) * 1/4, tail (0 + 1) / 4: 0.625 + 0.125 + 0.25 = 1.
    assert rbo(list("x"), list("xy"), 0.5) == pytest.approx(1.0)


def test_rbo_at_its_ends() -> None:
    assert rbo(list("abc"), list("abc")) == pytest.approx(1.0)
    assert rbo(list("abc"), list("def")) == 0.0
    assert rbo([], []) == 1.0
    assert rbo([], ["a"]) == 0.0
    assert rbo(["a", "a", "b"], ["a", "b"]) == pytest.approx(1.0)  # repeats count once
    with pytest.raises(ValueError, match="p: got 1"):
        rbo(["a"], ["a"], 1.0)


@given(a=ids, b=ids, p=st.floats(0.05, 0.98))
@settings(deadline=None)
def test_rbo_is_symmetric_bounded_and_names_do_not_matter(
    a: list[str], b: list[str], p: float
) -> None:
    value = rbo(a, b, p)
    assert -1e-12 <= value <= 1.0
    assert value == pytest.approx(rbo(b, a, p))
    assert value == pytest.approx(rbo([x.upper() for x in a], [x.upper() for x in b], p))
    assert rbo(a, a, p) == pytest.approx(1.0)
    if a and b and not set(a) & set(b):
        assert value == 0.0


@given(order=st.permutations(list("abcdef")), p=st.floats(0.1, 0.95))
@settings(deadline=None)
def test_rbo_is_the_extrapolated_sum_on_permutations(order: list[str], p: float) -> None:
    agreements = [len(set("abcdef"[:d]) & set(order[:d])) / d for d in range(1, 7)]
    expected = (1 - p) / p * sum(x * p**d for d, x in enumerate(agreements, start=1)) + agreements[
        -1
    ] * p**6
    assert rbo(list("abcdef"), order, p) == pytest.approx(expected)


def test_families_worked_by_hand() -> None:
    families = [
        # gold g at ranks 1, 2, missing (depth 3: rank 4)
        Family(ranked=[list("gab"), list("agb"), list("abc")], gold=["g"]),
        # gold h at rank 2 in both; the same lists
        Family(ranked=[list("xhy"), list("xhy")], gold=["h"]),
        # no rewrite: counts for the anchor's recall only
        Family(ranked=[list("pqr")], gold=["z"]),
    ]
    found = summarise_families(families, overlap_k=2, ks=(1, 2), rbo_p=0.5)
    assert found["num_families"] == 3
    assert found["recall_at_1"] == pytest.approx(1 / 3)
    assert found["recall_at_2"] == pytest.approx(2 / 3)
    # Family 0, overlap@2 with {g, a}: {a, g} 1, {a, b} 1/3 -> 2/3; family 1: 1.
    assert found["overlap_at_2"] == pytest.approx((2 / 3 + 1) / 2)
    # Family 0 recall@2 is 1, 1, 0; family 1 is 1, 1.
    assert found["worst_recall_at_2"] == pytest.approx(1 / 2)
    assert found["reworded_recall_at_2"] == pytest.approx((1 / 2 + 1) / 2)
    # Population deviation of 1, 1, 0: mean 2/3, sqrt((1/9 + 1/9 + 4/9) / 3) = sqrt(2)/3.
    assert found["recall_at_2_std"] == pytest.approx(math.sqrt(2) / 3 / 2)
    # Ranks 1, 2, 4: mean 7/3, squares 16/9, 1/9, 25/9 -> sqrt(14)/3.
    assert found["gold_rank_std"] == pytest.approx(math.sqrt(14) / 3 / 2)
    # rbo of (g,a,b) and (a,g,b), p 1/2: X 0, 2, 3 -> 1/4 + 1/8 + 1/8 = 0.5; of (g,a,b) and (a,b,c):
    # X 0, 1, 2 -> 1/2 * 1/4 + 2/3 * 1/8 + 2/3 * 1/8 = 7/24.
    assert found["rbo"] == pytest.approx(((1 / 2 + 7 / 24) / 2 + 1) / 2)
    # Of the first two: (g,a) and (a,g): X 0, 2 -> 1/4 + 1/4 = 1/2; (g,a) and (a,b): X 0, 1 ->
    # 1/2 * 1/4 + 1/2 * 1/4 = 1/4.
    assert found["rbo_at_2"] == pytest.approx(((1 / 2 + 1 / 4) / 2 + 1) / 2)
    assert "overlap_at_10" not in found
    # Anchors share nothing.
    assert found["overlap_between_questions_at_2"] == 0.0
    deeper = summarise_families(families, ks=(1,), depth=100)
    # Ranks 1, 2, 101.
    assert deeper["gold_rank_std"] == pytest.approx(
        math.sqrt(((104 / 3 - 1) ** 2 + (104 / 3 - 2) ** 2 + (104 / 3 - 101) ** 2) / 3) / 2
    )


def test_a_collapsed_encoder_shows_in_the_overlap_between_questions() -> None:
    same = list("abcde")
    families = [Family(ranked=[same, same], gold=[gold]) for gold in "axyz"]
    found = summarise_families(families, overlap_k=5, ks=(5,))
    assert found["overlap_at_5"] == 1.0
    assert found["recall_at_5_std"] == 0.0
    assert found["overlap_between_questions_at_5"] == 1.0


def test_what_is_not_defined_is_left_out() -> None:
    found = summarise_families([Family(ranked=[["a"]], gold=["a"])], ks=(1,))
    assert found == {"num_families": 1.0, "recall_at_1": 1.0}


@pytest.mark.parametrize(
    "families", [[], [Family(ranked=[], gold=["a"])], [Family(ranked=[["a"]], gold=[])]]
)
def test_empty_families_are_refused(families: list[Family]) -> None:
    with pytest.raises(ValueError, match="expected at least one"):
        summarise_families(families)


def test_long_lists_have_an_overlap_of_their_first_ten() -> None:
    shared, other = [*"abcdefgh", "i", "j"], [*"abcdefgh", "y", "z"]
    found = summarise_families([Family([shared, other], ["a"])], overlap_k=5)
    assert found["overlap_at_5"] == 1.0
    assert found["overlap_at_10"] == pytest.approx(8 / 12)


def test_the_worst_wording_loses_a_share_of_what_was_found() -> None:
    # The anchors of the first three find 2 documents, every wording 1; the last has no rewrite.
    assert worst_wording_loss([1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, None]) == 0.5
    assert worst_wording_loss([0.0, None], [0.0, None]) is None


def test_flip_rate() -> None:
    # Family 0: 1 of 2 rewrites wrong; family 1: none; family 2's anchor is wrong and family 3 has
    # no rewrite.
    right = [[True, True, False], [True, True], [False, True], [True]]
    assert flip_rate(right) == pytest.approx(1 / 4)
    assert flip_rate([[False, False], [True]]) is None
    assert flip_rate([]) is None


def test_overlap_between_questions_leaves_out_pairs_that_share_a_gold() -> None:
    ranked = [["a", "b"], ["a", "b"], ["c", "d"]]
    assert between_question_overlap(ranked, 2) == pytest.approx(1 / 3)
    assert between_question_overlap(ranked, 2, groups=[["g"], ["g"], ["h"]]) == 0.0
    assert between_question_overlap(ranked[:1], 2) is None
    assert between_question_overlap(ranked[:2], 2, groups=[["g"], ["g"]]) is None


def test_overlap_between_many_questions_is_sampled_with_a_seed() -> None:
    ranked = [["a" if number % 2 else "b"] for number in range(200)]  # half of all pairs agree
    first = between_question_overlap(ranked, 1, pairs=3000, seed=1)
    assert first == between_question_overlap(ranked, 1, pairs=3000, seed=1)
    assert first != between_question_overlap(ranked, 1, pairs=3000, seed=2)
    assert first == pytest.approx(0.497, abs=0.05)
