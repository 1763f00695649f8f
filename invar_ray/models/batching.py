"""Rows of token ids in, vectors out: padding, batches by token budget, order kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from invar_ray.errors import ModelError, ResourceError

Vectors = npt.NDArray[np.float32]
DEFAULT_TOKENS_PER_BATCH = 8192
Row = TypeVar("Row", bound=Sized)


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
    """Positions grouped by length, longest first, so that rows x longest stays within the budget
    (one row at least).
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    start = 0
    while start < len(order):
        count = max(1, tokens_per_batch // max(1, lengths[order[start]]))
        yield order[start : start + count]
        start += count


def by_length(
    encode: Callable[[Tensor, Tensor], Tensor], rows_per_part: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """``encode`` ([n, T] ids, [n, T] mask -> [n, D]) over rows of like length, each part without
    the columns that are padding in all of it; the vectors in the rows' order.

    The number of parts follows from the number of rows alone: ranks with equally many rows call
    ``encode`` equally often.
    """

    def encode_parts(ids: Tensor, mask: Tensor) -> Tensor:
        lengths = mask.sum(dim=1)
        order = lengths.argsort(descending=True, stable=True)
        parts = []
        for rows in order.split(rows_per_part):
            width = int(lengths[rows[0]])
            parts.append(encode(ids[rows, :width], mask[rows, :width]))
        return torch.cat(parts)[order.argsort().to(parts[0].device)]

    return encode_parts


def packs(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Positions in groups whose lengths add up to at most ``capacity`` (a longer one is alone):
    first fit, longest first, as in bin packing.
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


@dataclass
class EncodeStats:
    """What encoding did so far.

    Attributes:
        texts: rows encoded.
        tokens: of these, without padding.
        slots: places in the batches, padding included.
        halvings: how often a batch did not fit into memory and was taken in halves.
    """

    texts: int = 0
    tokens: int = 0
    slots: int = 0
    halvings: int = 0

    @property
    def padding_share(self) -> float:
        """Share of the places that held padding."""
        return 1.0 - self.tokens / self.slots if self.slots else 0.0


@torch.inference_mode()
def encode_in_batches(
    ids: Sequence[Row],
    forward: Callable[[list[Row]], Tensor],
    dimension: int,
    tokens_per_batch: int,
    stats: EncodeStats | None = None,
) -> Vectors:
    """Encode rows of token ids batch by batch, longest first, and put the vectors back in order:
    [N, D] float32.

    Where a batch does not fit into memory, the budget is halved for it and for the rest of these
    rows.  The next call starts with the whole budget again, so that its batches do not depend on
    what was encoded before.

    Raises:
        ResourceError: a row alone does not fit.
    """
    stats = stats or EncodeStats()
    vectors = np.zeros((len(ids), dimension), dtype=np.float32)
    order = sorted(range(len(ids)), key=lambda index: (-len(ids[index]), index))
    start = 0
    while start < len(order):
        widest = max(1, len(ids[order[start]]))
        batch = order[start : start + max(1, tokens_per_batch // widest)]
        try:
            found = forward([ids[index] for index in batch])
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise ResourceError(
                    f"a text of {widest} tokens does not fit into memory",
                    action="set model.passage_max_tokens lower, give the actor more of a GPU, or "
                    "use fewer actors",
                ) from error
            found = None  # leave the handler first: the traceback holds on to the tensors
        if found is None:
            stats.halvings += 1
            tokens_per_batch = widest * (len(batch) // 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        vectors[batch] = found.float().cpu().numpy()
        stats.texts += len(batch)
        stats.tokens += sum(len(ids[index]) for index in batch)
        stats.slots += widest * len(batch)
        start += len(batch)
    return vectors


def refuse_not_finite(vectors: npt.NDArray[Any], names: Sequence[str]) -> None:
    """Refuse vectors with a value that is NaN or infinite: searches would lose them in silence, or
    find them for every question.

    Args:
        vectors: [N, D].
        names: what each row is the vector of, for the message.

    Raises:
        ModelError: naming how many, and the first.
    """
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise ModelError(
            f"{len(bad)} of {len(vectors)} vectors are not finite (first: {names[int(bad[0])]})",
            expected="finite numbers",
            action="look at the model's weights; set model.precision=fp32 if it is bf16",
        )


def _is_out_of_memory(error: BaseException) -> bool:
    # On CPUs torch raises a plain RuntimeError.
    return isinstance(
        error, (torch.OutOfMemoryError, MemoryError)
    ) or "can't allocate memory" in str(error)
