"""Published versions: which index is served now, what was before, and how to go back.

::

    <root>/published/<name>/versions/00000001.json ..   one record a version, never changed
    <root>/published/<name>/CURRENT                     index URIs of the newest one, a line each

The highest record is what counts.  A record is created only if its number is free
(:mod:`invar_ray.store.conditional`), so that of two writers who start from one state exactly one
wins; publishing, going back and collecting garbage all take a number, and so never overlap.  A
record names all shards of an index: a reader of it cannot see a mixture.  ``CURRENT`` is for those
who can read a file but not a log; it is written right after the record and repaired by the next
writer.

A record is a :class:`~invar_ray.store.publication.Version`.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pyarrow import fs

from invar_ray.errors import (
    ArtifactError,
    ConflictError,
    CorruptArtifactError,
    IncompleteArtifactError,
    MissingArtifactError,
    MixedArtifactsError,
)
from invar_ray.store import conditional
from invar_ray.store.artifacts import Artifact, Store
from invar_ray.store.files import join_uri
from invar_ray.store.manifest import digest
from invar_ray.store.publication import Version

FOLDER = "published"
CURRENT = "CURRENT"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PLACE = re.compile(rf"(.+)/{FOLDER}/([^/]+)/?")
_HEADER = re.compile(r"# version (\d+)\b")


class Published:
    """The published versions of one index in a store.

    Args:
        store: where index artifacts and records lie.
        name: of the index, for stores that serve several.

    Raises:
        ArtifactError: if the name cannot be a folder's.
    """

    def __init__(self, store: Store, name: str = "main") -> None:
        if not _NAME.fullmatch(name):
            raise ArtifactError(
                f"{name!r} cannot name an index", expected="letters, digits and . _ -"
            )
        self.store, self.name = store, name
        self.ref = f"{FOLDER}/{name}"
        self.uri = join_uri(store.root_uri, self.ref)

    # Reading

    def current(self) -> Version | None:
        """The newest version, or ``None`` where nothing has been published.

        Raises:
            ArtifactError: if the store cannot be read or the record is damaged.
        """
        # Writers leave no gaps and delete no record: looking upwards from a number that was current
        # is enough.
        number = self._hint() or max(self._numbers(), default=0)
        if number == 0:
            return None
        newest = self._try(number)
        while (above := self._try(number + 1)) is not None:
            number, newest = number + 1, above
        if isinstance(newest, CorruptArtifactError):  # below a whole one it would not matter
            raise newest
        if newest is None:
            raise CorruptArtifactError(
                f"{self.uri}/{CURRENT} names version {number}, which is gone"
            )
        return newest

    def need(self) -> Version:
        """The current version.

        Raises:
            MissingArtifactError: if nothing has been published.
        """
        newest = self.current()
        if newest is None:
            raise MissingArtifactError(
                f"nothing has been published at {self.uri}",
                action="run invar-ray index-versions publish INDEX",
            )
        return newest

    def read(self, number: int) -> Version:
        """One version by its number.

        Raises:
            MissingArtifactError: if there is none.
        """
        found = self._read(number)
        if found is None:
            raise MissingArtifactError(
                f"{self.uri} has no version {number}", action="see invar-ray index-versions list"
            )
        return found

    def history(self) -> list[Version]:
        """All versions, oldest first; without damaged ones that :meth:`mend` has passed over.

        Raises:
            CorruptArtifactError: the newest record is damaged.
        """
        numbers = sorted(self._numbers())
        if numbers:
            self.read(numbers[-1])
        tried = [self._try(number) for number in numbers]
        return [version for version in tried if isinstance(version, Version)]

    def open(self, version: Version | None = None) -> list[Artifact]:
        """The index artifacts of a version (the current one unless given), one a shard.

        Raises:
            MissingArtifactError: if nothing has been published, or the artifacts have been
                collected.
        """
        version = version or self.need()
        return [self.store.open(ref, "index") for ref in version.index]

    def uris(self, version: Version | None = None) -> tuple[str, ...]:
        """URI of each shard of a version, the current one unless given."""
        return tuple(join_uri(self.store.root_uri, ref) for ref in (version or self.need()).index)

    def kept(self, newest: Version) -> list[int]:
        """Numbers of the publications that one can go back to, ascending; ``newest`` is the current
        version.
        """
        published = [record.number for record in self.history() if record.action == "publish"]
        return [number for number in published if number not in newest.collected]

    # Writing

    def publish(
        self,
        indexes: Sequence[Artifact],
        *,
        expected: int | None = None,
        note: str = "",
        info: Mapping[str, Any] | None = None,
        verify: bool = True,
    ) -> Version:
        """Make these index artifacts (one a shard) the current version; what is current already
        stays as it is.

        Args:
            indexes: artifacts of kind ``index`` of this store, all of one encoder.
            expected: number of the version that this one was made against (0: none).  Pass it where
                the work took time: without it only writers that overlap within this call exclude
                each other.
            note: for people.
            info: more facts for the record.
            verify: read every file and compare checksums before.

        Raises:
            ConflictError: if another writer published meanwhile.
            MixedArtifactsError: if the indexes are of several stores or encoders.
            CorruptArtifactError: if one is damaged.
            ArtifactError: if one did not reach its recall target.
        """
        facts = self._check(indexes, verify) | dict(info or {})
        newest = self.current()
        refs = tuple(artifact.ref for artifact in indexes)
        if newest is not None and newest.index == refs and expected in {None, newest.number}:
            self._point()
            return newest
        version = self.commit(newest, expected, "publish", refs, note=note, info=facts)
        self.open(version)  # a collection that began before may have removed them
        return version

    def rollback(
        self, to: int | None = None, *, expected: int | None = None, note: str = ""
    ) -> Version:
        """Serve an earlier version again, as a new record.

        Args:
            to: its number; without it the one that was published before what is current.
            expected: see :meth:`publish`.

        Raises:
            ConflictError: if another writer was faster.
            MissingArtifactError: if there is no such version, or its artifacts have been collected.
        """
        newest = self.need()
        if to is None:
            earlier = [n for n in self.kept(newest) if n < newest.source]
            if not earlier:
                raise MissingArtifactError(
                    f"{self.uri}: there is no version before {newest.source} to go back to",
                    action="name one with its number, or publish another index",
                )
            to = max(earlier)
        target = self.read(self.read(to).source)
        if target.number in newest.collected:
            raise MissingArtifactError(
                f"version {to} of {self.uri} has been collected: its artifacts are gone",
                expected=f"one of {', '.join(map(str, self.kept(newest))) or 'none'}",
            )
        self.open(target)
        return self.commit(
            newest,
            expected,
            "rollback",
            target.index,
            source=target.number,
            note=note,
            info=target.info,
        )

    def mend(self) -> Version | None:
        """Pass over a newest record that is damaged or gone: the newest that can be read, and whose
        artifacts are there, is made current again, as a record above it.  Nothing is removed.

        Returns:
            The new version; ``None`` where nothing is damaged.

        Raises:
            CorruptArtifactError: there is no such record.
            ConflictError: if another writer was faster.
        """
        try:
            self.current()
            return None
        except CorruptArtifactError as error:
            damage = error
        numbers = sorted(self._numbers(), reverse=True)
        highest = max([self._hint(), *numbers])
        whole = [v for n in numbers if isinstance(v := self._try(n), Version)]
        if whole and whole[0].number == highest:  # somebody else has mended it meanwhile
            return None
        # The damaged record may have been one of a collection.
        gone = {v.number for v in whole if v.action == "publish" and not self._is_there(v)}
        found = next((version for version in whole if version.source not in gone), None)
        if found is None:
            raise damage
        return self.commit(
            found,
            None,
            "rollback",
            found.index,
            source=found.source,
            collected=tuple(sorted({*found.collected, *gone})),
            note=f"version {highest} is damaged or gone",
            info=found.info,
            above=highest,
        )

    def _is_there(self, version: Version) -> bool:
        try:
            self.open(version)
        except (MissingArtifactError, IncompleteArtifactError):  # not: the store does not answer
            return False
        return True

    def commit(
        self,
        newest: Version | None,
        expected: int | None,
        action: Literal["publish", "rollback", "gc"],
        index: tuple[str, ...],
        *,
        source: int | None = None,
        collected: tuple[int, ...] | None = None,
        note: str = "",
        info: Mapping[str, Any] | None = None,
        above: int | None = None,
    ) -> Version:
        """Write the record after ``newest``, or after the number ``above``; for :meth:`publish`,
        :meth:`rollback`, :meth:`mend` and :mod:`invar_ray.store.garbage`.

        Raises:
            ConflictError: if another writer has that number.
        """
        found = newest.number if newest else 0
        if expected is not None and expected != found:
            raise _conflict(self.uri, f"is at version {found}, not at {expected}", newest)
        number = (found if above is None else above) + 1
        version = Version(
            number,
            action,
            index,
            source or number,
            collected if collected is not None else (newest.collected if newest else ()),
            time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            uuid.uuid4().hex,
            note,
            json.loads(json.dumps(dict(info or {}))),
        )
        if not conditional.create_if_absent(self._record_uri(number), version.to_json().encode()):
            raise _conflict(
                self.uri,
                f"got version {number} from another writer in this moment",
                self._read(number),
            )
        self._point()
        return version

    # Inner parts

    def _point(self) -> None:
        conditional.replace(join_uri(self.store.root_uri, f"{self.ref}/{CURRENT}"), self._pointer)

    def _pointer(self) -> bytes:
        version = self.need()
        head = (
            f"# version {version.number} of {self.name}; written by invar_ray, changed by "
            "publishing only\n"
        )
        return (head + "".join(f"{uri}\n" for uri in self.uris(version))).encode()

    def _check(self, indexes: Sequence[Artifact], verify: bool) -> dict[str, Any]:
        if not indexes:
            raise ArtifactError(
                "no index to publish", expected="at least one artifact of kind index"
            )
        encoders: dict[str, str] = {}
        for artifact in indexes:
            if artifact.manifest.kind != "index":
                raise ArtifactError(
                    f"{artifact.uri} is of kind {artifact.manifest.kind!r}", expected="kind 'index'"
                )
            if artifact.store.root_uri != self.store.root_uri:
                raise MixedArtifactsError(
                    f"{artifact.uri} is not below {self.store.root_uri}",
                    action="publish in the store that holds it",
                )
            encoders.setdefault(digest(artifact.info.get("encoder")), artifact.uri)
            recall, target = artifact.info.get("recall_at_10"), artifact.info.get("recall_target")
            if recall is not None and target is not None and recall < target:
                raise ArtifactError(
                    f"{artifact.uri} has recall@10 {recall:.3f} against exact search",
                    expected=f"{target:.3f} or more (index.recall_target)",
                    action="build it with more memory or latency, or another factory",
                )
        if len(encoders) > 1:
            raise MixedArtifactsError(
                f"the shards belong to {len(encoders)} encoders: {', '.join(encoders.values())}",
                action="reindex all shards with one encoder (python -m jobs.reindex)",
            )
        if len({artifact.ref for artifact in indexes}) < len(indexes):
            raise MixedArtifactsError(
                "a shard is named twice", expected="different index artifacts"
            )
        if verify:
            for artifact in indexes:
                artifact.verify()
        rows = [artifact.info.get("rows") for artifact in indexes]
        return {
            "rows": sum(rows) if all(isinstance(count, int) for count in rows) else None,
            "fingerprints": [artifact.fingerprint for artifact in indexes],
            "encoder": next(iter(encoders)),
        }

    def _record_uri(self, number: int) -> str:
        return join_uri(self.store.root_uri, f"{self.ref}/versions/{number:08d}.json")

    def _numbers(self) -> list[int]:
        selector = fs.FileSelector(
            self.store.location(f"{self.ref}/versions"), allow_not_found=True
        )
        names = [entry.base_name for entry in self.store.filesystem.get_file_info(selector)]
        return [int(name[:-5]) for name in names if re.fullmatch(r"\d+\.json", name)]

    def _hint(self) -> int:
        text = self._text(f"{self.ref}/{CURRENT}")
        found = _HEADER.match(text or "")
        return int(found.group(1)) if found else 0

    def _read(self, number: int) -> Version | None:
        ref = f"{self.ref}/versions/{number:08d}.json"
        text = self._text(ref)
        if text is None:
            return None
        return Version.from_json(text, join_uri(self.store.root_uri, ref))

    def _try(self, number: int) -> Version | CorruptArtifactError | None:
        try:
            return self._read(number)
        except CorruptArtifactError as error:
            return error

    def _text(self, ref: str) -> str | None:
        try:
            with self.store.filesystem.open_input_file(self.store.location(ref)) as stream:
                return str(stream.read().decode(errors="replace"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise ArtifactError(
                f"cannot read {join_uri(self.store.root_uri, ref)} ({error})",
                action="check the bucket, the credentials and the network",
            ) from error


def is_published(uri: str) -> bool:
    """Whether a URI has the form ``<root>/published/<name>``."""
    return _PLACE.fullmatch(uri.partition("?")[0]) is not None


def open_published(uri: str) -> Published:
    """The versions at ``<root>/published/<name>``.

    Raises:
        MissingArtifactError: if that is no such place.
    """
    base, _, query = uri.partition("?")
    found = _PLACE.fullmatch(base)
    if found is None:
        raise MissingArtifactError(
            f"{uri} is no place of published versions", expected=f"<root>/{FOLDER}/<name>"
        )
    return Published(Store(found.group(1) + (f"?{query}" if query else "")), found.group(2))


def _conflict(uri: str, what: str, newest: Version | None) -> ConflictError:
    who = f" ({newest.action} of {newest.created}: {', '.join(newest.index)})" if newest else ""
    return ConflictError(
        f"{uri} {what}{who}; nothing was changed",
        expected="that nobody publishes between this writer's start and its end",
        action="look at invar-ray index-versions list; if this index should still be current, "
        "publish it again",
    )
