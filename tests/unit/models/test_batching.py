"""Rows of unequal length: grouped, encoded, put back in order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from invar_ray.models.batching import by_length, pad_right

ROWS = [[1, 2], [3, 4, 5, 6, 7], [8], [9, 10, 11, 12], [13, 14]]


class Summing:
    """Encodes a row as (sum of its tokens, their number); notes the shapes that it was given."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        self.shapes.append(tuple(ids.shape))
        return torch.stack([(ids * mask).sum(1), mask.sum(1)], dim=1).float()


@pytest.mark.parametrize(
    ("rows_per_part", "shapes"),
    [(2, [(2, 5), (2, 2), (1, 1)]), (3, [(3, 5), (2, 2)]), (9, [(5, 5)])],
)
def test_rows_of_like_length_are_encoded_together_and_come_back_in_order(
    rows_per_part: int, shapes: list[tuple[int, int]]
) -> None:
    encode = Summing()
    found = by_length(encode, rows_per_part)(*pad_right(ROWS, pad_id=0))
    assert encode.shapes == shapes
    assert found.tolist() == [[sum(row), len(row)] for row in ROWS]


def test_gradients_are_those_of_one_part() -> None:
    ids, mask = pad_right(ROWS, pad_id=0)
    table = torch.randn(20, 3, dtype=torch.float64, requires_grad=True)

    def encode(ids: Tensor, mask: Tensor) -> Tensor:
        return (table[ids] * mask[..., None]).sum(1).tanh()

    weights = torch.randn(len(ROWS), 3, dtype=torch.float64)
    gradients = []
    for rows_per_part in (len(ROWS), 2):
        table.grad = None
        (by_length(encode, rows_per_part)(ids, mask) * weights).sum().backward()
        assert table.grad is not None
        gradients.append(table.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)
