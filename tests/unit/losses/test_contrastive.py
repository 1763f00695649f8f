"""The contrastive loss, its environments and the risk variance over them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from invar_ray.losses.contrastive import contrastive_loss
from invar_ray.losses.risk import environment_risks, risk_variance

EVERYTHING = torch.ones(1, 3, dtype=torch.bool)


def logs(*numbers: float) -> list[float]:
    return [math.log(number) for number in numbers]


def problem(
    seed: int, rows: int = 4, environments: int = 3, slots: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cosines = (
        torch.rand(rows, environments, slots, generator=generator, dtype=torch.float64) * 2 - 1
    )
    positive = torch.randint(slots, (rows,), generator=generator)
    allowed = torch.rand(rows, slots, generator=generator) > 0.3
    return cosines, positive, allowed


def test_hand_worked() -> None:
    # tau 0.5; scores are 0.5 log n, so exp(score / tau) = n.  Positive is slot 1.
    # e0: weights 1, 2, 3 -> p(+) = 2/6 -> log 3.   e1: weights 1, 6, 1 -> p(+) = 6/8 -> log 4/3.
    cosines = 0.5 * torch.tensor([[logs(1, 2, 3), logs(1, 6, 1)]])
    output = contrastive_loss(cosines, torch.tensor([1]), EVERYTHING, temperature=0.5)
    torch.testing.assert_close(output.per_environment, torch.tensor([math.log(3), math.log(4 / 3)]))
    # = log 2
    torch.testing.assert_close(output.loss, torch.tensor((math.log(3) + math.log(4 / 3)) / 2))
    assert output.accuracy == 0.5  # best in e1 only


def test_masked_slots_are_not_candidates_and_the_positive_always_is() -> None:
    # As above, e0 without slot 2: 2/3.  The mask forbids the positive (slot 1) too, which must not
    # matter.
    cosines = torch.tensor([[logs(1, 2, 3)]])
    allowed = torch.tensor([[True, False, False]])
    output = contrastive_loss(cosines, torch.tensor([1]), allowed, temperature=1.0)
    torch.testing.assert_close(output.loss, torch.tensor(math.log(3 / 2)))


def test_equals_cross_entropy_without_masks() -> None:
    cosines, positive, _ = problem(0)
    for environment in range(3):
        one = cosines[:, environment : environment + 1]
        output = contrastive_loss(
            one, positive, torch.ones(4, 5, dtype=torch.bool), temperature=0.05
        )
        torch.testing.assert_close(
            output.loss, torch.nn.functional.cross_entropy(one[:, 0] / 0.05, positive)
        )


def test_weights_normaliser_and_missing_environments() -> None:
    # Row 0 has e0 only: log 3.  Row 1 has both: (log 2 + log 4) / 2 = 1.5 log 2.  Weights 1 and 3,
    # normaliser 2: (log 3 + 4.5 log 2) / 2.
    cosines = torch.tensor([[logs(1, 2, 3), logs(5, 1, 9)], [logs(1, 3, 2), logs(1, 1, 2)]])
    output = contrastive_loss(
        cosines,
        torch.tensor([1, 1]),
        EVERYTHING.expand(2, 3),
        temperature=1.0,
        weights=torch.tensor([1.0, 3.0]),
        normaliser=2,
        environment_mask=torch.tensor([[True, False], [True, True]]),
    )
    torch.testing.assert_close(output.loss, torch.tensor((math.log(3) + 4.5 * math.log(2)) / 2))
    # e0: (1 log 3 + 3 log 2) / 4; e1: row 1 alone, log 4.
    expected = torch.tensor([(math.log(3) + 3 * math.log(2)) / 4, math.log(4)])
    torch.testing.assert_close(output.per_environment, expected)
    risks, present = environment_risks(output)
    torch.testing.assert_close(risks, expected)
    assert present.tolist() == [True, True]


def test_padding_and_missing_environments_may_hold_nan() -> None:
    cosines, positive, allowed = problem(1)
    cosines[3] = math.nan  # a padded row
    positive[3] = -1
    cosines[0, 2] = math.nan  # a missing environment
    environments = torch.ones(4, 3, dtype=torch.bool)
    environments[0, 2] = False
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0])
    leaf = cosines.clone().requires_grad_()
    output = contrastive_loss(
        leaf, positive, allowed, temperature=0.1, weights=weights, environment_mask=environments
    )
    (gradient,) = torch.autograd.grad(output.loss + risk_variance(output.per_environment), leaf)
    assert torch.isfinite(gradient).all()
    assert (gradient[3] == 0).all()
    assert (gradient[0, 2] == 0).all()
    alone = contrastive_loss(
        cosines[:3], positive[:3], allowed[:3], temperature=0.1, environment_mask=environments[:3]
    )
    torch.testing.assert_close(output.loss, alone.loss)


@pytest.mark.parametrize("weights", [torch.zeros(4), None])
def test_batches_without_content_give_zero(weights: Tensor | None) -> None:
    cosines, positive, allowed = problem(2)
    cosines.requires_grad_()
    environments = torch.zeros(4, 3, dtype=torch.bool)
    output = contrastive_loss(
        cosines, positive, allowed, temperature=0.1, weights=weights, environment_mask=environments
    )
    output.loss.backward()
    assert output.loss == 0
    assert (cosines.grad == 0).all()


def test_gradient_against_finite_differences() -> None:
    cosines, positive, allowed = problem(3)
    environments = torch.rand(4, 3, generator=torch.Generator().manual_seed(3)) > 0.3

    def both(x: Tensor) -> Tensor:
        output = contrastive_loss(
            x,
            positive,
            allowed,
            temperature=0.3,
            weights=torch.tensor([1.0, 2.0, 0.0, 0.5]),
            environment_mask=environments,
        )
        return output.loss + risk_variance(*environment_risks(output))

    assert torch.autograd.gradcheck(both, cosines.requires_grad_())


def test_half_precision_is_computed_in_float32() -> None:
    cosines, positive, allowed = problem(4)
    low = cosines.bfloat16()
    output = contrastive_loss(low, positive, allowed, temperature=0.05)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(
        output.loss, contrastive_loss(low.float(), positive, allowed, temperature=0.05).loss
    )


def test_a_collapsed_encoder_has_no_accuracy() -> None:
    cosines = torch.ones(1, 1, 3)
    assert contrastive_loss(cosines, torch.tensor([0]), EVERYTHING, temperature=0.05).accuracy == 0
    alone = contrastive_loss(
        cosines[..., :1], torch.tensor([0]), EVERYTHING[:, :1], temperature=0.05
    )
    assert alone.accuracy == 1
    assert alone.loss == 0


@given(seed=st.integers(0, 10_000), shift=st.floats(-3, 3))
@settings(max_examples=40, deadline=None)
def test_order_of_candidates_and_a_constant_do_not_matter(seed: int, shift: float) -> None:
    cosines, positive, allowed = problem(seed)
    before = contrastive_loss(cosines, positive, allowed, temperature=0.2)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    place = torch.argsort(order)[positive]
    after = contrastive_loss(cosines[..., order] + shift, place, allowed[:, order], temperature=0.2)
    torch.testing.assert_close(before.loss, after.loss)
    torch.testing.assert_close(before.accuracy, after.accuracy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"positive": torch.tensor([1, 1])}, "positive"),
        ({"allowed": torch.ones(1, 4, dtype=torch.bool)}, "allowed"),
        ({"cosines": torch.zeros(1, 3)}, "cosines"),
        ({"environment_mask": torch.ones(1, 3)}, "environment_mask"),
    ],
)
def test_wrong_shapes_are_named(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "cosines": torch.zeros(1, 2, 3),
        "positive": torch.tensor([1]),
        "allowed": EVERYTHING,
        "temperature": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        contrastive_loss(**(arguments | change))  # type: ignore[arg-type]


def test_risk_variance_is_the_biased_variance() -> None:
    # Mean 2, squares 1, 1, 0 -> 2/3; without the last environment 1.
    losses = torch.tensor([1.0, 3.0, 2.0], requires_grad=True)
    variance = risk_variance(losses)
    torch.testing.assert_close(variance, torch.tensor(2 / 3))
    variance.backward()
    torch.testing.assert_close(losses.grad, torch.tensor([-2 / 3, 2 / 3, 0.0]))  # 2 (L - mean) / E
    assert risk_variance(losses, torch.tensor([True, True, False])) == 1
    assert risk_variance(losses[:1]) == 0
    with pytest.raises(ValueError, match="per_environment"):
        risk_variance(torch.zeros(2, 2))
