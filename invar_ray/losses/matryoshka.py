"""Losses at several sizes of the same vectors (Matryoshka).  Shape legend: D embedding size, S <= D
a smaller one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from invar_ray.losses.reduce import at_least_float32


def unit_prefix(vectors: Tensor, size: int) -> Tensor:
    """The first ``size`` values of each vector, at unit norm.

    Args:
        vectors: [..., D].
        size: S, in 1 .. D.

    Returns:
        [..., S], unit rows, differentiable; ``vectors`` itself for S = D, bit for bit.

    Raises:
        ValueError: the size does not fit.
    """
    width = vectors.shape[-1]
    if not 1 <= size <= width:
        raise ValueError(f"size: got {size}, expected 1 to {width}, the size of the vectors")
    return (
        vectors
        if size == width
        else functional.normalize(at_least_float32(vectors[..., :size]), dim=-1)
    )


def size_weights(
    full: int, sizes: Sequence[int], weights: Sequence[float] = ()
) -> dict[int, float]:
    """What each size counts, the full size first; the weights sum to 1.

    Args:
        full: D.
        sizes: different ones, in 1 .. D.  D is always among the result's; where it is not listed,
            it counts as 1.
        weights: one for each of ``sizes``, above 0; none is 1 for all.

    Raises:
        ValueError: a size is larger than D, or there are more or fewer weights than sizes.
    """
    if weights and len(weights) != len(sizes):
        raise ValueError(
            f"weights: got {len(weights)}, expected one for each of {len(sizes)} sizes"
        )
    too_large = [size for size in sizes if not 1 <= size <= full]
    if too_large:
        raise ValueError(f"sizes: got {too_large}, expected 1 to {full}, the size of the vectors")
    given = {full: 1.0} | dict(zip(sizes, weights or [1.0] * len(sizes), strict=True))
    total = sum(given.values())
    return {size: weight / total for size, weight in given.items()}


def matryoshka_loss(losses: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted mean of one objective's values at several sizes.

    Formula::

        x^S = (x_1 .. x_S) / |(x_1 .. x_S)|
        L = sum_S w_S L(cosines of x^S) / sum_S w_S

    where L(.) is the whole objective of the stage: the patterns and the consensus of the invariance
    loss, too, come from the cosines of that size, since that is what a cut index ranks by.  Masks,
    teacher and schedules do not depend on S.

    Args:
        losses: scalars, one for each size.
        weights: w_S, at least 0, not all 0.

    Returns:
        Scalar, in the unit of ``losses``.

    Raises:
        ValueError: the numbers of losses and weights differ, or there are none.

    Source: Kusupati et al., "Matryoshka Representation Learning", arXiv 2205.13147, equation 1
    (there a sum, with weights of 1).  Deviations: [ours] the mean in place of the sum, so that the
    learning rate keeps its meaning; the alignment and invariance losses at every size.  Siblings:
    sentence-transformers ``MatryoshkaLoss``.
    """
    if len(losses) != len(weights) or not losses:
        raise ValueError(
            f"losses: got {len(losses)} for {len(weights)} weights, expected as many, and one at "
            "least"
        )
    if len(losses) == 1:
        return losses[0]
    by = torch.as_tensor(weights, dtype=losses[0].dtype, device=losses[0].device)
    return (torch.stack(list(losses)) * by).sum() / by.sum()
