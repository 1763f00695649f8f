"""What an artifact is to be (:class:`Plan`) and what it is (:class:`Manifest`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pyarrow import fs

from invar_ray.errors import ArtifactError, CorruptArtifactError
from invar_ray.store.files import sha256

SCHEMA_VERSION = 1
"""Version of the manifest's own layout."""

MANIFEST = "manifest.json"
OTHER_RELEASE = "use the invar_ray release that wrote it, or a newer one"
RUN_AGAIN = "delete that folder and run the step again"


class Fingerprinted(Protocol):
    """A parent, as a plan sees it."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits."""
        ...

    @property
    def ref(self) -> str:
        """Place below the store's root."""
        ...


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def digest(value: Any) -> str:
    """16 hex digits of the SHA-256 of ``value``'s canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Plan:
    """An artifact to be: everything that decides its content.

    Attributes:
        kind: what it is (``passages``, ``vectors``, ``index``, ``adapter``, ...).
        name: for people; not part of the fingerprint.
        config: the science settings of this step, JSON-able.
        parents: the artifacts it is made from, by role.
        version: the step's ``VERSION``.
    """

    kind: str
    name: str
    config: Mapping[str, Any]
    parents: Mapping[str, Fingerprinted] = field(default_factory=dict)
    version: int = 1

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with anything that could change the content."""
        return digest(
            {
                "kind": self.kind,
                "config": self.config,
                "parents": {role: parent.fingerprint for role, parent in self.parents.items()},
                "version": self.version,
            }
        )

    @property
    def ref(self) -> str:
        """Place below the store's root."""
        return f"{self.kind}/{self.name}-{self.fingerprint}"


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` holds.

    Attributes:
        parents: ref of each parent below the same root, by role.
        files: size in bytes and SHA-256 of each file, by path inside the folder.
        info: what the step wants to tell (row counts, dimension, metrics, the encoder's
            description, ...).
        created: UTC, ISO 8601; not part of any fingerprint.
    """

    kind: str
    name: str
    fingerprint: str
    version: int
    config: dict[str, Any]
    parents: dict[str, str]
    files: dict[str, dict[str, Any]]
    info: dict[str, Any]
    created: str
    schema_version: int = SCHEMA_VERSION

    @staticmethod
    def from_json(text: str, where: str) -> Manifest:
        """Parse.

        Raises:
            CorruptArtifactError: if the text is no manifest.
            ArtifactError: if it has another schema version than this release's.
        """
        try:
            values = json.loads(text)
            version = int(values["schema_version"])
            if version != SCHEMA_VERSION:
                raise ArtifactError(
                    f"{where}: manifest has schema version {version}",
                    expected=f"{SCHEMA_VERSION}",
                    action=OTHER_RELEASE if version > SCHEMA_VERSION else RUN_AGAIN,
                )
            return Manifest(**values)
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptArtifactError(
                f"{where}: manifest.json is not a manifest ({type(error).__name__}: {error})",
                action=RUN_AGAIN,
            ) from error


def check_files(
    prefix: str, filesystem: fs.FileSystem, manifest: Manifest, contents: bool, shown: str
) -> None:
    """Compare the files below ``prefix`` with the manifest: sizes, and SHA-256 where ``contents``.

    Raises:
        CorruptArtifactError: naming up to five files that are missing or differ; ``shown`` is the
            place it names.
    """
    faults = []
    for name, entry in sorted(manifest.files.items()):
        path = f"{prefix}/{name}"
        found = filesystem.get_file_info(path)
        if found.type != fs.FileType.File:
            faults.append(f"{name} is missing")
        elif found.size != entry["bytes"]:
            faults.append(f"{name} has {found.size} bytes instead of {entry['bytes']}")
        elif contents and sha256(filesystem, path) != entry["sha256"]:
            faults.append(f"the content of {name} differs from its recorded sha256")
    if faults:
        raise CorruptArtifactError(
            f"{shown} is damaged: {'; '.join(faults[:5])}"
            + (f"; and {len(faults) - 5} more" if faults[5:] else ""),
            action=f"delete that folder and run the step that makes it (kind {manifest.kind!r}) "
            "again",
        )
