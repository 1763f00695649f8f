"""Which slots count for which row."""

from __future__ import annotations

import pytest
import torch

from invar_ray.losses.gather import gather_rows, mean_over_ranks
from invar_ray.losses.masks import Slots, contrastive_allowed, copies_allowed

# slot:                          0   1   2   3   4   5
SLOTS = Slots(
    document=torch.tensor([7, 7, 7, 7, 3, 9]),
    start=torch.tensor([0, 0, 50, 100, 0, 0]),
    end=torch.tensor([100, 100, 150, 200, 100, 80]),
    content=torch.tensor([1, 1, 2, 3, 1, 4]),
)
# 0 and 1 are the same span; 2 overlaps 0 and 3; 3 only touches 0; 4 is the text of 0 in another
# document; 5 is other.


def rows(mask: torch.Tensor) -> list[str]:
    return ["".join("x" if value else "." for value in row) for row in mask.tolist()]


def test_copies_of_the_positive_are_out_and_the_positive_is_in() -> None:
    assert rows(copies_allowed(SLOTS, torch.tensor([0, 3, 5]))) == ["x.xx.x", "xxxxxx", "xxxxxx"]
    without = SLOTS._replace(content=None)
    assert rows(copies_allowed(without, torch.tensor([0]))) == ["x.xxxx"]


def test_overlapping_spans_are_out_but_neighbours_stay() -> None:
    # Row of slot 0: 1 and 4 are copies, 2 overlaps, 3 begins where 0 ends and stays.
    # Row of slot 2: 0, 1 and 3 overlap.
    assert rows(contrastive_allowed(SLOTS, torch.tensor([0, 2, 5]))) == [
        "x..x.x",
        "..x.xx",
        "xxxxxx",
    ]


def test_slots_that_hold_an_answer_are_out() -> None:
    # the positive holds it too, of course
    holds = torch.tensor([[True, True, True, False, True, True]])
    assert rows(contrastive_allowed(SLOTS, torch.tensor([0]), holds_answer=holds)) == ["x..x.."]


def test_slots_that_the_teacher_likes_as_much_are_out() -> None:
    # Positive 5 with 0.8, margin 0.05: out from 0.8 - 0.04 = 0.76 on.
    scores = torch.tensor([[0.75, 0.77, 0.9, -0.2, 0.70, 0.8]])
    assert rows(contrastive_allowed(SLOTS, torch.tensor([5]), teacher_scores=scores)) == ["x..xxx"]
    # A negative score of the positive: -0.2 - 0.05 * 0.2 = -0.21; the margin still goes downwards.
    scores = torch.tensor([[-0.22, -0.205, 0.1, -0.9, -0.5, -0.2]])
    assert rows(contrastive_allowed(SLOTS, torch.tensor([5]), teacher_scores=scores)) == ["x..xxx"]


def test_padding_is_out_everywhere() -> None:
    padded = SLOTS._replace(present=torch.tensor([True, True, True, True, True, False]))
    # A padded row (-1) keeps all real slots: it weighs 0, and must not be empty.
    assert rows(copies_allowed(padded, torch.tensor([3, -1]))) == ["xxxxx.", "xxxxx."]
    assert rows(contrastive_allowed(padded, torch.tensor([3, -1]))) == ["xx.xx.", "xxxxx."]


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="content"):
        copies_allowed(SLOTS._replace(content=torch.tensor([1])), torch.tensor([0]))
    with pytest.raises(ValueError, match="holds_answer"):
        contrastive_allowed(
            SLOTS, torch.tensor([0]), holds_answer=torch.ones(1, 2, dtype=torch.bool)
        )
    with pytest.raises(ValueError, match="teacher_margin"):
        contrastive_allowed(SLOTS, torch.tensor([0]), teacher_margin=-0.1)


def test_without_ranks_gathering_does_nothing() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert gather_rows(x) is x
    assert torch.equal(mean_over_ranks(x), x)
