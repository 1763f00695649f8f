"""What all losses share: precision, masking and the weighted mean.

Shape legend: B rows, C candidates, E environments.
"""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 where it is that already: losses never compute in half
    precision.
    """
    return x if x.dtype == torch.float64 else x.float()


def mask_value(x: Tensor) -> float:
    """A finite stand-in for minus infinity: its softmax is exactly 0, and an all-masked row gives
    no NaN.
    """
    return torch.finfo(x.dtype).min / 4


def row_weights(weights: Tensor | None, like: Tensor) -> Tensor:
    """Weights of the rows as [B] in the dtype of ``like`` [B, ...]; 1 where ``weights`` is
    ``None``.
    """
    if weights is None:
        return like.new_ones(like.shape[0])
    return weights.to(device=like.device, dtype=like.dtype)


def divisor(weights: Tensor, normaliser: float | Tensor | None) -> Tensor:
    """The number to divide a weighted sum by: ``normaliser``, or the sum of ``weights`` [B]; 1
    where that is 0.

    For W ranks pass the global sum of weights over W: the mean of the ranks' gradients is then the
    gradient of the global mean, even where ranks hold different numbers of real rows.
    """
    total = (
        weights.sum() if normaliser is None else torch.as_tensor(normaliser, device=weights.device)
    )
    total = total.to(weights.dtype)
    return torch.where(total > 0, total, torch.ones_like(total))


def weighted_mean(values: Tensor, weights: Tensor, by: Tensor) -> Tensor:
    """sum_i weights_i values_i / by, a scalar; rows of weight 0 cannot leak, whatever their value.

    Args:
        values: [B].
        weights: [B], at least 0.
        by: scalar, of :func:`divisor`.
    """
    kept = torch.where(weights > 0, values, torch.zeros_like(values))
    return (kept * weights).sum() / by


def with_positive(allowed: Tensor, positive: Tensor) -> Tensor:
    """``allowed`` [B, C] with each row's positive [B] allowed too (a negative index, of a padded
    row, is ignored).
    """
    slots = torch.arange(allowed.shape[1], device=allowed.device)
    return allowed | (slots == positive[:, None])


def own_slots(scores: Tensor) -> Tensor:
    """[B] slots 0 .. B-1: row i's positive is candidate i, as in a batch without hard negatives.

    Raises:
        ValueError: there are fewer candidates than rows.
    """
    rows, slots = scores.shape[0], scores.shape[-1]
    if slots < rows:
        raise ValueError(f"positive: {slots} candidates for {rows} rows, so it must be given")
    return torch.arange(rows, device=scores.device)


def all_slots(scores: Tensor) -> Tensor:
    """[B, C] true everywhere: every candidate counts for every row."""
    return scores.new_ones(scores.shape[0], scores.shape[-1], dtype=torch.bool)


def clean_rows(x: Tensor, keep: Tensor) -> Tensor:
    """``x`` with 0 wherever ``keep`` (broadcastable) is false: padding may hold NaN, and NaN x 0
    spoils gradients.
    """
    return torch.where(keep, x, torch.zeros_like(x))


def check_environments(
    cosines: Tensor,
    positive: Tensor,
    allowed: Tensor,
    temperature: float,
    environment_mask: Tensor | None,
) -> Tensor:
    """Check the shapes that contrastive and invariance share; return the environment mask as [B, E]
    bool.

    Raises:
        ValueError: a shape does not fit, or the temperature is not above 0.
    """
    check_temperature(temperature)
    if cosines.ndim != 3:
        raise ValueError(f"cosines: got shape {tuple(cosines.shape)}, expected [B, E, C]")
    rows, environments, slots = cosines.shape
    check_shape("positive", positive, (rows,))
    check_shape("allowed", allowed, (rows, slots))
    if environment_mask is None:
        return torch.ones(rows, environments, dtype=torch.bool, device=cosines.device)
    check_shape("environment_mask", environment_mask, (rows, environments))
    return environment_mask.to(device=cosines.device, dtype=torch.bool)


def check_shape(name: str, x: Tensor, expected: tuple[int, ...]) -> None:
    """Raise ValueError unless ``x`` has the ``expected`` shape."""
    if tuple(x.shape) != expected:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {expected}")


def check_temperature(temperature: float, name: str = "temperature") -> None:
    """Raise ValueError unless the temperature is above 0."""
    if not temperature > 0:
        raise ValueError(f"{name}: got {temperature}, expected a number above 0")
