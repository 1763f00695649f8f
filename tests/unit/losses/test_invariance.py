"""The invariance loss: patterns, consensus, and what must give exactly nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from invar_ray.losses.invariance import InvarianceOutput, invariance_loss

SOFT: dict[str, Any] = {"pattern": "soft", "top_m": 10, "share": 0.8, "kappa": 2.0}
W_IS_ONE: dict[str, Any] = SOFT | {"kappa": 1e15}


def logs(*numbers: float) -> list[float]:
    return [math.log(number) for number in numbers]


def loss_of(cosines: Tensor, positive: int = 0, **settings_: Any) -> InvarianceOutput:
    rows, _, slots = cosines.shape
    settings_ = SOFT | {"temperature": 1.0} | settings_
    allowed = settings_.pop("allowed", torch.ones(rows, slots, dtype=torch.bool))
    return invariance_loss(cosines, torch.full((rows,), positive), allowed, **settings_)


def problem(
    seed: int, rows: int = 3, environments: int = 4, slots: int = 6
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cosines = (
        torch.rand(rows, environments, slots, generator=generator, dtype=torch.float64) * 2 - 1
    )
    positive = torch.randint(slots, (rows,), generator=generator)
    allowed = torch.rand(rows, slots, generator=generator) > 0.2
    return cosines, positive, allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["hard", "soft"])
@pytest.mark.parametrize("environments", [2, 3, 5, 7])
def test_identical_environments_give_exactly_zero(
    dtype: torch.dtype, pattern: str, environments: int
) -> None:
    cosines, positive, allowed = problem(0, rows=16, environments=1, slots=40)
    same = cosines.expand(-1, environments, -1).to(dtype).contiguous().requires_grad_()
    output = invariance_loss(
        same,
        positive,
        allowed,
        temperature=0.1,
        pattern=pattern,
        top_m=40,
        share=1.0,
        kappa=2.0,  # type: ignore[arg-type]
    )
    assert output.loss.item() == 0.0
    output.loss.backward()
    assert same.grad is not None
    assert same.grad.abs().max() < 1e-6
    assert output.wrong_consensus_share == 0


def test_identical_environments_beside_a_missing_one_give_exactly_zero() -> None:
    cosines, positive, allowed = problem(1, environments=1)
    same = cosines.expand(-1, 4, -1).clone()
    same[:, 0] = math.nan
    present = torch.tensor([False, True, True, True]).expand(3, 4)
    output = invariance_loss(
        same, positive, allowed, temperature=0.1, environment_mask=present, **SOFT
    )
    assert output.loss.item() == 0.0


def test_hand_worked_with_weights_of_one() -> None:
    # p_0 = (1/2, 1/2), p_1 = (4/5, 1/5).  exp(a) = (sqrt(2/5), sqrt(1/10)), their sum is 3
    # sqrt(1/10), c = (2/3, 1/3). L = -log(3 / sqrt(10)) = 0.5 log(10/9);  exp H(c) = 3 / 2^(2/3).
    cosines = torch.tensor([[logs(1, 1), logs(4, 1)]], dtype=torch.float64)
    output = loss_of(cosines, **W_IS_ONE)
    assert output.loss.item() == pytest.approx(0.5 * math.log(10 / 9), abs=1e-9)
    assert output.perplexity.item() == pytest.approx(3 / 2 ** (2 / 3), abs=1e-9)
    assert output.pattern_share.item() == pytest.approx(1.0)
    # The same from the definition: the mean of the two KL(c || p_e).
    c = torch.tensor([2 / 3, 1 / 3], dtype=torch.float64)
    by_hand = sum((c * (c / torch.tensor(p)).log()).sum() for p in ([0.5, 0.5], [0.8, 0.2])) / 2
    assert output.loss.item() == pytest.approx(float(by_hand), abs=1e-7)


def test_hand_worked_soft_patterns() -> None:
    # As above with kappa 0.1: log p of slot 0 is log .5, log .8 -> v = (log 1.6 / 2)^2; of slot 1
    # log .5, log .2 -> v = (log 2.5 / 2)^2.  w = exp(-v / kappa); all slots are in S, so p_e needs
    # no renormalisation.
    cosines = torch.tensor([[logs(1, 1), logs(4, 1)]], dtype=torch.float64)
    output = loss_of(cosines, kappa=0.1)
    w = [math.exp(-((math.log(ratio) / 2) ** 2) / 0.1) for ratio in (1.6, 2.5)]
    raw = [w[0] * math.sqrt(0.4), w[1] * math.sqrt(0.1)]
    c = [value / sum(raw) for value in raw]
    expected = sum(
        0.5 * c[j] * math.log(c[j] / p[j]) for p in ([0.5, 0.5], [0.8, 0.2]) for j in range(2)
    )
    assert output.loss.item() == pytest.approx(expected, abs=1e-12)
    assert output.pattern_share.item() == pytest.approx(sum(w) / 2)


def test_hand_worked_hard_patterns() -> None:
    # Top 2 of e0 (4, 3, 2, 1): {0, 1}; of e1 (4, 1, 2, 3): {0, 3}.
    cosines = torch.tensor([[logs(4, 3, 2, 1), logs(4, 1, 2, 3)]], dtype=torch.float64)
    # rho 1: S = {0}; one slot renormalises to 1 in both: nothing to disagree on.
    strict = loss_of(cosines, pattern="hard", top_m=2, share=1.0)
    assert strict.loss.item() == 0
    assert strict.pattern_share.item() == pytest.approx(1 / 4)
    assert strict.perplexity.item() == pytest.approx(1.0)
    # rho 1/2: S = {0, 1, 3}; p_0|S = (4, 3, 1) / 8, p_1|S = (4, 1, 3) / 8; geometric means (4, sqrt
    # 3, sqrt 3) / 8: L = -log((4 + 2 sqrt 3) / 8).
    loose = loss_of(cosines, pattern="hard", top_m=2, share=0.5)
    assert loose.loss.item() == pytest.approx(-math.log((4 + 2 * math.sqrt(3)) / 8), abs=1e-12)
    assert loose.pattern_share.item() == pytest.approx(3 / 4)


def test_rows_that_weigh_nothing_count_in_the_denominator() -> None:
    row = [logs(1, 1), logs(4, 1)]
    right = 0.5 * math.log(10 / 9)
    cosines = torch.tensor([row, row, row, row], dtype=torch.float64)
    present = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    # Row 1 has one environment.  Row 2's positive is slot 1, which c = (2/3, 1/3) puts second:
    # wrong for top 1.
    output = invariance_loss(
        cosines,
        torch.tensor([0, 0, 1, 0]),
        torch.ones(4, 2, dtype=torch.bool),
        temperature=1.0,
        environment_mask=present,
        **(W_IS_ONE | {"top_m": 1}),
    )
    assert output.loss.item() == pytest.approx(2 * right / 4, abs=1e-9)
    assert output.wrong_consensus_share.item() == pytest.approx(1 / 4)
    agreed = invariance_loss(
        cosines,
        torch.tensor([0, 0, 1, 0]),
        torch.ones(4, 2, dtype=torch.bool),
        temperature=1.0,
        environment_mask=present,
        weights=torch.tensor([1.0, 1.0, 1.0, 0.0]),
        normaliser=6,
        **W_IS_ONE,
    )
    assert agreed.loss.item() == pytest.approx(2 * right / 6, abs=1e-9)


def test_a_wrong_consensus_has_no_gradient() -> None:
    cosines = torch.tensor([[logs(1, 1), logs(4, 1)]], requires_grad=True)
    output = loss_of(cosines, positive=1, **(W_IS_ONE | {"top_m": 1}))
    output.loss.backward()
    assert output.wrong_consensus_share == 1
    assert cosines.grad is not None
    assert (cosines.grad == 0).all()


def test_rows_without_patterns_give_zero_not_nan() -> None:
    # Every environment prefers another slot, so that no slot is in the top 1 of both.
    cosines = torch.tensor([[logs(4, 1), logs(1, 4)]], requires_grad=True)
    output = loss_of(cosines, pattern="hard", top_m=1, share=1.0)
    output.loss.backward()
    assert output.loss.item() == 0
    assert output.perplexity == 0
    assert output.pattern_share == 0
    assert output.wrong_consensus_share == 1
    assert cosines.grad is not None
    assert (cosines.grad == 0).all()


def test_the_consensus_gets_no_gradient() -> None:
    # With c fixed, dL/dz_e = (p_e - c) / E (tau 1): c = (2/3, 1/3), E = 2.
    cosines = torch.tensor([[logs(1, 1), logs(4, 1)]], dtype=torch.float64, requires_grad=True)
    loss_of(cosines, **W_IS_ONE).loss.backward()
    c = torch.tensor([2 / 3, 1 / 3], dtype=torch.float64)
    p = torch.tensor([[0.5, 0.5], [0.8, 0.2]], dtype=torch.float64)
    torch.testing.assert_close(cosines.grad, ((p - c) / 2)[None])


@pytest.mark.parametrize("pattern", ["hard", "soft"])
def test_gradient_is_that_of_the_definition_with_the_consensus_fixed(pattern: str) -> None:
    cosines, positive, allowed = problem(5)
    leaf = cosines.clone().requires_grad_()
    output = invariance_loss(
        leaf,
        positive,
        allowed,
        temperature=0.5,
        pattern=pattern,
        top_m=4,
        share=0.5,
        kappa=1.0,  # type: ignore[arg-type]
    )
    (gradient,) = torch.autograd.grad(output.loss, leaf)
    twin = cosines.clone().requires_grad_()
    (expected,) = torch.autograd.grad(
        slow_invariance(twin, positive, allowed, 0.5, pattern, 4, 0.5, 1.0), twin
    )
    assert output.loss.item() == pytest.approx(
        slow_invariance(cosines, positive, allowed, 0.5, pattern, 4, 0.5, 1.0).item(), abs=1e-12
    )
    assert output.loss > 0
    torch.testing.assert_close(gradient, expected)


def slow_invariance(
    cosines: Tensor,
    positive: Tensor,
    allowed: Tensor,
    tau: float,
    pattern: str,
    m: int,
    rho: float,
    kappa: float,
) -> Tensor:
    """METHOD's definition, row by row on the allowed slots only."""
    total = cosines.new_zeros(())
    for i in range(cosines.shape[0]):
        keep = allowed[i].clone()
        keep[positive[i]] = True
        slots = keep.nonzero().flatten().tolist()
        log_p = (cosines[i][:, slots] / tau).log_softmax(-1)  # [E, S]
        a, v = log_p.mean(0).detach(), log_p.var(0, unbiased=False).detach()
        if pattern == "soft":
            w = (-v / kappa).exp()
        else:
            ranks = log_p.detach().argsort(-1, descending=True).argsort(-1)
            w = ((ranks < m).double().mean(0) >= rho).double()
        c = w * a.exp() / (w * a.exp()).sum()
        if (
            int((c > c[slots.index(int(positive[i]))]).sum()) >= m
            or c[slots.index(int(positive[i]))] == 0
        ):
            continue
        inside = w > 0
        for e in range(log_p.shape[0]):
            q = log_p[e, inside] - log_p[e, inside].logsumexp(-1)
            total = total + (c[inside] * (c[inside].log() - q)).sum() / log_p.shape[0]
    return total / cosines.shape[0]


