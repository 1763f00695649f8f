"""Alignment with the teacher."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import kl_div, normalize

from invar_ray.losses.alignment import alignment_loss, blend_teacher_scores, mean_document_vectors


def problem(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cosines = torch.rand(4, 6, generator=generator, dtype=torch.float64) * 2 - 1
    teacher = torch.rand(4, 6, generator=generator, dtype=torch.float64) * 2 - 1
    allowed = torch.rand(4, 6, generator=generator) > 0.3
    allowed[:, 0] = True
    return cosines, teacher, allowed


def test_hand_worked() -> None:
    # tau 0.5, tau_M 0.25.  Teacher (3/4, 1/4), retriever (1/2, 1/2):
    # KL = 3/4 log(3/2) + 1/4 log(1/2).
    cosines = torch.tensor([[0.2, 0.2]])
    teacher = 0.25 * torch.tensor([[math.log(3), 0.0]])
    output = alignment_loss(
        cosines,
        teacher,
        torch.ones(1, 2, dtype=torch.bool),
        temperature=0.5,
        teacher_temperature=0.25,
    )
    torch.testing.assert_close(
        output.loss, torch.tensor(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    )


def test_equals_kl_div() -> None:
    cosines, teacher, _ = problem(0)
    output = alignment_loss(
        cosines,
        teacher,
        torch.ones(4, 6, dtype=torch.bool),
        temperature=0.05,
        teacher_temperature=0.1,
    )
    expected = kl_div(
        (cosines / 0.05).log_softmax(-1), (teacher / 0.1).softmax(-1), reduction="batchmean"
    )
    torch.testing.assert_close(output.loss, expected)


def test_masked_slots_are_as_if_absent() -> None:
    cosines, teacher, _ = problem(1)
    allowed = torch.tensor([True, True, False, True, False, True]).expand(4, 6)
    masked = alignment_loss(cosines, teacher, allowed, temperature=0.2, teacher_temperature=0.1)
    kept = allowed[0]
    alone = alignment_loss(
        cosines[:, kept],
        teacher[:, kept],
        allowed[:, kept],
        temperature=0.2,
        teacher_temperature=0.1,
    )
    torch.testing.assert_close(masked.loss, alone.loss)
    torch.testing.assert_close(masked.agreement, alone.agreement)


def test_agreement_counts_rows_with_the_same_best_slot() -> None:
    cosines = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.1, 0.9]])
    teacher = torch.tensor([[0.5, 0.4], [0.4, 0.5], [0.5, 0.4], [0.1, 0.2]])
    output = alignment_loss(
        cosines,
        teacher,
        torch.ones(4, 2, dtype=torch.bool),
        temperature=0.1,
        teacher_temperature=0.1,
        weights=torch.tensor([1.0, 1.0, 1.0, 0.0]),
    )
    torch.testing.assert_close(output.agreement, torch.tensor(1 / 3))


def test_gradients() -> None:
    cosines, teacher, allowed = problem(2)
    teacher.requires_grad_()
    weights = torch.tensor([1.0, 2.0, 0.0, 0.5])

    def loss(x: Tensor) -> Tensor:
        return alignment_loss(
            x,
            teacher,
            allowed,
            temperature=0.3,
            teacher_temperature=0.2,
            weights=weights,
            normaliser=2.5,
        ).loss

    assert torch.autograd.gradcheck(loss, cosines.requires_grad_())
    loss(cosines).backward()
    assert teacher.grad is None


def test_padding_may_hold_anything() -> None:
    cosines, teacher, allowed = problem(3)
    cosines[2], teacher[2] = math.nan, math.nan
    allowed[1] = False  # nothing to align on: 0, not NaN
    cosines.requires_grad_()
    output = alignment_loss(
        cosines,
        teacher,
        allowed,
        temperature=0.1,
        teacher_temperature=0.1,
        weights=torch.tensor([1.0, 1.0, 0.0, 1.0]),
    )
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert cosines.grad is not None
    assert torch.isfinite(cosines.grad).all()
    assert (cosines.grad[1:3] == 0).all()


@given(seed=st.integers(0, 10_000), shift=st.floats(-3, 3))
@settings(max_examples=40, deadline=None)
def test_order_of_candidates_and_constants_do_not_matter(seed: int, shift: float) -> None:
    cosines, teacher, allowed = problem(seed)
    before = alignment_loss(cosines, teacher, allowed, temperature=0.2, teacher_temperature=0.1)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    after = alignment_loss(
        cosines[:, order] + shift,
        teacher[:, order] - shift,
        allowed[:, order],
        temperature=0.2,
        teacher_temperature=0.1,
    )
    torch.testing.assert_close(before.loss, after.loss)
    assert before.loss >= 0
    same = alignment_loss(cosines, cosines, allowed, temperature=0.2, teacher_temperature=0.2)
    assert same.loss == 0


def test_half_precision_is_computed_in_float32() -> None:
    cosines, teacher, allowed = problem(5)
    low = alignment_loss(
        cosines.bfloat16(), teacher, allowed, temperature=0.1, teacher_temperature=0.1
    )
    full = alignment_loss(
        cosines.bfloat16().float(), teacher, allowed, temperature=0.1, teacher_temperature=0.1
    )
    assert low.loss.dtype == torch.float32
    assert low.loss == full.loss


def test_teacher_scores_blend_the_two_views() -> None:
    # q = (1, 0), passage = (0.6, 0.8), document = (0.8, 0.6): 0.75 * 0.6 + 0.25 * 0.8 = 0.65.
    query, passage, document = (torch.tensor([row]) for row in ([1.0, 0.0], [0.6, 0.8], [0.8, 0.6]))
    scores = blend_teacher_scores(query, passage, document, document_weight=0.25)
    torch.testing.assert_close(scores, torch.tensor([[0.65]]))
    alone = blend_teacher_scores(query, passage, passage, document_weight=0.25)
    torch.testing.assert_close(alone, torch.tensor([[0.6]]))
    with pytest.raises(ValueError, match="document_weight"):
        blend_teacher_scores(query, passage, document, document_weight=1.5)


def test_document_vectors_are_normalised_means() -> None:
    windows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    vectors = mean_document_vectors(windows, torch.tensor([2, 2, 0]), 3)
    half = 0.5**0.5
    torch.testing.assert_close(vectors, torch.tensor([[0.6, 0.8], [0.0, 0.0], [half, half]]))
    random = normalize(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    expected = normalize(random.mean(0, keepdim=True), dim=-1)
    torch.testing.assert_close(
        mean_document_vectors(random, torch.zeros(5, dtype=torch.long), 1), expected
    )


def test_wrong_arguments_are_named() -> None:
    good = torch.zeros(2, 3)
    allowed = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="teacher_scores"):
        alignment_loss(good, good[:1], allowed, temperature=0.1, teacher_temperature=0.1)
    with pytest.raises(ValueError, match="teacher_temperature"):
        alignment_loss(good, good, allowed, temperature=0.1, teacher_temperature=0.0)
    with pytest.raises(ValueError, match="anchor_cosines"):
        alignment_loss(good[None], good, allowed, temperature=0.1, teacher_temperature=0.1)
