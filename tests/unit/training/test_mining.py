"""Hard negatives: hand-worked lists, and every rule on its own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from invar_ray.schema import Passage
from invar_ray.training.mining import MiningReport, select_negatives, union_by_best_rank


def passage(
    row: int, document: str = "", text: str = "", span: tuple[int, int] = (0, 10), title: str = ""
) -> Passage:
    return Passage(
        f"p{row}", document or f"d{row}", title, text or f"text number {row} of its own", *span
    )


def select(
    passages: list[Passage],
    candidates: list[int],
    scores: list[float],
    *,
    positive: int = 0,
    own: float = 0.8,
    count: int = 10,
    margin: float = 0.05,
    answers: tuple[str, ...] = ("Paris",),
) -> tuple[list[int], MiningReport]:
    report = MiningReport()
    found = select_negatives(
        candidates,
        dict(enumerate(passages)),
        positive,
        answers,
        np.asarray([*scores, own], dtype=np.float32),
        count=count,
        margin=margin,
        report=report,
    )
    return found, report


@pytest.mark.parametrize(
    "lists, expected",
    [
        ([], []),
        ([[]], []),
        ([[3, 1, 2]], [3, 1, 2]),
        # Rows 3 and 5 are first somewhere, 1 second, 2 and 7 third; ties by the order of the lists.
        ([[3, 1, 2], [5, 3, 7]], [3, 5, 1, 2, 7]),
        ([[5, 3, 7], [3, 1, 2]], [5, 3, 1, 7, 2]),
        # 9 is last in the first list and first in the second: the best rank counts.
        ([[1, 2, 3, 9], [9, 4]], [1, 9, 2, 4, 3]),
        ([[1, 2], [1, 2], [1, 2]], [1, 2]),
        ([[1], [2, 3, 4]], [1, 2, 3, 4]),
    ],
)
def test_union_is_by_best_rank(lists: list[list[int]], expected: list[int]) -> None:
    assert union_by_best_rank(lists) == expected


@pytest.mark.parametrize(
    "first, expected", [(1, [3, 5, 1, 2, 7]), (2, [1, 2, 7]), (3, [2, 7]), (4, [])]
)
def test_what_ranks_above_the_first_rank_anywhere_is_left_out(
    first: int, expected: list[int]
) -> None:
    # 3 is first in one list, second in the other
    assert union_by_best_rank([[3, 1, 2], [5, 3, 7]], first) == expected


@given(st.lists(st.lists(st.integers(0, 20), max_size=8, unique=True), max_size=4))
def test_union_has_every_row_once_with_falling_rank(lists: list[list[int]]) -> None:
    union = union_by_best_rank(lists)
    assert sorted(union) == sorted({row for ranked in lists for row in ranked})
    best = [min(ranked.index(row) for ranked in lists if row in ranked) for row in union]
    assert best == sorted(best)


def test_first_candidates_are_taken_in_their_order() -> None:
    passages = [passage(row) for row in range(6)]
    found, report = select(passages, [4, 2, 5, 1], [0.1, 0.2, 0.3, 0.4], count=3)
    assert found == [4, 2, 5]
    assert (report.kept, sum(report.dropped.values())) == (3, 0)


def test_positive_and_its_copies_are_dropped() -> None:
    passages = [passage(0, text="the same words"), passage(1, text="the same words"), passage(2)]
    found, report = select(passages, [0, 1, 2], [0.1, 0.1, 0.1])
    assert found == [2]
    assert dict(report.dropped) == {"copy of the positive": 2}


def test_overlapping_spans_of_the_document_are_dropped_but_not_its_neighbours() -> None:
    passages = [
        passage(0, "d", span=(100, 200)),
        passage(1, "d", span=(0, 101)),  # shares one character
        passage(2, "d", span=(199, 300)),
        passage(3, "d", span=(120, 130)),
        passage(4, "d", span=(0, 100)),  # ends where the positive starts: a neighbour
        passage(5, "d", span=(200, 300)),
        passage(6, "other", span=(100, 200)),
    ]
    found, report = select(passages, [1, 2, 3, 4, 5, 6], [0.1] * 6)
    assert found == [4, 5, 6]
    assert dict(report.dropped) == {"overlaps the positive": 3}


def test_passages_that_hold_an_answer_are_dropped() -> None:
    passages = [
        passage(0),
        passage(1, text="They met in PARIS, in spring."),
        passage(2, text="A parish by the sea."),  # a longer word is no answer
        passage(3, text="The city of light.", title="Paris"),
        passage(4, text="A town called Lutetia."),
    ]
    found, report = select(passages, [1, 2, 3, 4], [0.1] * 4, answers=("Paris", "lutetia"))
    assert found == [2]
    assert dict(report.dropped) == {"holds a gold answer": 3}


def test_an_answer_in_a_script_without_spaces_is_one() -> None:
    passages = [
        passage(0),
        passage(
            1, text="\u4ed6\u51fa\u751f\u4e8e\u5317\u4eac\u5e02\u3002"
        ),  # he was born in Peking
        passage(2, text="\u4ed6\u51fa\u751f\u4e8e\u4e0a\u6d77\u5e02\u3002"),  # in Shanghai
    ]
    found, report = select(passages, [1, 2], [0.1, 0.1], answers=("\u5317\u4eac",))
    assert found == [2]
    assert dict(report.dropped) == {"holds a gold answer": 1}


def test_teacher_scores_near_the_positive_s_are_dropped() -> None:
    passages = [passage(row) for row in range(5)]
    # The limit is 0.8 - 0.05 * 0.8 = 0.76.
    found, report = select(passages, [1, 2, 3, 4], [0.9, 0.761, 0.759, 0.2])
    assert found == [3, 4]
    assert dict(report.dropped) == {"teacher score too high": 2}


def test_margin_is_relative_to_the_size_of_a_negative_score() -> None:
    passages = [passage(row) for row in range(4)]
    # The limit is -0.4 - 0.5 * 0.4 = -0.6: below the positive's score, not above.
    found, _ = select(passages, [1, 2, 3], [-0.5, -0.59, -0.61], own=-0.4, margin=0.5)
    assert found == [3]


def test_margin_of_zero_drops_equal_scores_only() -> None:
    passages = [passage(row) for row in range(4)]
    found, _ = select(passages, [1, 2, 3], [0.5, 0.4999, 0.5001], own=0.5, margin=0.0)
    assert found == [2]


def test_each_dropped_candidate_counts_once_and_only_as_far_as_it_was_looked_at() -> None:
    passages = [
        passage(0, text="Paris"),
        passage(1, text="Paris"),
        passage(2, text="Paris again"),
        passage(3),
    ]
    found, report = select(passages, [1, 2, 3, 0], [0.9, 0.9, 0.1, 0.1], count=1)
    assert found == [3]
    assert dict(report.dropped) == {"copy of the positive": 1, "holds a gold answer": 1}
    assert report.kept == 1


def test_fewer_than_asked_for_where_there_are_no_more() -> None:
    passages = [passage(row) for row in range(3)]
    assert select(passages, [0, 1], [0.1, 0.1], count=5)[0] == [1]
    assert select(passages, [], [])[0] == []
    assert select(passages, [1, 2], [0.1, 0.1], count=0)[0] == []
