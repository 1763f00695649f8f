"""Stage 1's objective as a function of vectors: what METHOD "Stage 1" adds up, and the numbers that
are logged.

Shape legend: b local rows, C candidate slots, R wordings, N windows, E = R * N environments, D
embedding size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from invar_ray.config import ExperimentalRetriever, RetrieverConfig
from invar_ray.losses.alignment import alignment_loss
from invar_ray.losses.contrastive import contrastive_loss
from invar_ray.losses.invariance import invariance_loss
from invar_ray.losses.matryoshka import matryoshka_loss, size_weights, unit_prefix
from invar_ray.losses.risk import environment_risks, risk_variance
from invar_ray.training.stage import Metrics


class Rows(NamedTuple):
    """What the losses need of this rank's rows beside their vectors.

    Attributes:
        positive: [b], the slot of each row's positive.
        weights: [b], 1 for real rows, 0 for padding.
        normaliser: of the rows' sums: global sum of weights / ranks.
        environments: [b, E] bool, which environments a row has.
        teacher: [b, C], s_T.
        no_copies: [b, C] bool, the mask of alignment and invariance.
        no_answers: [b, C] bool, the mask of the contrastive loss.
    """

    positive: Tensor
    weights: Tensor
    normaliser: float
    environments: Tensor
    teacher: Tensor
    no_copies: Tensor
    no_answers: Tensor


def objective(
    queries: Tensor,
    candidates: Tensor,
    rows: Rows,
    settings: RetrieverConfig,
    extra: ExperimentalRetriever,
    step: int,
) -> tuple[Tensor, Metrics]:
    """This rank's share of the global loss of a step, and numbers to log (shares, too).

    With ``matryoshka_dims`` it is the mean over sizes (:mod:`invar_ray.losses.matryoshka`); the
    contrastive loss and the accuracy of each smaller size are logged under its number.

    Args:
        queries: [b, R, D], unit rows.
        candidates: [C, N, D], unit rows, of all ranks.
        rows: of ``queries``.
        settings: weights, temperature, schedules.
        extra: the other temperatures, patterns, V-REx, Matryoshka.
        step: counted from 0.
    """
    sizes = size_weights(candidates.shape[-1], extra.matryoshka_dims, extra.matryoshka_weights)
    losses: list[Tensor] = []
    metrics: Metrics = {}
    for number, size in enumerate(sizes):
        loss, found = _at_one_size(
            unit_prefix(queries, size), unit_prefix(candidates, size), rows, settings, extra, step
        )
        losses.append(loss)
        if number == 0:
            metrics |= found
        else:
            metrics |= {f"{name}_{size}": found[name] for name in ("loss_contrastive", "accuracy")}
    total = matryoshka_loss(losses, list(sizes.values()))
    return total, metrics | {"loss": total.item()}


def _at_one_size(
    queries: Tensor,
    candidates: Tensor,
    rows: Rows,
    settings: RetrieverConfig,
    extra: ExperimentalRetriever,
    step: int,
) -> tuple[Tensor, Metrics]:
    # [b, E, C], (0, 0) first
    cosines = torch.einsum("brd,cnd->brnc", queries, candidates).flatten(1, 2)
    nce = contrastive_loss(
        cosines,
        rows.positive,
        rows.no_answers,
        temperature=extra.contrastive_temperature,
        weights=rows.weights,
        normaliser=rows.normaliser,
        environment_mask=rows.environments,
    )
    total = nce.loss
    metrics = {"loss_contrastive": nce.loss.item(), "accuracy": nce.accuracy.item()}
    if settings.alignment_weight > 0:
        aligned = alignment_loss(
            cosines[:, 0],
            rows.teacher,
            rows.no_copies,
            temperature=extra.contrastive_temperature,
            teacher_temperature=extra.alignment_temperature,
            weights=rows.weights,
            normaliser=rows.normaliser,
        )
        total = total + alignment_weight(settings, step) * aligned.loss
        metrics |= {
            "loss_alignment": aligned.loss.item(),
            "teacher_agreement": aligned.agreement.item(),
        }
    if settings.invariance_weight > 0:
        steady = invariance_loss(
            cosines,
            rows.positive,
            rows.no_copies,
            temperature=settings.invariance_temperature,
            pattern=extra.invariance_pattern,
            top_m=extra.pattern_top_m,
            share=extra.pattern_share,
            kappa=extra.pattern_kappa,
            weights=rows.weights,
            normaliser=rows.normaliser,
            environment_mask=rows.environments,
        )
        total = total + invariance_weight(settings, step) * steady.loss
        metrics |= {
            "loss_invariance": steady.loss.item(),
            "pattern_share": steady.pattern_share.item(),
            "consensus_perplexity": steady.perplexity.item(),
            "wrong_consensus_share": steady.wrong_consensus_share.item(),
        }
    if extra.risk_variance_weight > 0:
        variance = risk_variance(*environment_risks(nce))
        total = total + extra.risk_variance_weight * variance
        metrics["loss_risk_variance"] = variance.item()
    return total, metrics


def alignment_weight(settings: RetrieverConfig, step: int) -> float:
    """a(t) = a0 max(0, 1 - t / T_a)."""
    return settings.alignment_weight * max(0.0, 1.0 - step / max(1, settings.alignment_decay_steps))


def invariance_weight(settings: RetrieverConfig, step: int) -> float:
    """b(t) = b0 min(1, t / T_b)."""
    return settings.invariance_weight * min(1.0, step / max(1, settings.invariance_ramp_steps))
