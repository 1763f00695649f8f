"""Alignment of the retriever with a frozen small encoder.  Shape legend: B rows, C slots, M size of
the teacher.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from invar_ray.losses.reduce import (
    all_slots,
    at_least_float32,
    check_shape,
    check_temperature,
    clean_rows,
    divisor,
    mask_value,
    row_weights,
    weighted_mean,
)


class AlignmentOutput(NamedTuple):
    """What :func:`alignment_loss` returns.

    Attributes:
        loss: scalar, nats; carries the gradient (never into the teacher).
        agreement: scalar, no gradient: share of rows whose best slot is the teacher's best slot
            too.
    """

    loss: Tensor
    agreement: Tensor


def blend_teacher_scores(
    queries: Tensor, passages: Tensor, documents: Tensor, *, document_weight: float
) -> Tensor:
    """The teacher's scores of local and of global view: s_T = (1 - g) cos(q, passage) + g cos(q,
    document).

    Args:
        queries: [B, M], unit rows: the teacher's vectors of the anchor questions.
        passages: [C, M], unit rows: of the slots' anchor windows.
        documents: [C, M], unit rows: of the slots' documents (see :func:`mean_document_vectors`).
        document_weight: g in [0, 1].  It has no effect where a document is one passage.

    Returns:
        [B, C], in [-1, 1], without gradient.

    Raises:
        ValueError: g is outside [0, 1] or shapes do not fit.

    Source: METHOD "Stage 1", Alignment.  [ours] The published text aligns with the small encoder's
    scores over the whole document; the blend and g are this project's.
    """
    if not 0.0 <= document_weight <= 1.0:
        raise ValueError(f"document_weight: got {document_weight}, expected a number in [0, 1]")
    check_shape("documents", documents, tuple(passages.shape))
    with torch.no_grad():
        query, passage, document = (at_least_float32(x) for x in (queries, passages, documents))
        # One product instead of two: both cosines are linear in the candidate's vector.
        return query @ ((1.0 - document_weight) * passage + document_weight * document).T


def mean_document_vectors(windows: Tensor, owner: Tensor, num_documents: int) -> Tensor:
    """Document vectors: the normalised mean of the teacher's vectors of all windows of each
    document.

    Args:
        windows: [N, M], unit rows.
        owner: [N], long: the document of each window, in 0 .. num_documents - 1.
        num_documents: rows of the result.

    Returns:
        [num_documents, M], unit rows (0 for a document without windows), without gradient.

    Source: METHOD "Stage 1", Alignment [ours].
    """
    check_shape("owner", owner, (windows.shape[0],))
    with torch.no_grad():
        vectors = at_least_float32(windows)
        sums = vectors.new_zeros(num_documents, vectors.shape[1]).index_add_(0, owner, vectors)
        return torch.nn.functional.normalize(sums, dim=1)  # the mean has the direction of the sum


def alignment_loss(
    anchor_cosines: Tensor,
    teacher_scores: Tensor,
    allowed: Tensor | None = None,
    *,
    temperature: float = 0.05,
    teacher_temperature: float = 0.05,
    weights: Tensor | None = None,
    normaliser: float | Tensor | None = None,
) -> AlignmentOutput:
    """KL divergence from the teacher's distribution over the candidates to the retriever's, in the
    anchor environment.

    Formula::

        p_M = softmax over allowed j of s_T(i, j) / tau_M
        p   = softmax over allowed j of cos(q_i^0, d_j^0) / tau
        L   = sum_i weight_i KL(p_M || p) / normaliser

    Args:
        anchor_cosines: [B, C], in [-1, 1].
        teacher_scores: [B, C], s_T, see :func:`blend_teacher_scores`; gets no gradient.
        allowed: [B, C], bool: copies of the positive are out, and nothing else
            (``masks.copies_allowed``); ``None`` allows all.
        temperature: tau of the retriever (tau_nce), dimensionless.
        teacher_temperature: tau_M, dimensionless.
        weights: [B], at least 0; padded rows carry 0 and may hold anything.
        normaliser: divides the weighted sum; ``None`` is the sum of ``weights``.  For W ranks:
            global sum / W.

    Raises:
        ValueError: shapes do not fit, or a temperature is not above 0.

    Source: Invar-RAG (arXiv 2411.07021), LLM-aligned retrieval; METHOD "Stage 1", Alignment.
    Deviations: [ours] the teacher's score (local and global view), and that the weight of this loss
    decays (caller). Siblings: ``torch.nn.functional.kl_div``; sentence-transformers
    ``DistillKLDivLoss``; margin-MSE is the score-wise alternative.
    """
    check_temperature(temperature)
    check_temperature(teacher_temperature, "teacher_temperature")
    if anchor_cosines.ndim != 2:
        raise ValueError(
            f"anchor_cosines: got shape {tuple(anchor_cosines.shape)}, expected [B, C]"
        )
    shape = tuple(anchor_cosines.shape)
    check_shape("teacher_scores", teacher_scores, shape)
    allowed = all_slots(anchor_cosines) if allowed is None else allowed
    check_shape("allowed", allowed, shape)
    scores = at_least_float32(anchor_cosines)
    weight = row_weights(weights, scores)  # [B]
    keep = allowed.bool() & (weight > 0)[:, None]  # [B, C]
    floor = mask_value(scores)
    scores = clean_rows(scores, keep)
    log_p = torch.log_softmax((scores / temperature).masked_fill(~keep, floor), dim=-1)  # [B, C]
    with torch.no_grad():
        teacher = clean_rows(teacher_scores.to(scores.dtype), keep)
        # [B, C]
        log_teacher = torch.log_softmax(
            (teacher / teacher_temperature).masked_fill(~keep, floor), dim=-1
        )
    gap = torch.where(keep, log_teacher - log_p, torch.zeros_like(log_p))
    by = divisor(weight, normaliser)
    loss = weighted_mean((log_teacher.exp() * gap).sum(dim=-1), weight, by)
    with torch.no_grad():
        same = (log_p.argmax(dim=-1) == log_teacher.argmax(dim=-1)).to(scores.dtype)
        agreement = weighted_mean(same, weight, by)
    return AlignmentOutput(loss, agreement)
