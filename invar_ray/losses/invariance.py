"""The invariance loss: agreement on the invariant patterns.  Shape legend: B rows, E environments,
C slots.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

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


class InvarianceOutput(NamedTuple):
    """What :func:`invariance_loss` returns; all but ``loss`` carry no gradient and are means over
    the rows.

    Attributes:
        loss: scalar, nats.
        pattern_share: mean of w over the allowed slots: the share of slots that are invariant
            patterns (hard), or their mean weight (soft).
        perplexity: exp of the entropy of the consensus c: how many slots it is spread over; 0 for a
            row without patterns.
        wrong_consensus_share: share of rows with at least 2 environments whose positive is not in
            the top m of c.
    """

    loss: Tensor
    pattern_share: Tensor
    perplexity: Tensor
    wrong_consensus_share: Tensor


def invariance_loss(
    cosines: Tensor,
    positive: Tensor | None = None,
    allowed: Tensor | None = None,
    *,
    temperature: float = 0.1,
    pattern: Literal["hard", "soft"] = "soft",
    top_m: int = 10,
    share: float = 0.8,
    kappa: float = 2.0,
    weights: Tensor | None = None,
    normaliser: float | Tensor | None = None,
    environment_mask: Tensor | None = None,
) -> InvarianceOutput:
    """Pull every environment's distribution towards the consensus on the slots that rank alike in
    all of them.

    Formula::

        log p_e(j|i) = log softmax over allowed j of cos / tau_inv
        a_ij = mean_e log p_e(j|i),   v_ij = biased variance over e of log p_e(j|i)      (nats,
        nats^2) w_ij: hard = 1 if j is in the top m of at least a share rho of the environments,
        else 0
              soft = exp(-v_ij / kappa)
        c_i(j) = w_ij exp(a_ij) / sum over S_i,   S_i = {j : w_ij > 0}                   (no
        gradient) L = sum_i weight_i mean_e KL(c_i || p_e renormalised over S_i) / normaliser

    Rows with fewer than 2 environments, without patterns, or with a *wrong consensus* (the positive
    is not in the top m of c, so that agreeing would lock a mistake in) weigh 0 but still count in
    the normaliser.  Identical environments give exactly 0; with w = 1 everywhere, L = -log sum_j
    exp(a_ij).

    Args:
        cosines: [B, E, C], in [-1, 1].
        positive: [B], long: the slot of each row's positive; ``None``: row i's is slot i.
        allowed: [B, C], bool: copies of the positive are out, and nothing else
            (``masks.copies_allowed``): false negatives are what should *stay* ranked.  The positive
            is always allowed; ``None`` allows all.
        temperature: tau_inv, its own: at tau_nce the distributions saturate and this loss repeats
            the contrastive one.
        pattern: ``hard`` or ``soft`` patterns.
        top_m: m, at least 1.  Slots tied with the m-th count as in the top m.
        share: rho in [0, 1], hard patterns only.
        kappa: in nats^2, above 0, soft patterns only.
        weights: [B], at least 0; padded rows carry 0 and may hold anything.
        normaliser: divides the weighted sums; ``None`` is the sum of ``weights``.  For W ranks:
            global sum / W.
        environment_mask: [B, E], bool: false where the row lacks the environment.

    Raises:
        ValueError: shapes do not fit, or a setting is out of its range.

    Source: Invar-RAG (arXiv 2411.07021), invariance loss, there in outline; METHOD "Stage 1",
    Invariance. Deviations: [ours] both definitions of w, the renormalisation over S, the
    temperature, the rows that weigh 0. Siblings: consistency training such as R-Drop (arXiv
    2106.14448; symmetric KL of two passes, all classes) and generalised Jensen-Shannon consistency
    as in AugMix; neither selects patterns.
    """
    positive = own_slots(cosines) if positive is None else positive
    allowed = all_slots(cosines) if allowed is None else allowed
    present = check_environments(cosines, positive, allowed, temperature, environment_mask)
    _check_settings(pattern, top_m, share, kappa)
    scores = at_least_float32(cosines)
    weight = row_weights(weights, scores)  # [B]
    present = present & (weight > 0)[:, None]  # [B, E]
    keep = with_positive(allowed.bool(), positive)  # [B, C]
    floor = mask_value(scores)
    # Scores before the softmax.  Missing environments become 0 here and are left out of every mean
    # below.
    z = clean_rows(scores, present[:, :, None] & keep[:, None, :]) / temperature  # [B, E, C]
    count = present.sum(dim=1)  # [B]

    with torch.no_grad():
        # [B, C], [B, C]
        log_w, patterns = _patterns(z, present, keep, count, pattern, top_m, share, kappa)
        # Softmax ignores a constant per row, so mean_e z stands for a = mean_e log p_e.
        consensus = log_w + _mean_over_environments(z, present, count)  # [B, C]
        log_c = torch.log_softmax(consensus.masked_fill(~patterns, floor), dim=-1)  # [B, C]
        c = clean_rows(log_c.exp(), patterns)  # [B, C], all 0 without patterns
        # [B, C]
        right = _in_top(log_c.masked_fill(~patterns, floor)[:, None], top_m)[:, 0] & patterns
        right_row = right.gather(1, positive.clamp(min=0)[:, None]).squeeze(1)  # [B]
        used = (count >= 2) & right_row  # [B]

    log_q = torch.log_softmax(z.masked_fill(~patterns[:, None], floor), dim=-1)  # [B, E, C]
    gap = torch.where(patterns[:, None], log_c[:, None] - log_q, torch.zeros_like(log_q))
    kl = clean_rows((c[:, None] * gap).sum(dim=-1), present)  # [B, E]
    by = divisor(weight, normaliser)
    loss = weighted_mean(kl.sum(dim=1) / count.clamp(min=1), weight * used, by)

    with torch.no_grad():
        # log_w is 0 or the soft weight inside the patterns, and w is 0 outside.
        w = clean_rows(log_w.exp(), patterns)
        pattern_share = weighted_mean(w.sum(dim=1) / keep.sum(dim=1).clamp(min=1), weight, by)
        entropy = -(c * clean_rows(log_c, patterns)).sum(dim=-1)  # [B]
        perplexity = weighted_mean(clean_rows(entropy.exp(), patterns.any(dim=1)), weight, by)
        wrong = ((count >= 2) & ~right_row).to(scores.dtype)
        wrong_share = weighted_mean(wrong, weight, by)
    return InvarianceOutput(loss, pattern_share, perplexity, wrong_share)


def _check_settings(pattern: str, top_m: int, share: float, kappa: float) -> None:
    if pattern not in {"hard", "soft"}:
        raise ValueError(f"pattern: got {pattern!r}, expected 'hard' or 'soft'")
    if top_m < 1:
        raise ValueError(f"top_m: got {top_m}, expected at least 1")
    if pattern == "hard" and not 0.0 <= share <= 1.0:
        raise ValueError(f"share: got {share}, expected a number in [0, 1]")
    if pattern == "soft" and not kappa > 0:
        raise ValueError(f"kappa: got {kappa}, expected a number above 0")


def _patterns(
    z: Tensor,
    present: Tensor,
    keep: Tensor,
    count: Tensor,
    pattern: str,
    top_m: int,
    share: float,
    kappa: float,
) -> tuple[Tensor, Tensor]:
    """Return log w [B, C] and which slots are patterns, w > 0, [B, C]."""
    floor = mask_value(z)
    masked = z.masked_fill(~keep[:, None], floor)  # [B, E, C]
    if pattern == "hard":
        high = _in_top(masked, top_m) & present[:, :, None] & keep[:, None]  # [B, E, C]
        # The small slack keeps 0.7 x 10 = 7.000000000000001 from asking for 8.
        enough = high.sum(dim=1) >= share * count[:, None] - 1e-6  # [B, C]
        return z.new_zeros(keep.shape), enough & high.any(dim=1) & keep
    log_p = clean_rows(torch.log_softmax(masked, dim=-1), keep[:, None])  # [B, E, C]
    mean = _mean_over_environments(log_p, present, count)  # [B, C]
    squares = clean_rows((log_p - mean[:, None]) ** 2, present[:, :, None])
    variance = squares.sum(dim=1) / count.clamp(min=1)[:, None]  # [B, C]
    return -variance / kappa, keep  # exp(-v / kappa) > 0 for every allowed slot


def _in_top(x: Tensor, top_m: int) -> Tensor:
    """Where ``x`` [B, E, C] is among the m largest of its row, ties with the m-th included: slots
    have no order.
    """
    return x >= x.topk(min(top_m, x.shape[-1]), dim=-1).values[..., -1:]


def _mean_over_environments(x: Tensor, present: Tensor, count: Tensor) -> Tensor:
    """Mean of ``x`` [B, E, C] over the environments that are present, [B, C].

    Taken as distances from the first environment present: identical environments give that
    environment bit for bit, so that their loss is exactly 0.
    """
    first = present.long().argmax(dim=1)  # [B]
    reference = x.gather(1, first[:, None, None].expand(-1, 1, x.shape[2]))  # [B, 1, C]
    distance = clean_rows(x - reference, present[:, :, None])
    return reference[:, 0] + distance.sum(dim=1) / count.clamp(min=1)[:, None]
