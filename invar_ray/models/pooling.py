"""From token states to one vector.

Shape legend: N texts, T tokens, H hidden size.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Pooling = Literal["last", "mean", "cls"]


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """One vector per text.

    Args:
        hidden: [N, T, H] token states; padding may stand on either side.
        mask: [N, T], 1 for tokens, 0 for padding.  Every row needs at least one token.
        pooling: ``last`` takes the last token's state (the end token's, METHOD "Bi-encoder"),
            ``mean`` the mean of all, ``cls`` the first token's (BERT's ``[CLS]``).

    Returns:
        [N, H], in the dtype of ``hidden``; not normalised.
    """
    if pooling == "last":
        positions = torch.arange(mask.shape[1], device=mask.device)
        last = (mask.long() * (positions + 1)).argmax(dim=1)  # [N]
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
    if pooling == "cls":
        first = mask.long().argmax(dim=1)  # [N]
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), first]
    weights = mask.to(hidden.dtype).unsqueeze(-1)  # [N, T, 1]
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)
