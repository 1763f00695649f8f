"""Risk variance over environments (V-REx).  Shape legend: E environments."""

from __future__ import annotations

import torch
from torch import Tensor

from invar_ray.losses.contrastive import ContrastiveOutput
from invar_ray.losses.gather import mean_over_ranks
from invar_ray.losses.reduce import at_least_float32, check_shape


def environment_risks(output: ContrastiveOutput) -> tuple[Tensor, Tensor]:
    """The contrastive loss of each environment over the *global* batch, differentiable.

    Sums and weights are averaged over ranks before they are divided, so this is exact with missing
    environments, padded rows and ranks of different content.  On one process it involves no
    communication.

    Args:
        output: of :func:`invar_ray.losses.contrastive.contrastive_loss`.

    Returns:
        risks [E], nats (0 where no row has the environment), and present [E], bool.
    """
    size = output.environment_sums.shape[0]
    # [2E], one collective
    both = mean_over_ranks(torch.cat([output.environment_sums, output.environment_weights]))
    sums, weights = both[:size], both[size:]
    present = weights > 0
    return sums / torch.where(present, weights, torch.ones_like(weights)), present


def risk_variance(per_environment: Tensor, present: Tensor | None = None) -> Tensor:
    """Biased variance of the environments' losses.

    Formula::

        mean = sum_e L^e / E,    V = sum_e (L^e - mean)^2 / E

    Args:
        per_environment: [E], nats, over the global batch: on several ranks average *before* the
            variance (:func:`environment_risks`, or ``gather.mean_over_ranks``); the variance of
            local losses is another number.
        present: [E], bool: environments to count; ``None`` counts all.

    Returns:
        Scalar, nats^2; 0 for fewer than 2 environments.

    Source: V-REx, Krueger et al., arXiv 2003.00688, section 3 (variance of risks); METHOD "Stage
    1", Optional [ours]. Siblings: DomainBed's ``VREx`` (biased as here), ``IRM``'s penalty as the
    gradient-based alternative.
    """
    losses = at_least_float32(per_environment)
    if losses.ndim != 1:
        raise ValueError(f"per_environment: got shape {tuple(losses.shape)}, expected [E]")
    held = torch.ones_like(losses) if present is None else present.to(losses.dtype)
    check_shape("present", held, tuple(losses.shape))
    count = held.sum().clamp(min=1)
    mean = (losses * held).sum() / count
    return (((losses - mean) ** 2) * held).sum() / count
