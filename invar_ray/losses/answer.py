"""Stage 2's loss: cross-entropy of the answer.  Shape legend: B rows, T tokens, V vocabulary, N
answer tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from invar_ray.losses.reduce import at_least_float32, check_shape

IGNORED = -100


class AnswerOutput(NamedTuple):
    """What :func:`answer_loss` returns.

    Attributes:
        loss: scalar, nats per answer token; carries the gradient.
        tokens: scalar, long: the answer tokens of these rows, to sum up over ranks for
            ``normaliser``.
        accuracy: scalar, no gradient: share of answer tokens that are the most likely one.
    """

    loss: Tensor
    tokens: Tensor
    accuracy: Tensor


def answer_loss(
    logits: Tensor, labels: Tensor, *, normaliser: float | Tensor | None = None
) -> AnswerOutput:
    """Cross-entropy of the answer tokens, given prompt and passages.

    Formula::

        L = sum over (i, t >= 1) with labels[i, t] != -100 of -log softmax(logits[i, t -
        1])[labels[i, t]] / normaliser

    The shift by one is done here, as in transformers: ``labels`` are the input ids with -100 on
    prompt and padding.

    Args:
        logits: [B, T, V], of any float dtype; only the N rows that count are taken to float32.
        labels: [B, T], long.  ``labels[:, 0]`` is never predicted.
        normaliser: divides the sum; ``None`` is the number of answer tokens N (1 if there are
            none).  For W ranks or gradient accumulation: the global number of tokens / W.

    Raises:
        ValueError: shapes do not fit.

    Source: METHOD "Stage 2", loss on answer tokens only; Invar-RAG (arXiv 2411.07021), generation
    stage. Siblings: transformers ``ForCausalLMLoss(num_items_in_batch=...)``, torchtune
    ``LinearCrossEntropyLoss``.
    """
    if logits.ndim != 3:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, expected [B, T, V]")
    check_shape("labels", labels, tuple(logits.shape[:2]))
    targets = labels[:, 1:]
    counts = targets != IGNORED  # [B, T-1]
    chosen = at_least_float32(logits[:, :-1][counts])  # [N, V]
    wanted = targets[counts]  # [N]
    tokens = counts.sum()
    total = tokens if normaliser is None else torch.as_tensor(normaliser, device=logits.device)
    by = torch.where(total > 0, total, torch.ones_like(total)).to(chosen.dtype)
    # The sum of nothing is 0 and still has a gradient (of zeros): a rank without answer tokens
    # takes part in backward.
    loss = torch.nn.functional.cross_entropy(chosen, wanted, reduction="sum") / by
    with torch.no_grad():
        accuracy = (chosen.argmax(dim=-1) == wanted).sum().to(chosen.dtype) / by
    return AnswerOutput(loss, tokens, accuracy)
