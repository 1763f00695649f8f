"""Named, versioned artifacts: what steps hand each other.

An artifact is a folder ``<root>/<kind>/<name>-<fingerprint>/`` whose ``manifest.json`` is written
last.  A folder without a manifest is incomplete and refused.  The fingerprint hashes the kind, the
step's own science settings, the parents' fingerprints and the step's code version: same inputs,
same name, so a re-run finds what stands.

Local stores (and shared file systems) stage in ``<root>/.staging`` and rename; object stores (s3,
gs), which have no atomic rename, write in place and count as published when the manifest is there.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import platform
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from pyarrow import fs

from invar_ray import console
from invar_ray.errors import (
    ArtifactError,
    CorruptArtifactError,
    IncompleteArtifactError,
    MissingArtifactError,
)
from invar_ray.store.files import flush, inventory, join_uri, resolve_uri
from invar_ray.store.manifest import MANIFEST, Manifest, Plan, canonical_json, check_files, digest

__all__ = [
    "MANIFEST",
    "Artifact",
    "Building",
    "Manifest",
    "Plan",
    "Store",
    "canonical_json",
    "digest",
    "join_uri",
    "open_artifact",
    "resolve_uri",
]


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
        """Local path of a file of it (or of the folder); downloads from an object store once, into
        the user's cache.
        """
        return self.store.local_folder(self) / name

    def verify(self) -> None:
        """Read every file and compare with the manifest.

        Raises:
            CorruptArtifactError: naming each file that is missing or differs.
        """
        self.store.check_files(self.ref, self.manifest, contents=True)

    def verify_copy(self) -> None:
        """As :meth:`verify`, for who then reads what :meth:`path` gives: of an object store the
        local copy is read, and not what lies there.
        """
        folder = self.path().as_posix()
        check_files(folder, fs.LocalFileSystem(), self.manifest, True, self.uri)


@dataclass
class Building:
    """An artifact under construction: write files below ``path``.

    The workers of a resumable step may also write through ``filesystem`` below ``prefix``, each
    file atomically.
    """

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
        if self.is_local:
            _usable(Path(self.root))

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.root_uri,)

    def location(self, ref: str) -> str:
        """Path of ``ref`` inside :attr:`filesystem`."""
        return f"{self.root.rstrip('/')}/{ref}"

    def find(self, plan: Plan) -> Artifact | None:
        """The published artifact of ``plan``, or ``None``; file sizes are checked, contents are
        not.
        """
        if self._read(f"{self.location(plan.ref)}/{MANIFEST}") is None:
            return None
        return self.open(plan.ref)

    def open(self, ref: str, kind: str | None = None) -> Artifact:
        """Open a published artifact; file sizes are checked, contents only by
        :meth:`Artifact.verify`.

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
            raise ArtifactError(
                f"{uri} is an artifact of kind {manifest.kind!r}", expected=f"kind {kind!r}"
            )
        self.check_files(ref, manifest, contents=False)
        return Artifact(self, ref, manifest)

    def list(self, kind: str) -> list[Artifact]:
        """All published artifacts of a kind, oldest first; damaged ones are left out."""
        selector = fs.FileSelector(self.location(kind), allow_not_found=True)
        found = []
        for entry in self.filesystem.get_file_info(selector):
            with contextlib.suppress(
                MissingArtifactError, IncompleteArtifactError, CorruptArtifactError
            ):
                found.append(self.open(f"{kind}/{entry.base_name}"))
        return sorted(found, key=lambda artifact: artifact.manifest.created)

    def newest(
        self, kind: str, where: Callable[[Artifact], bool] = lambda artifact: True
    ) -> Artifact | None:
        """The artifact of a kind that was made last, of those for which ``where`` holds."""
        return next(filter(where, reversed(self.list(kind))), None)

    def exists(self) -> bool:
        """Whether anything is at the root."""
        return bool(self.filesystem.get_file_info(self.root).type != fs.FileType.NotFound)

    def being_made(self, *kinds: str) -> tuple[str, ...]:
        """Which artifacts of these kinds another process is making in a local store right now, as
        ``kind-fingerprint``; none in a remote store, which has no locks.
        """
        held = []
        folder = Path(self.root) / ".locks"
        for place in sorted(folder.iterdir()) if self.is_local and folder.is_dir() else []:
            if place.name.partition("-")[0] in kinds:
                with open(place, encoding="utf-8") as lock:
                    try:
                        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    except BlockingIOError:
                        held.append(place.name)
        return tuple(held)

    @contextlib.contextmanager
    def build(self, plan: Plan, *, resumable: bool = False) -> Iterator[Building]:
        """Make an artifact: the body writes its files, leaving the block publishes them all at
        once.

        Args:
            plan: what is made.
            resumable: keep the staging folder, under a name that the next run finds, if the body
                fails; the body must then cope with files of an earlier try and write each of its
                own atomically.  Other nodes may write there too.

        If another writer publishes the same plan first, its result stands and this one is dropped:
        the contents are
            equal.
        """
        held = contextlib.ExitStack()
        if self.is_local:
            staging = held.enter_context(self._staging(plan, resumable))
            building = Building(plan, staging, self.filesystem, str(staging))
        else:
            staging = Path(tempfile.mkdtemp(prefix="invar-"))
            building = Building(plan, staging, self.filesystem, self.location(plan.ref))
        try:
            yield building
            self._publish(building, resumable)
        except Exception as error:
            if not self.is_local and type(error) is OSError:
                raise ArtifactError(
                    f"cannot write to {join_uri(self.root_uri, plan.ref)} ({error})",
                    action="check the bucket, the credentials and the network",
                ) from error
            raise
        finally:
            if not (resumable and self.is_local):
                shutil.rmtree(staging, ignore_errors=True)
            held.close()

    @contextlib.contextmanager
    def _staging(self, plan: Plan, resumable: bool) -> Iterator[Path]:
        """The folder that an artifact of a local store is made in.  What a killed writer of the
        same plan left on this machine is removed: the lock of its folder is free.  (Of another
        machine's nothing is known: not every shared file system passes locks on.)
        """
        name, folder = f"{plan.kind}-{plan.fingerprint}", Path(self.root) / ".staging"
        if resumable:
            (folder / name).mkdir(parents=True, exist_ok=True)
            yield folder / name
            return
        locks = Path(self.root) / ".locks"
        name += f"-{platform.node()}"
        for left in folder.glob(f"{glob.escape(name)}-*"):
            lock = locks / f"staging-{left.name}"
            with contextlib.suppress(OSError), open(lock, encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
                lock.unlink()
        name += f"-{uuid.uuid4().hex[:8]}"
        lock = locks / f"staging-{name}"
        with _locked(lock):
            (folder / name).mkdir(parents=True)
            yield folder / name
            lock.unlink(missing_ok=True)

    def get_or_build(
        self,
        plan: Plan,
        body: Callable[[Building], None],
        *,
        resumable: bool = False,
        alone: bool = False,
    ) -> tuple[Artifact, bool]:
        """The artifact of ``plan``, made by ``body`` unless it stands. Returns it, and whether it
        was re-used.

        Args:
            plan: what is wanted.
            body: makes it.
            resumable: see :meth:`build`.
            alone: in a local store, wait for another process that is making it, and take its
                result.  Resumable steps always do.
        """
        found = self.find(plan)
        if found is not None:
            return found, True
        with (
            self._alone(plan)
            if (resumable or alone) and self.is_local
            else contextlib.nullcontext()
        ):
            found = self.find(plan)  # another run may have made it while this one waited
            if found is not None:
                return found, True
            with self.build(plan, resumable=resumable) as building:
                body(building)
        return self.open(plan.ref), False

    def local_folder(self, artifact: Artifact) -> Path:
        """Local folder of an artifact; for object stores a verified copy in the user's cache, which
        the first of a machine's processes makes and the others wait for.
        """
        if self.is_local:
            return Path(self.location(artifact.ref))
        cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "invar_ray"
        target = cache / f"{artifact.manifest.kind}-{artifact.fingerprint}"
        if (target / MANIFEST).exists():
            return target
        with _locked(cache / ".locks" / target.name):
            if not (target / MANIFEST).exists():
                self._download(artifact, cache, target)
        return target

    def _download(self, artifact: Artifact, cache: Path, target: Path) -> None:
        staging = Path(tempfile.mkdtemp(dir=cache, prefix=".download-"))
        fs.copy_files(
            self.location(artifact.ref),
            str(staging),
            source_filesystem=self.filesystem,
            destination_filesystem=fs.LocalFileSystem(),
        )
        check_files(
            staging.as_posix(),
            fs.LocalFileSystem(),
            artifact.manifest,
            contents=True,
            shown=artifact.uri,
        )
        try:
            staging.rename(target)
        except OSError:  # a machine whose cache is shared was faster; its copy is as good
            shutil.rmtree(staging, ignore_errors=True)

    def check_files(self, ref: str, manifest: Manifest, *, contents: bool) -> None:
        """Compare files with the manifest; see :meth:`Artifact.verify`."""
        check_files(
            self.location(ref), self.filesystem, manifest, contents, join_uri(self.root_uri, ref)
        )

    def _publish(self, building: Building, resumable: bool) -> None:
        plan, final = building.plan, self.location(building.plan.ref)
        if not self.is_local:
            if self._read(f"{final}/{MANIFEST}") is not None:
                return  # another writer was first; what readers may have open stays as it is
            for path in sorted(entry for entry in building.path.rglob("*") if entry.is_file()):
                target = f"{final}/{path.relative_to(building.path).as_posix()}"
                fs.copy_files(
                    str(path),
                    target,
                    source_filesystem=fs.LocalFileSystem(),
                    destination_filesystem=self.filesystem,
                )
        if self.is_local or resumable:
            files = inventory(self.filesystem, building.prefix, MANIFEST)
        else:  # what an earlier try left at that place is not part of this one
            files = inventory(fs.LocalFileSystem(), str(building.path), MANIFEST)
        manifest = Manifest(
            kind=plan.kind,
            name=plan.name,
            fingerprint=plan.fingerprint,
            version=plan.version,
            config=json.loads(canonical_json(plan.config)),
            parents={role: parent.ref for role, parent in plan.parents.items()},
            files=files,
            info=json.loads(canonical_json(building.info)),
            created=self._next_time(plan.kind),
        )
        text = json.dumps(asdict(manifest), indent=2, sort_keys=True).encode()
        with self.filesystem.open_output_stream(f"{building.prefix}/{MANIFEST}") as stream:
            stream.write(text)
        if self.is_local:
            flush(building.path)
            self._rename(building.path, Path(final))

    def _next_time(self, kind: str) -> str:
        """Now, or just after the last artifact of the kind: "newest" needs an order, and a clock
        may have been ahead when that one was made.
        """
        now = datetime.now(UTC)
        selector = fs.FileSelector(self.location(kind), allow_not_found=True)
        for entry in self.filesystem.get_file_info(selector):
            text = self._read(f"{entry.path}/{MANIFEST}")
            with contextlib.suppress(ValueError, KeyError, TypeError):  # damaged: has no place
                made = datetime.fromisoformat(json.loads(text or "{}")["created"])
                now = max(now, made + timedelta(microseconds=1))
        return now.isoformat(timespec="microseconds").replace("+00:00", "Z")

    @contextlib.contextmanager
    def _alone(self, plan: Plan) -> Iterator[None]:
        """Let one process at a time make an artifact of a local store whose working folder has a
        fixed name.
        """
        place = Path(self.root) / ".locks" / f"{plan.kind}-{plan.fingerprint}"
        with _locked(place, f"  another run is making {plan.ref}: waiting for it"):
            yield

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
        except OSError as error:
            raise ArtifactError(
                f"cannot read {path} ({error})",
                action="check the bucket, the credentials and the network",
            ) from error


@contextlib.contextmanager
def _locked(place: Path, waiting: str = "") -> Iterator[None]:
    """Hold a file's lock; who has to wait for it says so."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(place, "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting:
                console.say(waiting)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def check_trained(root_uri: str, kind: str) -> None:
    """Whether a store has any artifact of a kind; for commands that make none.

    Raises:
        MissingArtifactError: it has none.  ArtifactError: it cannot be read.
    """
    store = Store(root_uri)
    if not store.list(kind):
        raise MissingArtifactError(
            f"storage.root_uri is {store.root_uri}, "
            f"{f'which holds no {kind}' if store.exists() else 'and nothing is there'}",
            expected="the store of a finished run",
            action="correct storage.root_uri, or make one with invar-ray demo or invar-ray train",
        )


def _usable(root: Path) -> None:
    place = next((parent for parent in [root, *root.parents] if parent.exists()), root)
    if not place.is_dir() or not os.access(place, os.R_OK | os.X_OK):
        what = "is not a folder" if not place.is_dir() else "cannot be read"
        raise ArtifactError(
            f"the storage root {root} cannot be used: {place} {what}",
            action="set storage.root_uri to a folder that you may write to",
        )


def open_artifact(uri: str, kind: str | None = None) -> Artifact:
    """Open an artifact by its own URI ``<root>/<kind>/<name>-<fingerprint>``; errors as
    :meth:`Store.open`.
    """
    root_uri, ref = split_uri(uri)
    return Store(root_uri).open(ref, kind)


def split_uri(uri: str) -> tuple[str, str]:
    """URI of the store's root, and ref, of an artifact's URI; nothing is read.

    Raises:
        MissingArtifactError: the URI is not of the form ``<root>/<kind>/<name>-<fingerprint>``.
    """
    parts = urlsplit(uri)
    path = parts.path.rstrip("/") if "://" in uri else os.path.abspath(os.path.expanduser(uri))
    head, _, leaf = path.rpartition("/")
    root, _, folder = head.rpartition("/")
    if not folder or not leaf:
        raise MissingArtifactError(
            f"no artifact at {uri}", expected="<root>/<kind>/<name>-<fingerprint>"
        )
    root_uri = (
        urlunsplit((parts.scheme, parts.netloc, root, parts.query, "")) if "://" in uri else root
    )
    return root_uri, f"{folder}/{leaf}"
