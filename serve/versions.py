"""Which index a service serves: the one that it was deployed with, until a newer version is
published.

The versions are those of :class:`invar_ray.store.published.Published`, which the command line and
the nightly job write as well.  What counts as newer has to be the same for every replica, whenever
it starts: the number that was current when the service first ran with its index is kept beside the
versions, written once::

    <root>/published/<name>/deployed/<digest of the index>.json
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

from invar_ray.errors import (
    ArtifactError,
    ConflictError,
    CorruptArtifactError,
    InvarError,
    MissingArtifactError,
    RequestError,
)
from invar_ray.store import conditional
from invar_ray.store.artifacts import open_artifact, split_uri
from invar_ray.store.files import join_uri, resolve_uri
from invar_ray.store.manifest import digest
from invar_ray.store.publication import Version
from invar_ray.store.published import FOLDER, Published, open_published
from serve.errors import plain

logger = logging.getLogger("ray.serve")
FIXED = sys.maxsize
"""A ``since`` that no version is newer than: the store cannot be written, the index stays."""

_REF = re.compile(r"[a-z_]+/[A-Za-z0-9][A-Za-z0-9._-]*")
_KEPT = 20  # earlier versions that are shown


@dataclass(frozen=True, slots=True)
class Newest:
    """The newest version.

    Attributes:
        version: its record; a collection's record repeats the index that is current.
        decided: number of the record that made this index current.
        index: index URIs, one a shard.
    """

    version: Version
    decided: int
    index: tuple[str, ...]


class Current:
    """The published versions as a service uses them.

    Args:
        uri: ``<root>/published/<name>``; all replicas must reach it.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._records: dict[int, Version] = {}  # records never change

    @cached_property
    def _published(self) -> Published:
        return open_published(self.uri)

    def own(self, uri: str) -> str:
        """The URI of an index of this store as the store writes it, its options included; nothing
        is read.

        Raises:
            RequestError: it lies elsewhere, or brings options or credentials: with those a caller
                could have replicas ask a server of the caller's choice.
        """
        base, _, options = self.uri.partition("?")
        root = base.rpartition(f"/{FOLDER}/")[0]
        expected = f"{plain(root)}/index/<name>-<fingerprint>"
        if "://" in uri and plain(uri) != uri:
            raise RequestError(
                "index_uri has options or credentials",
                expected=expected,
                action="leave them out: those of the deployment are used",
            )
        try:
            given_root, ref = split_uri(uri)
        except (InvarError, ValueError):
            given_root, ref = "", ""
        if given_root != plain(root) or not _REF.fullmatch(ref):
            raise RequestError(
                "the index does not lie in the store that is served",
                expected=expected,
                action="build it there, or deploy the service with its store",
            )
        return join_uri(f"{root}?{options}" if options else root, ref)

    def newest(self) -> Newest | None:
        """What is current, or ``None`` where nothing has been published.

        Raises:
            ArtifactError: if the store cannot be read, or a record is damaged.
        """
        version = record = self._published.current()
        if version is None or record is None:
            return None
        try:
            while record.action == "gc":
                record = self._record(record.number - 1)
        except (CorruptArtifactError, MissingArtifactError):
            pass  # its own number is as good
        return Newest(version, record.number, self._published.uris(version))

    def earlier(self, newest: Newest) -> list[tuple[Version, tuple[str, ...]]]:
        """Versions that one can go back to, with their index URIs, newest first.

        Raises:
            ArtifactError: as :meth:`newest`.
        """
        found: list[tuple[Version, tuple[str, ...]]] = []
        for number in range(newest.version.source - 1, 0, -1):
            try:
                record = self._record(number)
            except (CorruptArtifactError, MissingArtifactError):  # see Published.mend
                continue
            if record.action == "publish" and number not in newest.version.collected:
                found.append((record, self._published.uris(record)))
            if len(found) == _KEPT:
                break
        return found

    def since(self, configured: Sequence[str]) -> int:
        """Number of the version that was current when a service first ran with this index (0:
        none): only newer ones are served in its place.

        Args:
            configured: index URIs as deployed, one a shard.

        Returns:
            The number, or :data:`FIXED` where it could not be written down.

        Raises:
            ArtifactError: if the store cannot be read, or the file is damaged.
        """
        refs = ["/".join(urlsplit(uri).path.rstrip("/").split("/")[-2:]) for uri in configured]
        ref = f"{self._published.ref}/deployed/{digest(refs)}.json"
        uri = join_uri(self._published.store.root_uri, ref)
        known = _number(uri)
        if known is not None:
            return known
        newest = self._published.current()
        number = newest.number if newest else 0
        values = {
            "number": number,
            "index": refs,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "token": uuid.uuid4().hex,
        }
        try:
            if conditional.create_if_absent(uri, json.dumps(values, indent=1).encode()):
                return number
        except (InvarError, OSError) as error:
            logger.warning(
                "%s cannot be written, so published versions do not count: %s",
                plain(uri),
                plain(str(error)),
            )
            return FIXED
        known = _number(uri)  # another replica was faster
        return number if known is None else known

    def write_change(self, name: str, values: dict[str, Any]) -> None:
        """Write the state of a change of the index, see :mod:`serve.changes`.

        Raises:
            ArtifactError: if the store cannot be written.
        """
        uri = join_uri(self._published.store.root_uri, f"{self._published.ref}/changes/{name}")
        conditional.replace(uri, lambda: json.dumps(values).encode())

    def read_change(self, name: str) -> dict[str, Any] | None:
        """What :meth:`write_change` wrote; ``None`` where nothing is.

        Raises:
            OSError, ValueError: it cannot be read.
        """
        uri = join_uri(self._published.store.root_uri, f"{self._published.ref}/changes/{name}")
        filesystem, path = resolve_uri(uri)
        try:
            with filesystem.open_input_stream(path) as stream:
                values: dict[str, Any] = json.loads(stream.read())
                return values
        except (FileNotFoundError, NotADirectoryError):
            return None

    def publish(
        self, index: Sequence[str], expected: int, served: Sequence[str] | None = None
    ) -> None:
        """Make an index current that every replica has ready.

        Args:
            index: its URIs, one a shard, of this store.
            expected: number of the newest version that the change was made against (0: none).
            served: the index that is served without having been published: it is published first,
                so that one can go back to it.

        Raises:
            ConflictError: if another writer was faster.
            ArtifactError: if the index cannot be published, or the store cannot be written.
        """
        if served is not None:
            expected = self._publish_served(served, expected)
        artifacts = [open_artifact(uri, "index") for uri in index]
        # The replicas have compared checksums when they loaded it.
        self._published.publish(artifacts, expected=expected, verify=False)

    def mend(self) -> bool:
        """Pass over a damaged newest record; whether there was one.

        Raises:
            ConflictError: if another writer was faster.
            ArtifactError: if no record can be read, or the store cannot be written.
        """
        return self._published.mend() is not None

    def rollback(self, to: int, expected: int) -> None:
        """Make an earlier version current again.

        Raises:
            ConflictError: if another writer was faster.
            ArtifactError: if it has been collected, or the store cannot be written.
        """
        self._published.rollback(to, expected=expected)

    def _publish_served(self, served: Sequence[str], expected: int) -> int:
        try:
            artifacts = [open_artifact(uri, "index") for uri in served]
            note = "served as deployed"
            return self._published.publish(
                artifacts, expected=expected, note=note, verify=False
            ).number
        except ConflictError:
            raise
        except ArtifactError as error:
            logger.warning(
                "nobody can go back to %s later: %s", plain(",".join(served)), plain(str(error))
            )
            return expected

    def _record(self, number: int) -> Version:
        if number not in self._records:
            self._records[number] = self._published.read(number)
        return self._records[number]


def _number(uri: str) -> int | None:
    filesystem, path = resolve_uri(uri)
    try:
        with filesystem.open_input_stream(path) as stream:
            return int(json.loads(stream.read())["number"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ArtifactError(
            f"cannot read {uri} ({error})", action="check the bucket, the credentials, the network"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptArtifactError(
            f"{uri} is damaged ({type(error).__name__})",
            expected="the number of the version that was current at deployment",
            action="remove it: the next replica writes it anew",
        ) from error
