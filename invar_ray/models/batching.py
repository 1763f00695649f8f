"""Rows of token ids in, vectors out: padding, batches by token budget, order kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Vectors = npt.NDArray[np.float32]


def pad_right(rows: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """[N, T] ids and mask (1 = token) from rows of unequal length."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[index, : len(row)] = 1
    return ids, mask


def length_batches(lengths: Sequence[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Positions grouped by length, longest first, so that rows x longest stays within the budget (one row at least)."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    start = 0
    while start < len(order):
        count = max(1, tokens_per_batch // max(1, lengths[order[start]]))
        yield order[start : start + count]
        start += count


def packs(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Positions in groups whose lengths add up to at most ``capacity`` (a longer one is alone): first fit, longest
    first, as in bin packing.
    """
    found: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        place = next((number for number, left in enumerate(room) if left >= lengths[index]), None)
        if place is None:
            found.append([])
            room.append(max(capacity, lengths[index]))
            place = len(found) - 1
        found[place].append(index)
        room[place] -= lengths[index]
    return found


@torch.inference_mode()
def encode_in_batches(
    ids: list[list[int]], forward: Callable[[list[list[int]]], Tensor], dimension: int, tokens_per_batch: int
) -> Vectors:
    """Encode rows of token ids batch by batch, longest first, and put the vectors back in order: [N, D] float32."""
    vectors = np.zeros((len(ids), dimension), dtype=np.float32)
    for batch in length_batches([len(row) for row in ids], tokens_per_batch):
        vectors[batch] = forward([ids[index] for index in batch]).float().cpu().numpy()
    return vectors
