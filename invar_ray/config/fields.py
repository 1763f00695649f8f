"""What fields of several sections share: types with their constraints, and what pydantic is told.

A constraint stands on its field, so that pydantic finds all faults at once and knows the key of
each.  What each fault says stands in :mod:`invar_ray.config.faults`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, PositiveInt

FORBID = ConfigDict(extra="forbid")
METADATA_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.\-]{0,63}")
"""What a column of metadata may be called."""
PASSAGE_FIELDS = ("id", "document_id", "title", "text", "start", "end", "uri", "place", "metadata")
"""Names that it may not take: those of passages' own fields."""


def _share(value: float) -> float:
    if not 0.0 <= value <= 1.0:
        raise ValueError("must be in [0, 1]")
    return value


def _positive_share(value: float) -> float:
    if not 0.0 < value <= 1.0:
        raise ValueError("must be in (0, 1]")
    return value


def _range(value: tuple[int, int]) -> tuple[int, int]:
    if not 1 <= value[0] <= value[1]:
        raise ValueError("expected [fewest, most] with 1 <= fewest <= most")
    return value


def _no_twice(value: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(value)) < len(value):
        raise ValueError("a name stands twice")
    return value


def _sizes(value: tuple[int, ...]) -> tuple[int, ...]:
    if any(size < 1 for size in value) or len(set(value)) < len(value):
        raise ValueError("expected different sizes of 1 or more")
    return value


def _name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
        raise ValueError("only letters, digits and . _ - (it names folders)")
    return value


def _metadata_name(name: str) -> str:
    if name in PASSAGE_FIELDS:
        raise ValueError("passages have a field of this name, leave it out")
    if not METADATA_NAME.fullmatch(name):
        raise ValueError("is no name (letters, digits and _.-, at most 64, a letter first)")
    return name


def _encoder(value: str) -> str:
    if value not in {"retriever", "base", "minilm", "starter"} and "/" not in value:
        raise ValueError(
            "expected retriever, base, minilm, starter, or the URI of a stage-1 adapter"
        )
    return value


Share = Annotated[float, AfterValidator(_share)]
PositiveShare = Annotated[float, AfterValidator(_positive_share)]
Range = Annotated[tuple[int, int], AfterValidator(_range)]
"""Fewest and most."""
NoneTwice = AfterValidator(_no_twice)
Sizes = Annotated[tuple[int, ...], AfterValidator(_sizes)]
RunName = Annotated[str, AfterValidator(_name)]
MetadataNames = Annotated[
    tuple[Annotated[str, AfterValidator(_metadata_name)], ...], AfterValidator(_no_twice)
]
EncoderName = Annotated[str, AfterValidator(_encoder)]
Workers = PositiveInt | Range
"""A number, or the fewest and the most."""

Mode = Literal["dense", "bm25", "hybrid"]
"""How an index is searched: by the encoder's vectors, by words, or both, their lists fused."""
