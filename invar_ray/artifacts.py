"""Named, versioned artifacts: what steps hand each other.

An artifact is a folder ``<root>/<kind>/<name>-<fingerprint>/`` whose ``manifest.json`` is written last.  A folder
without a manifest is incomplete and refused.  The fingerprint hashes the kind, the step's own science settings, the
parents' fingerprints and the step's code version: same inputs, same name, so a re-run finds what stands.

Local stores (and shared file systems) stage in ``<root>/.staging`` and rename; object stores (s3, gs), which have no
atomic rename, write in place and count as published when the manifest is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from pyarrow import fs

from invar_ray.errors import ArtifactError, CorruptArtifactError, IncompleteArtifactError, MissingArtifactError

SCHEMA_VERSION = 1
"""Version of the manifest's own layout."""

UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""``UPGRADES[n]`` turns a manifest of schema version n into one of n + 1."""

MANIFEST = "manifest.json"
_CHUNK = 1 << 20


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
        version: the step's code version (``invar_ray/versions.py``).
    """

    kind: str
    name: str
    config: Mapping[str, Any]
    parents: Mapping[str, Artifact] = field(default_factory=dict)
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
        info: what the step wants to tell (row counts, dimension, metrics, the encoder's description, ...).
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
        """Parse, upgrading older layouts.

        Raises:
            CorruptArtifactError: if the text is no manifest.
            ArtifactError: if a newer release wrote it.
        """
        try:
            values = json.loads(text)
            version = int(values["schema_version"])
            while version < SCHEMA_VERSION:
                values = UPGRADES[version](values)
                version = int(values["schema_version"])
            if version > SCHEMA_VERSION:
                raise ArtifactError(
                    f"{where}: manifest has schema version {version}",
                    expected=f"{SCHEMA_VERSION} or older",
                    action="use the invar_ray release that wrote it, or a newer one",
                )
            return Manifest(**values)
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptArtifactError(
                f"{where}: manifest.json is not a manifest ({type(error).__name__}: {error})",
                action="delete that folder and run the step again",
            ) from error


@dataclass(frozen=True)
class Artifact:
    """A published artifact."""

    store: Store
    ref: str
    manifest: Manifest

    @property
    def fingerprint(self) -> str:
        """Of its plan."""
        return self.manifest.fingerprint

    @property
    def uri(self) -> str:
        """Where it is, for people and for :func:`open_artifact`."""
        return join_uri(self.store.root_uri, self.ref)

    @property
    def info(self) -> dict[str, Any]:
        """What the step recorded."""
        return self.manifest.info

    def parent(self, role: str) -> Artifact:
        """The parent in ``role``, from the same store.

        Raises:
            MissingArtifactError: if this artifact has no such parent, or it is gone.
        """
        if role not in self.manifest.parents:
            raise MissingArtifactError(
                f"{self.uri} records no parent {role!r}",
                expected=f"one of {', '.join(sorted(self.manifest.parents)) or 'none'}",
            )
        return self.store.open(self.manifest.parents[role])

    def path(self, name: str = "") -> Path:
        """Local path of a file of it (or of the folder); downloads from an object store once, into the user's cache."""
        return self.store.local_folder(self) / name

    def verify(self) -> None:
        """Read every file and compare with the manifest.

        Raises:
            CorruptArtifactError: naming each file that is missing or differs.
        """
        self.store.check_files(self.ref, self.manifest, contents=True)


@dataclass
class Building:
    """An artifact under construction: write files below ``path`` (or through ``filesystem`` below ``prefix``)."""

    plan: Plan
    path: Path
    filesystem: fs.FileSystem
    prefix: str
    info: dict[str, Any] = field(default_factory=dict)


class Store:
    """The artifacts below one root.

    Args:
        root_uri: local path, or a URI that pyarrow.fs knows (``file://``, ``s3://``, ``gs://``).

    Raises:
        ArtifactError: if the URI cannot be understood.
    """

    def __init__(self, root_uri: str) -> None:
        if "://" not in root_uri:
            root_uri = os.path.abspath(os.path.expanduser(root_uri))
        self.root_uri = root_uri
        self.filesystem, self.root = resolve_uri(root_uri)
        self.is_local = isinstance(self.filesystem, fs.LocalFileSystem)

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.root_uri,)

    def location(self, ref: str) -> str:
        """Path of ``ref`` inside :attr:`filesystem`."""
        return f"{self.root.rstrip('/')}/{ref}"

    def find(self, plan: Plan) -> Artifact | None:
        """The published artifact of ``plan``, or ``None``; file sizes are checked, contents are not."""
        if self._read(f"{self.location(plan.ref)}/{MANIFEST}") is None:
            return None
        return self.open(plan.ref)

    def open(self, ref: str, kind: str | None = None) -> Artifact:
        """Open a published artifact; file sizes are checked, contents only by :meth:`Artifact.verify`.

        Raises:
            MissingArtifactError: nothing is there.
            IncompleteArtifactError: a folder without a manifest.
            CorruptArtifactError: a file is missing or has another size.
            ArtifactError: it is of another kind.
        """
        place = self.location(ref)
        text = self._read(f"{place}/{MANIFEST}")
        uri = join_uri(self.root_uri, ref)
        if text is None:
            if self.filesystem.get_file_info(place).type == fs.FileType.NotFound:
                raise MissingArtifactError(
                    f"no artifact at {uri}", action="check the path, or run the step that makes it"
                )
            raise IncompleteArtifactError(
                f"{uri} has no {MANIFEST}: it is incomplete, whatever wrote it was cut off",
                action="run the step again; it sets the incomplete folder aside",
            )
        manifest = Manifest.from_json(text, uri)
        if kind is not None and manifest.kind != kind:
            raise ArtifactError(f"{uri} is an artifact of kind {manifest.kind!r}", expected=f"kind {kind!r}")
        self.check_files(ref, manifest, contents=False)
        return Artifact(self, ref, manifest)

    def list(self, kind: str) -> list[Artifact]:
        """All published artifacts of a kind, oldest first."""
        selector = fs.FileSelector(self.location(kind), allow_not_found=True)
        found = []
        for entry in self.filesystem.get_file_info(selector):
            with contextlib.suppress(MissingArtifactError, IncompleteArtifactError):
                found.append(self.open(f"{kind}/{entry.base_name}"))
        return sorted(found, key=lambda artifact: artifact.manifest.created)

    @contextlib.contextmanager
    def build(self, plan: Plan, *, resumable: bool = False) -> Iterator[Building]:
        """Make an artifact: the body writes its files, leaving the block publishes them all at once.

        Args:
            plan: what is made.
            resumable: keep the staging folder, under a name that the next run finds, if the body fails; the body must
                then cope with files of an earlier try and write each of its own atomically.  Other nodes may write
                there too.

        If another writer publishes the same plan first, its result stands and this one is dropped: the contents are
            equal.
        """
        suffix = "" if resumable else f"-{uuid.uuid4().hex[:8]}"
        if self.is_local:
            staging = Path(self.root) / ".staging" / f"{plan.kind}-{plan.fingerprint}{suffix}"
            staging.mkdir(parents=True, exist_ok=True)
            building = Building(plan, staging, self.filesystem, str(staging))
        else:
            staging = Path(tempfile.mkdtemp(prefix="invar-"))
            building = Building(plan, staging, self.filesystem, self.location(plan.ref))
        try:
            yield building
            self._publish(building)
        finally:
            if not (resumable and self.is_local):
                shutil.rmtree(staging, ignore_errors=True)

    def get_or_build(
        self, plan: Plan, body: Callable[[Building], None], *, resumable: bool = False
    ) -> tuple[Artifact, bool]:
        """The artifact of ``plan``, made by ``body`` unless it stands. Returns it, and whether it was re-used."""
        found = self.find(plan)
        if found is not None:
            return found, True
        with self.build(plan, resumable=resumable) as building:
            body(building)
        return self.open(plan.ref), False

    def local_folder(self, artifact: Artifact) -> Path:
        """Local folder of an artifact; for object stores a verified copy in the user's cache."""
        if self.is_local:
            return Path(self.location(artifact.ref))
        cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "invar_ray"
        target = cache / f"{artifact.manifest.kind}-{artifact.fingerprint}"
        if (target / MANIFEST).exists():
            return target
        cache.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=cache, prefix=".download-"))
        fs.copy_files(
            self.location(artifact.ref),
            str(staging),
            source_filesystem=self.filesystem,
            destination_filesystem=fs.LocalFileSystem(),
        )
        _check(staging.as_posix(), fs.LocalFileSystem(), artifact.manifest, contents=True, shown=artifact.uri)
        try:
            staging.rename(target)
        except OSError:  # another process was faster; its copy is as good
            shutil.rmtree(staging, ignore_errors=True)
        return target

    def check_files(self, ref: str, manifest: Manifest, *, contents: bool) -> None:
        """Compare files with the manifest; see :meth:`Artifact.verify`."""
        _check(self.location(ref), self.filesystem, manifest, contents, join_uri(self.root_uri, ref))

    def _publish(self, building: Building) -> None:
        plan, final = building.plan, self.location(building.plan.ref)
        if not self.is_local:
            for path in sorted(entry for entry in building.path.rglob("*") if entry.is_file()):
                target = f"{final}/{path.relative_to(building.path).as_posix()}"
                fs.copy_files(
                    str(path), target, source_filesystem=fs.LocalFileSystem(), destination_filesystem=self.filesystem
                )
        manifest = Manifest(
            kind=plan.kind,
            name=plan.name,
            fingerprint=plan.fingerprint,
            version=plan.version,
            config=json.loads(canonical_json(plan.config)),
            parents={role: parent.ref for role, parent in plan.parents.items()},
            files=_inventory(self.filesystem, building.prefix),
            info=json.loads(canonical_json(building.info)),
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )
        text = json.dumps(asdict(manifest), indent=2, sort_keys=True).encode()
        with self.filesystem.open_output_stream(f"{building.prefix}/{MANIFEST}") as stream:
            stream.write(text)
        if self.is_local:
            _flush(building.path)
            self._rename(building.path, Path(final))

    def _rename(self, staging: Path, final: Path) -> None:
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.exists() and not (final / MANIFEST).exists():
            aside = Path(self.root) / ".incomplete" / f"{final.name}-{uuid.uuid4().hex[:8]}"
            aside.parent.mkdir(parents=True, exist_ok=True)
            final.rename(aside)
        try:
            staging.rename(final)
        except OSError:
            if not (final / MANIFEST).exists():
                raise
            shutil.rmtree(staging, ignore_errors=True)

    def _read(self, path: str) -> str | None:
        try:
            with self.filesystem.open_input_file(path) as stream:
                return str(stream.read().decode())
        except (FileNotFoundError, NotADirectoryError):
            return None


