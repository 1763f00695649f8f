"""Which candidate slots count for which row.  Shape legend: B rows, C slots.

Masks are the same in all environments: only so are scores of different environments comparable.
Every rank derives the metadata of the whole batch from (seed, step), so the masks need no
communication.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from invar_ray.losses.reduce import check_shape


class Slots(NamedTuple):
    """What is known of the candidate slots, in the order of the gathered vectors.

    Attributes:
        document: [C], long: index of the slot's document.
        start, end: [C], long: the anchor span in the document's characters, half open.
        content: [C], long, or ``None``: equal numbers mark equal texts (the same passage under two
            ids).
        present: [C], bool, or ``None`` for all true: false for padding.
    """

    document: Tensor
    start: Tensor
    end: Tensor
    content: Tensor | None = None
    present: Tensor | None = None


def copies_allowed(slots: Slots, positive: Tensor) -> Tensor:
    """The mask of the alignment and invariance losses: all slots but copies of the row's positive.

    A copy has the positive's document and span, or its content.

    Args:
        slots: C of them.
        positive: [B], long: the slot of each row's positive; negative for a padded row, where only
            padding is masked.

    Returns:
        [B, C], bool: true where the slot counts.  The positive itself always does.

    Source: METHOD "Stage 1", Candidates, Alignment, Invariance.
    """
    _check(slots)
    at = positive.clamp(min=0)

    def same(values: Tensor) -> Tensor:
        return values == values[at][:, None]  # [B, C]

    copy = same(slots.document) & same(slots.start) & same(slots.end)
    if slots.content is not None:
        copy = copy | same(slots.content)
    return _finish(~copy, slots, positive)


def contrastive_allowed(
    slots: Slots,
    positive: Tensor,
    *,
    teacher_scores: Tensor | None = None,
    holds_answer: Tensor | None = None,
    teacher_margin: float = 0.05,
) -> Tensor:
    """The mask of the contrastive loss: negatives that may be right answers are out.

    Masked out for row i: copies of the positive; slots whose anchor span overlaps the positive's
    (not all of its document: neighbours are the hard negatives); slots that hold a gold answer;
    slots with s_T(i, j) >= s_T(i, +) - margin |s_T(i, +)|.

    Args:
        slots: C of them.
        positive: [B], long; negative for a padded row.
        teacher_scores: [B, C], s_T of ``alignment.blend_teacher_scores``; ``None`` leaves that rule
            out.
        holds_answer: [B, C], bool: the slot holds one of the row's gold answers in any of its
            windows (``text.answers.contains_answer``); ``None`` leaves that rule out.
        teacher_margin: dimensionless, at least 0 (0.05 in METHOD).

    Returns:
        [B, C], bool: true where the slot counts.  The positive itself always does.

    Raises:
        ValueError: shapes do not fit, or the margin is negative.

    Source: METHOD "Stage 1", Contrastive [ours].  Siblings: the false-negative filter with a
    relative margin is that of NV-Retriever (arXiv 2407.15831, "TopK-PercPos", there with 95 %);
    sentence-transformers ``mine_hard_negatives( relative_margin=0.05)``.
    """
    if teacher_margin < 0:
        raise ValueError(f"teacher_margin: got {teacher_margin}, expected at least 0")
    allowed = copies_allowed(slots, positive)
    at = positive.clamp(min=0)
    same_document = slots.document == slots.document[at][:, None]
    overlaps = (slots.start < slots.end[at][:, None]) & (slots.end > slots.start[at][:, None])
    allowed = allowed & ~(same_document & overlaps)
    if holds_answer is not None:
        check_shape("holds_answer", holds_answer, tuple(allowed.shape))
        allowed = allowed & ~holds_answer.bool()
    if teacher_scores is not None:
        check_shape("teacher_scores", teacher_scores, tuple(allowed.shape))
        own = teacher_scores.gather(1, at[:, None])  # [B, 1]
        allowed = allowed & (teacher_scores < own - teacher_margin * own.abs())
    return _finish(allowed, slots, positive)


def _finish(allowed: Tensor, slots: Slots, positive: Tensor) -> Tensor:
    """Take padding out and put each row's positive in."""
    columns = torch.arange(allowed.shape[1], device=allowed.device)
    padded_row = (positive < 0)[:, None]
    allowed = allowed | padded_row | (columns == positive[:, None])
    return allowed if slots.present is None else allowed & slots.present.bool()


def _check(slots: Slots) -> None:
    size = tuple(slots.document.shape)
    for name in ("start", "end", "content", "present"):
        value = getattr(slots, name)
        if value is not None:
            check_shape(name, value, size)
