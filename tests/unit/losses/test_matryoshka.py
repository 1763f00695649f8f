"""Losses at several sizes of the same vectors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from invar_ray.config import ExperimentalRetriever, RetrieverConfig
from invar_ray.losses.gradcache import RepresentationCache
from invar_ray.losses.matryoshka import matryoshka_loss, size_weights, unit_prefix
from invar_ray.training.objective import Rows, objective

Settings = tuple[RetrieverConfig, ExperimentalRetriever]
SETTINGS: Settings = (
    RetrieverConfig(invariance_ramp_steps=1),
    ExperimentalRetriever(risk_variance_weight=0.3),
)
ALONE: Settings = (
    RetrieverConfig(alignment_weight=0.0, invariance_weight=0.0),
    ExperimentalRetriever(contrastive_temperature=0.5),
)
STEP = 3


def at_sizes(settings: Settings, *dims: int, weights: tuple[float, ...] = ()) -> Settings:
    return settings[0], replace(settings[1], matryoshka_dims=dims, matryoshka_weights=weights)


def rows(count: int, slots: int, environments: int) -> Rows:
    everything = torch.ones(count, slots, dtype=torch.bool)
    generator = torch.Generator().manual_seed(5)
    return Rows(
        positive=torch.arange(count),
        weights=torch.ones(count),
        normaliser=float(count),
        environments=torch.ones(count, environments, dtype=torch.bool),
        teacher=torch.rand(count, slots, generator=generator),
        no_copies=everything,
        no_answers=everything,
    )


def problem() -> tuple[Tensor, Tensor]:
    """Vectors of 3 questions in 2 wordings [3, 2, 8] and of 5 slots in 2 windows [5, 2, 8]."""
    generator = torch.Generator().manual_seed(0)
    queries, candidates = (
        torch.randn(3, 2, 8, generator=generator),
        torch.randn(5, 2, 8, generator=generator),
    )
    return normalize(queries, dim=-1).requires_grad_(), normalize(
        candidates, dim=-1
    ).requires_grad_()


def test_hand_worked() -> None:
    # One question, its passage and another one, three values each; tau 0.5.
    # All 3: cosines 0.64 and 0.6, hence logits that differ by 0.08: L = log(1 + e^-0.08).
    # First 2: (0.6, 0) -> (1, 0); (0, 0.6) -> (0, 1); (1, 0) stays: cosines 0 and 1, logits 0 and
    # 2: L = log(1 + e^2). First 1: (1) against (0), which has no direction, and (1): cosines 0 and
    # 1 again.
    queries = torch.tensor([[[0.6, 0.0, 0.8]]])
    candidates = torch.tensor([[[0.0, 0.6, 0.8]], [[1.0, 0.0, 0.0]]])
    whole = math.log(1 + math.exp(-0.08))
    cut = math.log(1 + math.exp(2))
    with_two = at_sizes(ALONE, 2)
    loss, metrics = objective(queries, candidates, rows(1, 2, 1), *with_two, STEP)
    assert float(loss) == pytest.approx((whole + cut) / 2, rel=1e-6)
    assert metrics["loss_contrastive"] == pytest.approx(whole, rel=1e-6)
    assert metrics["loss_contrastive_2"] == pytest.approx(cut, rel=1e-6)
    assert (metrics["accuracy"], metrics["accuracy_2"]) == (1.0, 0.0)
    # Weights 3 for two values and 2 for one; the full size counts 1.
    weighted = at_sizes(ALONE, 2, 1, weights=(3.0, 2.0))
    loss, _ = objective(queries, candidates, rows(1, 2, 1), *weighted, STEP)
    assert float(loss) == pytest.approx((whole + 3 * cut + 2 * cut) / 6, rel=1e-6)


def test_prefixes_are_unit_and_the_whole_is_itself() -> None:
    vectors = problem()[0]
    assert unit_prefix(vectors, 8) is vectors
    torch.testing.assert_close(unit_prefix(vectors, 3).norm(dim=-1), torch.ones(3, 2))
    torch.testing.assert_close(
        unit_prefix(torch.tensor([[3.0, 4.0, 12.0]]), 2), torch.tensor([[0.6, 0.8]])
    )


@pytest.mark.parametrize("sizes, weights, expected", [
    ((), (), {8: 1.0}),
    ((4, 2), (), {8: 1 / 3, 4: 1 / 3, 2: 1 / 3}),
    ((4, 8), (1.0, 3.0), {8: 0.75, 4: 0.25}),
    ((2,), (4.0,), {8: 0.2, 2: 0.8}),
])  # fmt: skip
def test_weights_of_the_sizes(
    sizes: tuple[int, ...], weights: tuple[float, ...], expected: dict[int, float]
) -> None:
    found = size_weights(8, sizes, weights)
    assert next(iter(found)) == 8, (
        "the full size comes first: its numbers are logged without a size"
    )
    assert found == pytest.approx(expected)


def test_the_objective_is_the_mean_of_those_at_each_size() -> None:
    queries, candidates = problem()
    given = rows(3, 5, 4)
    loss, _ = objective(queries, candidates, given, *at_sizes(SETTINGS, 2, 5), STEP)
    alone = torch.stack(
        [
            objective(
                unit_prefix(queries, size), unit_prefix(candidates, size), given, *SETTINGS, STEP
            )[0]
            for size in (8, 2, 5)
        ]
    )
    torch.testing.assert_close(loss, alone.mean())
    assert float(alone.detach().max() - alone.detach().min()) > 0.1, (
        "the sizes have the same loss: proves nothing"
    )


def test_off_it_is_the_objective_bit_for_bit() -> None:
    queries, candidates = problem()
    plain, metrics = objective(queries, candidates, rows(3, 5, 4), *SETTINGS, STEP)
    listed, more = objective(queries, candidates, rows(3, 5, 4), *at_sizes(SETTINGS, 8), STEP)
    assert torch.equal(plain, listed)
    assert metrics == more
    first = torch.autograd.grad(plain, queries)[0]
    assert torch.equal(first, torch.autograd.grad(listed, queries)[0])


def test_the_scale_of_the_values_beyond_a_prefix_has_no_part_in_its_loss() -> None:
    queries, candidates = problem()
    given, only_two = rows(3, 5, 4), at_sizes(ALONE, 2)
    _, metrics = objective(queries, candidates, given, *only_two, STEP)
    stretched = queries.detach().clone()
    stretched[..., 2:] *= 0.25
    _, other = objective(normalize(stretched, dim=-1), candidates, given, *only_two, STEP)
    assert other["loss_contrastive_2"] == pytest.approx(metrics["loss_contrastive_2"], rel=1e-5)
    assert other["loss_contrastive"] != pytest.approx(metrics["loss_contrastive"], rel=1e-3)


def test_gradcache_gives_the_same_gradients() -> None:
    torch.manual_seed(1)
    layer = torch.nn.Linear(6, 8)
    ids = torch.randint(0, 9, (3 * 2 + 5 * 2, 6))
    mask = torch.ones_like(ids)
    settings = at_sizes(SETTINGS, 2, 5, weights=(2.0, 0.5))

    def encode(tokens: Tensor, _: Tensor) -> Tensor:
        return normalize(layer(tokens.float()), dim=-1)

    def loss(forward: object) -> Tensor:
        queries = forward(ids[:6], mask[:6]).view(3, 2, 8)  # type: ignore[operator]
        candidates = forward(ids[6:], mask[6:]).view(5, 2, 8)  # type: ignore[operator]
        return objective(queries, candidates, rows(3, 5, 4), *settings, STEP)[0]

    loss(encode).backward()
    wanted = layer.weight.grad.clone()  # type: ignore[union-attr]
    layer.zero_grad()
    cache = RepresentationCache(encode, 12)
    cache.backward(loss(cache))
    assert layer.weight.grad is not None
    assert float((layer.weight.grad - wanted).abs().max() / wanted.abs().max()) < 2e-6


@pytest.mark.parametrize(
    "call",
    [
        lambda: unit_prefix(torch.ones(2, 3), 4),
        lambda: unit_prefix(torch.ones(2, 3), 0),
        lambda: size_weights(8, (4, 16)),
        lambda: size_weights(8, (4,), (1.0, 2.0)),
        lambda: matryoshka_loss([], []),
        lambda: matryoshka_loss([torch.tensor(1.0)], [1.0, 2.0]),
    ],
)
def test_what_does_not_fit_is_refused(call: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        call()  # type: ignore[operator]
