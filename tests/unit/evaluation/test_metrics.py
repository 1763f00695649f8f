"""Metrics of one question, against numbers worked by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invar_ray.evaluation.metrics import (
    answer_recall_at_k,
    exact_match,
    f1,
    first_ranks,
    gold_rank,
    ndcg_at_k,
    recall_at_k,
    reciprocal_rank,
)

RANKED = ["a", "b", "c", "d"]


def test_recall_is_one_if_any_gold_is_found() -> None:
    assert recall_at_k(RANKED, ["c"], 2) == 0.0
    assert recall_at_k(RANKED, ["c"], 3) == 1.0
    assert recall_at_k(RANKED, ["a", "z"], 1) == 1.0  # not 1/2: one passage that answers is enough
    assert recall_at_k([], ["a"], 5) == 0.0


def test_reciprocal_rank() -> None:
    assert reciprocal_rank(RANKED, {"c"}) == pytest.approx(1 / 3)
    assert reciprocal_rank(RANKED, {"c", "b"}) == 1 / 2
    assert reciprocal_rank(RANKED, {"c"}, k=2) == 0.0
    ten = [str(number) for number in range(20)]
    assert reciprocal_rank(ten, ["9"]) == 1 / 10
    assert reciprocal_rank(ten, ["10"]) == 0.0


def test_ndcg() -> None:
    # Gold at ranks 2 and 4 of 2: (1/log2 3 + 1/log2 5) / (1/log2 2 + 1/log2 3).
    expected = (1 / math.log2(3) + 1 / math.log2(5)) / (1 + 1 / math.log2(3))
    assert ndcg_at_k(RANKED, ["b", "d"], 10) == pytest.approx(expected)
    assert ndcg_at_k(RANKED, ["a"], 10) == 1.0
    assert ndcg_at_k(RANKED, ["d"], 3) == 0.0
    # The ideal list is cut at k too: two golds on top of k = 2, three golds in all.
    assert ndcg_at_k(RANKED, ["a", "b", "d"], 2) == pytest.approx(1.0)
    assert ndcg_at_k(["a", "a", "b"], ["a"], 3) == pytest.approx(1.0)  # a repeat gains nothing


def test_ranks() -> None:
    assert gold_rank(RANKED, ["d", "b"]) == 2
    assert gold_rank(RANKED, ["z"]) is None
    assert first_ranks(["d1", "d2", "d1", "d3", "d2"]) == ["d1", "d2", "d3"]


def test_answer_recall() -> None:
    texts = ["Rome is old.", "The party went on.", "Paris, by the Seine."]
    assert answer_recall_at_k(texts, ["paris"], 2) == 0.0
    assert answer_recall_at_k(texts, ["paris"], 3) == 1.0
    assert answer_recall_at_k(texts, ["art"], 3) == 0.0


@pytest.mark.parametrize(
    ("text", "answers", "exact", "overlap"),
    [
        ("The Paris!", ["paris"], 1.0, 1.0),
        ("Paris in France", ["Paris, France"], 0.0, 0.8),  # 2 of 3 and 2 of 2: 2 * 2 / 5
        ("Rome", ["Paris", "rome."], 1.0, 1.0),
        ("new york new york", ["new york"], 0.0, 2 * 2 / 6),  # repeats count
        ("", ["Paris"], 0.0, 0.0),
        ("the", ["a"], 1.0, 1.0),  # nothing is left of either
        ("Berlin", ["Paris"], 0.0, 0.0),
    ],
)
def test_exact_match_and_f1(text: str, answers: list[str], exact: float, overlap: float) -> None:
    assert exact_match(text, answers) == exact
    assert f1(text, answers) == pytest.approx(overlap)


@pytest.mark.parametrize(
    "call",
    [
        lambda: recall_at_k(RANKED, [], 5),
        lambda: recall_at_k(RANKED, ["a"], 0),
        lambda: reciprocal_rank(RANKED, []),
        lambda: ndcg_at_k(RANKED, [], 5),
        lambda: exact_match("x", []),
        lambda: f1("x", []),
        lambda: answer_recall_at_k(["x"], [], 1),
    ],
)
def test_nothing_to_compare_with_is_refused(call: Callable[[], float]) -> None:
    with pytest.raises(ValueError, match="expected at least"):
        call()


ids = st.lists(st.sampled_from("abcdefgh"), max_size=8, unique=True)


@given(ranked=ids, gold=st.sets(st.sampled_from("abcdefgh"), min_size=1), k=st.integers(1, 9))
@settings(deadline=None)
def test_bounds_and_order(ranked: list[str], gold: set[str], k: int) -> None:
    recall = recall_at_k(ranked, gold, k)
    for value in (reciprocal_rank(ranked, gold, k), ndcg_at_k(ranked, gold, k)):
        assert 0.0 <= value <= 1.0 + 1e-12
        assert (value > 0) == (recall > 0)
    assert recall <= recall_at_k(ranked, gold, k + 1)


words = st.lists(st.sampled_from(["red", "blue", "The", "12", "x-y"]), max_size=5).map(" ".join)


@given(left=words, right=words)
@settings(deadline=None)
def test_f1_is_symmetric_and_one_on_an_exact_match(left: str, right: str) -> None:
    assert f1(left, [right]) == f1(right, [left])
    if exact_match(left, [right]):
        assert f1(left, [right]) == 1.0


def test_f1_and_answer_recall_count_characters_where_no_spaces_are_written() -> None:
    assert f1("北京", ["北京市"]) == pytest.approx(2 * 2 / (2 + 3))
    assert f1("東京タワー", ["東京タワー。"]) == 1.0
    assert answer_recall_at_k(["守塔人住在北京市。"], ["北京"], 1) == 1.0
    assert f1("cafe\u0301 noir", ["café noir"]) == 1.0
    assert exact_match("cafe\u0301", ["café"]) == 0.0  # as SQuAD's script has it