def open_artifact(uri: str, kind: str | None = None) -> Artifact:
    """Open an artifact by its own URI ``<root>/<kind>/<name>-<fingerprint>``; errors as :meth:`Store.open`."""
    parts = urlsplit(uri)
    path = parts.path.rstrip("/") if "://" in uri else os.path.abspath(os.path.expanduser(uri))
    head, _, leaf = path.rpartition("/")
    root, _, folder = head.rpartition("/")
    if not folder or not leaf:
        raise MissingArtifactError(f"no artifact at {uri}", expected="<root>/<kind>/<name>-<fingerprint>")
    root_uri = urlunsplit((parts.scheme, parts.netloc, root, parts.query, "")) if "://" in uri else root
    return Store(root_uri).open(f"{folder}/{leaf}", kind)


def join_uri(root_uri: str, ref: str) -> str:
    """``root_uri`` with ``ref`` added to its path (a query part, e.g. an S3 endpoint, stays at the end)."""
    if "://" not in root_uri:
        return f"{root_uri.rstrip('/')}/{ref}"
    parts = urlsplit(root_uri)
    return urlunsplit((parts.scheme, parts.netloc, f"{parts.path.rstrip('/')}/{ref}", parts.query, ""))


def resolve_uri(uri: str) -> tuple[fs.FileSystem, str]:
    """File system and path for a URI or a local path.

    Raises:
        ArtifactError: if pyarrow does not know the scheme.
    """
    if "://" not in uri:
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    try:
        filesystem, path = fs.FileSystem.from_uri(uri)
    except (ValueError, OSError, TypeError) as error:
        raise ArtifactError(
            f"cannot open {uri!r} ({error})", expected="a local path, or a file://, s3:// or gs:// URI"
        ) from error
    return filesystem, path


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with open(temporary, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def _inventory(filesystem: fs.FileSystem, prefix: str) -> dict[str, dict[str, Any]]:
    files = {}
    for entry in filesystem.get_file_info(fs.FileSelector(prefix, recursive=True)):
        name = entry.path[len(prefix) :].lstrip("/")
        if entry.type == fs.FileType.File and name != MANIFEST:
            files[name] = {"bytes": entry.size, "sha256": _sha256(filesystem, entry.path)}
    return files


def _check(prefix: str, filesystem: fs.FileSystem, manifest: Manifest, contents: bool, shown: str) -> None:
    faults = []
    for name, entry in sorted(manifest.files.items()):
        path = f"{prefix}/{name}"
        found = filesystem.get_file_info(path)
        if found.type != fs.FileType.File:
            faults.append(f"{name} is missing")
        elif found.size != entry["bytes"]:
            faults.append(f"{name} has {found.size} bytes instead of {entry['bytes']}")
        elif contents and _sha256(filesystem, path) != entry["sha256"]:
            faults.append(f"the content of {name} differs from its recorded sha256")
    if faults:
        raise CorruptArtifactError(
            f"{shown} is damaged: {'; '.join(faults[:5])}" + (f"; and {len(faults) - 5} more" if faults[5:] else ""),
            action=f"delete that folder and run the step that makes it (kind {manifest.kind!r}) again",
        )


def _sha256(filesystem: fs.FileSystem, path: str) -> str:
    hasher = hashlib.sha256()
    with filesystem.open_input_stream(path) as stream:
        while chunk := stream.read(_CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()


def _flush(folder: Path) -> None:
    # A rename may reach the disk before the files do: after a power cut the manifest must not outlive its files.
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
