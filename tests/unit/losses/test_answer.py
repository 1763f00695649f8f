"""The answer loss."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from invar_ray.losses.answer import answer_loss


def test_hand_worked() -> None:
    # Position 0 predicts token 1 (label 0): p = 3/4.  Position 1 predicts token 2 (label 1): p =
    # 1/5.  Position 2 predicts nothing.  Loss = (log 4/3 + log 5) / 2; the first is the most likely
    # token, the second is not.
    logits = torch.tensor([[[math.log(3), 0.0], [math.log(4), 0.0], [50.0, -50.0]]])
    output = answer_loss(logits, torch.tensor([[-100, 0, 1]]))
    torch.testing.assert_close(output.loss, torch.tensor((math.log(4 / 3) + math.log(5)) / 2))
    assert output.tokens == 2
    assert output.accuracy == 0.5


def problem() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 9, generator=generator, dtype=torch.float64)
    labels = torch.randint(9, (3, 6), generator=generator)
    labels[:, :2] = -100
    labels[1, 3:] = -100
    return logits, labels


def test_equals_cross_entropy_of_shifted_labels_as_in_transformers() -> None:
    logits, labels = problem()
    expected = cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(answer_loss(logits, labels).loss, expected)


def test_normaliser_divides_the_sum() -> None:
    logits, labels = problem()
    plain = answer_loss(logits, labels)
    torch.testing.assert_close(
        answer_loss(logits, labels, normaliser=5).loss, plain.loss * plain.tokens / 5
    )
    # Two halves with the global number of tokens / 2 average to the whole.
    halves = [
        answer_loss(logits[part], labels[part], normaliser=plain.tokens / 2).loss
        for part in ([0], [1, 2])
    ]
    torch.testing.assert_close(sum(halves) / 2, plain.loss)


def test_gradient() -> None:
    logits, labels = problem()
    assert torch.autograd.gradcheck(lambda x: answer_loss(x, labels).loss, logits.requires_grad_())


def test_no_answer_tokens_give_zero_with_a_gradient() -> None:
    logits, labels = problem()
    logits.requires_grad_()
    output = answer_loss(logits, torch.full_like(labels, -100))
    output.loss.backward()
    assert output.loss == 0
    assert output.tokens == 0
    assert output.accuracy == 0
    assert (logits.grad == 0).all()


def test_half_precision_is_computed_in_float32() -> None:
    logits, labels = problem()
    low = answer_loss(logits.bfloat16(), labels)
    assert low.loss.dtype == torch.float32
    torch.testing.assert_close(low.loss, answer_loss(logits.bfloat16().float(), labels).loss)


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match="labels"):
        answer_loss(torch.zeros(2, 3, 4), torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="logits"):
        answer_loss(torch.zeros(3, 4), torch.zeros(2, 2, dtype=torch.long))
