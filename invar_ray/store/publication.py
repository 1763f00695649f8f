"""The record of one published version, see :mod:`invar_ray.store.published`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from invar_ray.errors import ArtifactError, CorruptArtifactError

SCHEMA_VERSION = 1
"""Version of the record's own layout."""


@dataclass(frozen=True)
class Version:
    """One record.

    Attributes:
        number: 1, 2, ..; the highest is current.
        action: what the writer did.
        index: refs of the index artifacts below the store's root, one a shard.
        source: number of the record that first published these; its own for ``publish``.
        collected: numbers whose artifacts have been given up so far: nobody can go back to them.
        created: UTC, ISO 8601.
        token: random; tells two writers of one number apart.
        note: for people.
        info: rows, encoder, measured recall, and what the publisher adds.
    """

    number: int
    action: Literal["publish", "rollback", "gc"]
    index: tuple[str, ...]
    source: int
    collected: tuple[int, ...] = ()
    created: str = ""
    token: str = ""
    note: str = ""
    info: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """As it is stored."""
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    @staticmethod
    def from_json(text: str, where: str) -> Version:
        """Parse a record.

        Raises:
            CorruptArtifactError: if the text is none.  ArtifactError: if it has another schema
                version.
        """
        try:
            values = json.loads(text)
            if int(values["schema_version"]) != SCHEMA_VERSION:
                raise ArtifactError(
                    f"{where} has schema version {values['schema_version']}",
                    expected=f"{SCHEMA_VERSION}",
                    action="use the invar_ray release that wrote it",
                )
            version = Version(**values)
            return replace(version, index=tuple(version.index), collected=tuple(version.collected))
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptArtifactError(
                f"{where} is not a version record ({type(error).__name__})",
                action="restore it, or pass over it (invar-ray index-versions mend)",
            ) from error
