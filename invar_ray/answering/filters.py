"""Which passages a search may find: conditions on the columns of the passages table (source, title,
tenant ..).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from invar_ray.errors import RequestError

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Where:
    """All conditions hold.

    Attributes:
        equals: column -> allowed values, e.g. ``{"tenant": ("a",), "document_id": ("d1", "d2")}``.
        starts: column -> allowed beginnings, e.g. ``{"uri": ("s3://bucket/tenant-a/",)}``.
        without: passage ids that are left out (tombstones, passages that the caller has already).
    """

    equals: tuple[tuple[str, tuple[str, ...]], ...] = ()
    starts: tuple[tuple[str, tuple[str, ...]], ...] = ()
    without: frozenset[str] = frozenset()

    @staticmethod
    def of(
        equals: Mapping[str, str | Sequence[str]] | None = None,
        starts: Mapping[str, str | Sequence[str]] | None = None,
        without: Sequence[str] = (),
    ) -> Where:
        """From plain mappings; a single value may stand for a sequence of one."""
        return Where(_pairs(equals), _pairs(starts), frozenset(without))

    def __bool__(self) -> bool:
        """Whether it asks for anything at all."""
        return bool(self.equals or self.starts or self.without)

    def also(self, other: Where) -> Where:
        """The conditions of both: a passage has to meet all of them, also where both name one
        column.
        """
        equals = tuple(sorted({*self.equals, *other.equals}))
        return Where(
            equals, tuple(sorted({*self.starts, *other.starts})), self.without | other.without
        )


def allowed_rows(table: pa.Table, where: Where) -> Mask:
    """[N] True for the rows of a passages table that meet all conditions; a missing value meets
    none.

    Raises:
        RequestError: if the table has no such column, or its values are no texts.
    """
    mask = np.ones(table.num_rows, dtype=bool)
    for column, values in where.equals:
        mask &= _numpy(pc.is_in(_column(table, column), value_set=pa.array(values, pa.string())))
    for column, beginnings in where.starts:
        texts = _column(table, column)
        found = np.zeros(table.num_rows, dtype=bool)
        for beginning in beginnings:
            found |= _numpy(pc.starts_with(texts, beginning))
        mask &= found
    if where.without:
        mask &= ~_numpy(
            pc.is_in(_column(table, "id"), value_set=pa.array(sorted(where.without), pa.string()))
        )
    return mask


def _pairs(
    given: Mapping[str, str | Sequence[str]] | None,
) -> tuple[tuple[str, tuple[str, ...]], ...]:
    values = {
        name: (value,) if isinstance(value, str) else tuple(value)
        for name, value in (given or {}).items()
    }
    return tuple(sorted(values.items()))


def _column(table: pa.Table, name: str) -> pa.ChunkedArray:
    texts = {
        field.name
        for field in table.schema
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
    }
    if name not in texts:
        raise RequestError(
            f"passages have no text column {name!r}", expected=f"one of {', '.join(sorted(texts))}"
        )
    return table.column(name)


def _numpy(found: pa.ChunkedArray) -> Mask:
    filled = pc.fill_null(found, False)
    return np.asarray(
        filled.to_numpy(zero_copy_only=False)
        if isinstance(filled, pa.Array)
        else filled.to_numpy(),
        bool,
    )
