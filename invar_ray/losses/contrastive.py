"""The contrastive loss over environments.  Shape legend: B rows, E environments, C candidate
slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from invar_ray.losses.reduce import (
    all_slots,
    at_least_float32,
    check_environments,
    clean_rows,
    divisor,
    mask_value,
    own_slots,
    row_weights,
    weighted_mean,
    with_positive,
)


class ContrastiveOutput(NamedTuple):
    """What :func:`contrastive_loss` returns.

    Attributes:
        loss: scalar, nats; carries the gradient.
        per_environment: [E], nats: the loss of each environment; carries the gradient.  Its mean
            over ranks is the global value where every row has all environments (no
            ``environment_mask``); ``risk.environment_risks`` is exact in any case.
        accuracy: scalar, no gradient: share of (row, environment) whose positive is strictly the
            best allowed slot.
        environment_sums: [E], the weighted sums behind ``per_environment``; carry the gradient.
        environment_weights: [E], the sums of the weights of the rows that have the environment.
    """

    loss: Tensor
    per_environment: Tensor
    accuracy: Tensor
    environment_sums: Tensor
    environment_weights: Tensor


def contrastive_loss(
    cosines: Tensor,
    positive: Tensor | None = None,
    allowed: Tensor | None = None,
    *,
    temperature: float = 0.05,
    weights: Tensor | None = None,
    normaliser: float | Tensor | None = None,
    environment_mask: Tensor | None = None,
) -> ContrastiveOutput:
    """InfoNCE over the candidates of the global batch, averaged over rows and environments.

    Formula::

        p_e(j|i) = softmax over allowed j of cos(q_i^r, d_j^w) / tau,     e = (r, w)
        L = sum_i weight_i mean_e -log p_e(+_i | i) / normaliser

    Args:
        cosines: [B, E, C], cos of every local query and every gathered candidate, in [-1, 1].
        positive: [B], long: the slot of each row's positive; ``None``: row i's is slot i.
        allowed: [B, C], bool, the same in all environments: true where slot j counts as a candidate
            of row i (see ``masks.contrastive_allowed``).  The positive is always allowed; ``None``
            allows all.
        temperature: tau_nce, dimensionless.
        weights: [B], at least 0; padded rows carry 0 and may hold anything, NaN included.  ``None``
            is 1 for all.
        normaliser: divides the weighted sum; ``None`` is the sum of ``weights``.  For W ranks:
            global sum / W.
        environment_mask: [B, E], bool: false where the row lacks the environment.  The mean over e
            goes over those present; a row without any weighs 0 but counts in the normaliser.

    Returns:
        Loss in nats, loss of each environment, accuracy.

    Raises:
        ValueError: shapes do not fit, or the temperature is not above 0.

    Source: Invar-RAG (arXiv 2411.07021), contrastive objective of the retriever; METHOD "Stage 1",
    Contrastive. Deviations: [ours] tau_nce 0.05, the masks, the mean over environments.
    Siblings: sentence-transformers ``MultipleNegativesRankingLoss`` (one environment, no masks),
    GTE's improved contrastive loss, ``info_nce`` of pytorch-metric-learning.
    """
    positive = own_slots(cosines) if positive is None else positive
    allowed = all_slots(cosines) if allowed is None else allowed
    present = check_environments(cosines, positive, allowed, temperature, environment_mask)
    scores = at_least_float32(cosines)
    weight = row_weights(weights, scores)  # [B]
    present = present & (weight > 0)[:, None]  # [B, E]
    scores = clean_rows(scores, present[:, :, None])
    keep = with_positive(allowed.bool(), positive)[:, None, :]  # [B, 1, C]
    logits = (scores / temperature).masked_fill(~keep, mask_value(scores))  # [B, E, C]
    place = positive.clamp(min=0)[:, None, None].expand(-1, logits.shape[1], 1)  # [B, E, 1]
    nll = -torch.log_softmax(logits, dim=-1).gather(-1, place).squeeze(-1)  # [B, E]
    nll = clean_rows(nll, present)

    held = present.to(scores.dtype)  # [B, E]
    count = held.sum(dim=1).clamp(min=1)  # [B]
    by = divisor(weight, normaliser)
    loss = weighted_mean(nll.sum(dim=1) / count, weight, by)

    sums = (nll * weight[:, None]).sum(dim=0)  # [E]
    totals = (held * weight[:, None]).sum(dim=0)  # [E]
    if environment_mask is None:
        per_environment = sums / by
    else:
        per_environment = sums / torch.where(totals > 0, totals, torch.ones_like(totals))

    with torch.no_grad():
        rivals = logits.scatter(-1, place, mask_value(scores)).amax(dim=-1)  # [B, E]
        best = (logits.gather(-1, place).squeeze(-1) > rivals).to(scores.dtype)
        if logits.shape[-1] == 1:
            best = torch.ones_like(best)
        accuracy = weighted_mean((best * held).sum(dim=1) / count, weight, by)
    return ContrastiveOutput(loss, per_environment, accuracy, sums, totals)
