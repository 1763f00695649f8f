"""Which passages a request may find: as it goes over HTTP, and as it stands in a key's entry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from invar_ray.answering.filters import Where

MOST_COLUMNS, MOST_VALUES, MOST_BEGINNINGS, LONGEST_VALUE = 16, 256, 16, 2048

Column = Annotated[str, Field(min_length=1, max_length=64)]
Value = Annotated[str, Field(max_length=LONGEST_VALUE)]
Values = Value | Annotated[list[Value], Field(min_length=1)]


class Conditions(BaseModel):
    """All conditions hold; of the values of one column any will do.

    Columns are those of the passages: ``document_id``, ``title``, ``uri``, ``place``, and what
    ``corpus.metadata`` took from the corpus (``tenant``, ``language`` ..).  A passage without a
    value meets no condition on it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    equals: dict[Column, Values] = Field(
        default_factory=dict,
        max_length=MOST_COLUMNS,
        description="Column and the value, or values, it may have.",
        examples=[{"tenant": "acme", "document_id": ["d1", "d2"]}],
    )
    starts: dict[Column, Values] = Field(
        default_factory=dict,
        max_length=MOST_COLUMNS,
        description="Column and what its value may begin with.",
        examples=[{"uri": "s3://bucket/acme/"}],
    )
    without: list[Value] = Field(
        default_factory=list,
        description="Ids of passages that are left out, e.g. those seen already.",
    )

    @field_validator("equals", "starts", "without")
    @classmethod
    def _encodable(
        cls, given: Mapping[str, str | list[str]] | list[str]
    ) -> Mapping[str, str | list[str]] | list[str]:
        for text in _texts(given):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise ValueError("half of a surrogate pair, which is no character") from None
        return given

    @model_validator(mode="after")
    def _not_too_many(self) -> Conditions:
        count = sum(len(_texts(each)) for each in (self.equals, self.starts, self.without))
        if count > MOST_VALUES:
            raise ValueError(f"{count} columns and values: at most {MOST_VALUES}")
        beginnings = [
            text
            for value in self.starts.values()
            for text in ([value] if isinstance(value, str) else value)
        ]
        if len(beginnings) > MOST_BEGINNINGS:  # each is a pass over all passages
            raise ValueError(f"starts holds {len(beginnings)} values: at most {MOST_BEGINNINGS}")
        if "" in beginnings:
            raise ValueError("starts holds an empty value, which every passage begins with")
        return self

    def to_where(self) -> Where:
        """As the search takes it."""
        return Where.of(self.equals, self.starts, self.without)

    @staticmethod
    def parse(text: str) -> Conditions:
        """``column=value`` or ``column^=beginning``, joined by ``&``; a column that comes twice may
        have either value.

        Raises:
            ValueError: there is none, or one is neither.
        """
        equals: dict[str, str | list[str]] = {}
        starts: dict[str, str | list[str]] = {}
        for part in text.split("&"):
            name, mark, value = part.partition("=")
            begins = name.endswith("^")
            name = name.removesuffix("^").strip()
            if not mark or not name or not value:
                raise ValueError(
                    f"condition {part[:100]!r}: expected column=value or column^=beginning"
                )
            target = starts if begins else equals
            held = target.get(name, [])
            target[name] = [*([held] if isinstance(held, str) else held), value]
        return Conditions(equals=equals, starts=starts)


def _texts(given: Mapping[str, str | list[str]] | list[str]) -> list[str]:
    if isinstance(given, list):
        return given
    found = list(given)
    for value in given.values():
        found += [value] if isinstance(value, str) else value
    return found