def test_padding_and_missing_environments_may_hold_nan() -> None:
    cosines, positive, allowed = problem(6)
    cosines[2], positive[2] = math.nan, -1
    cosines[0, 1] = math.nan
    present = torch.ones(3, 4, dtype=torch.bool)
    present[0, 1] = False
    weights = torch.tensor([1.0, 1.0, 0.0])
    leaf = cosines.clone().requires_grad_()
    output = invariance_loss(
        leaf, positive, allowed, temperature=0.2, weights=weights, environment_mask=present, **SOFT
    )
    (gradient,) = torch.autograd.grad(output.loss, leaf)
    assert torch.isfinite(gradient).all()
    assert (gradient[2] == 0).all()
    assert (gradient[0, 1] == 0).all()
    assert gradient.abs().sum() > 0
    alone = invariance_loss(
        cosines[:2],
        positive[:2],
        allowed[:2],
        temperature=0.2,
        environment_mask=present[:2],
        **SOFT,
    )
    for found, expected in zip(output, alone, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("pattern", ["hard", "soft"])
def test_a_missing_environment_is_as_if_it_were_not_there(pattern: str) -> None:
    cosines, positive, allowed = problem(7)
    present = torch.tensor([True, False, True, True]).expand(3, 4)
    chosen: dict[str, Any] = {
        "temperature": 0.5,
        "pattern": pattern,
        "top_m": 5,
        "share": 0.5,
        "kappa": 1.0,
    }
    masked = invariance_loss(cosines, positive, allowed, environment_mask=present, **chosen)
    alone = invariance_loss(cosines[:, [0, 2, 3]], positive, allowed, **chosen)
    assert masked.loss > 0
    for found, expected in zip(masked, alone, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("pattern", ["hard", "soft"])
def test_extreme_scores_stay_finite(pattern: str) -> None:
    cosines = torch.tensor([[[1.0, -1.0, 0.5, -1.0], [-1.0, 1.0, 0.5, -1.0]]], requires_grad=True)
    output = loss_of(
        cosines, positive=2, temperature=1e-3, pattern=pattern, top_m=3, share=0.5, kappa=1e-3
    )
    output.loss.backward()
    assert all(torch.isfinite(value) for value in output)
    assert cosines.grad is not None
    assert torch.isfinite(cosines.grad).all()


@given(
    seed=st.integers(0, 10_000), shift=st.floats(-3, 3), pattern=st.sampled_from(["hard", "soft"])
)
@settings(max_examples=40, deadline=None)
def test_order_and_constants_do_not_matter(seed: int, shift: float, pattern: str) -> None:
    cosines, positive, allowed = problem(seed)
    chosen: dict[str, Any] = {
        "temperature": 0.5,
        "pattern": pattern,
        "top_m": 3,
        "share": 0.5,
        "kappa": 1.0,
    }
    before = invariance_loss(cosines, positive, allowed, **chosen)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(6, generator=generator)
    environments = torch.randperm(4, generator=generator)
    place = torch.argsort(order)[positive]
    # its own for each environment
    shifts = shift * torch.rand(3, 4, 1, generator=generator, dtype=torch.float64)
    moved = (cosines + shifts)[:, environments][..., order]
    after = invariance_loss(moved, place, allowed[:, order], **chosen)
    for left, right in zip(before, after, strict=True):
        torch.testing.assert_close(left, right)
    assert before.loss >= 0


@given(seed=st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_with_weights_of_one_it_is_minus_log_of_the_sum_of_geometric_means(seed: int) -> None:
    cosines, positive, allowed = problem(seed)
    allowed[torch.arange(3), positive] = True
    output = invariance_loss(cosines, positive, allowed, temperature=0.7, **W_IS_ONE)
    a = (cosines / 0.7).masked_fill(~allowed[:, None], -math.inf).log_softmax(-1).mean(1)
    torch.testing.assert_close(output.loss, -a.logsumexp(-1).mean())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": "firm"}, "pattern"),
        ({"top_m": 0}, "top_m"),
        ({"kappa": 0.0}, "kappa"),
        ({"temperature": 0}, "temp"),
    ],
)
def test_wrong_settings_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss_of(torch.zeros(1, 2, 3), **change)
    with pytest.raises(ValueError, match="share"):
        loss_of(torch.zeros(1, 2, 3), pattern="hard", share=2.0)
