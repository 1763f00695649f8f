"""Removing what no published version needs any more."""

from __future__ import annotations

import calendar
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

from pyarrow import fs

from invar_ray.errors import ArtifactError
from invar_ray.store.artifacts import MANIFEST, Store
from invar_ray.store.published import FOLDER, Published


@dataclass(frozen=True)
class Collected:
    """What :func:`collect` gave up: version numbers, and the refs of the artifacts that were
    removed.
    """

    versions: tuple[int, ...]
    removed: tuple[str, ...]


def collect(
    published: Published,
    keep: int = 3,
    *,
    parents: bool = False,
    min_age_s: float = 0.0,
    dry_run: bool = False,
) -> Collected:
    """Give up all but the newest versions and remove index artifacts that only those name.

    It takes a version number, as every writer does, before it removes anything: from then on nobody
    can go back to what it removes, and one who tries at the same time loses or wins as a whole.

    Args:
        published: the versions of one index.
        keep: how many publications stay, the current one counted (it stays in any case).
        parents: remove ``centroids``, ``vectors`` and ``passages`` too where no artifact that stays
            in the store is made of them.
        min_age_s: versions that were current within so many seconds stay: somebody may be loading
            them.
        dry_run: only say what would go.

    Raises:
        ConflictError: if another writer was faster.
        ArtifactError: if ``keep`` is below 1.
    """
    if keep < 1:
        raise ArtifactError(f"keep is {keep}", expected="1 or more: the current version stays")
    store, newest, history = published.store, published.need(), published.history()
    recent = {newest.source}
    for record, after in itertools.pairwise(history):
        if time.time() - _seconds(after.created) < min_age_s:
            recent.add(record.source)
    publications = published.kept(newest)
    stay = {*publications[-keep:], *recent}
    gone = tuple(number for number in publications if number not in stay)
    collected = tuple(sorted({*newest.collected, *gone}))
    held = {
        ref for record in history if record.source in stay for ref in record.index
    } | _held_elsewhere(published)
    named = {ref for record in history if record.number in collected for ref in record.index} - held
    # also what an earlier try did not get to
    refs = sorted(ref for ref in named if _exists(store, ref))
    if parents:
        refs += _orphans(store, refs)
    if dry_run:
        return Collected(gone, tuple(refs))
    if gone:
        published.commit(
            newest,
            None,
            "gc",
            newest.index,
            source=newest.source,
            collected=collected,
            info=newest.info,
        )
    removed = []
    for ref in refs:
        if ref not in published.need().index:  # somebody may have published it anew
            remove(store, ref)
            removed.append(ref)
    return Collected(gone, tuple(removed))


def _held_elsewhere(published: Published) -> set[str]:
    """Index refs that other names of this store may still serve."""
    held: set[str] = set()
    store = published.store
    selector = fs.FileSelector(store.location(FOLDER), allow_not_found=True)
    for entry in store.filesystem.get_file_info(selector):
        if entry.type == fs.FileType.Directory and entry.base_name != published.name:
            other = Published(store, entry.base_name)
            newest = other.current()
            if newest is not None:
                held |= {
                    ref for number in other.kept(newest) for ref in other.read(number).index
                } | set(newest.index)
    return held


def _orphans(store: Store, going: Sequence[str]) -> list[str]:
    """Centroids, vectors and passages of artifacts that go, where nothing that stays is made of
    them.
    """
    gone = set(going)
    selector = fs.FileSelector(store.root, allow_not_found=True)
    kinds = [
        entry.base_name
        for entry in store.filesystem.get_file_info(selector)
        if entry.type == fs.FileType.Directory
        and not entry.base_name.startswith(".")
        and entry.base_name != FOLDER
    ]
    artifacts = [artifact for kind in kinds for artifact in store.list(kind)]
    for kind in ("centroids", "vectors", "passages"):  # in this order: vectors are made of passages
        wanted = {
            ref
            for artifact in artifacts
            if artifact.ref in gone
            for role, ref in artifact.manifest.parents.items()
            if role == kind
        }
        used = {ref for a in artifacts if a.ref not in gone for ref in a.manifest.parents.values()}
        gone |= {ref for ref in wanted - used if _exists(store, ref)}
    return sorted(gone - set(going))


def _exists(store: Store, ref: str) -> bool:
    return bool(
        store.filesystem.get_file_info(f"{store.location(ref)}/{MANIFEST}").type == fs.FileType.File
    )


def remove(store: Store, ref: str) -> None:
    """Remove an artifact; nothing happens where there is none."""
    if not _exists(store, ref):
        return
    # Without its manifest the folder is refused by everyone, however far the removal gets.
    store.filesystem.delete_file(f"{store.location(ref)}/{MANIFEST}")
    store.filesystem.delete_dir(store.location(ref))


def _seconds(created: str) -> float:
    return float(calendar.timegm(time.strptime(created, "%Y-%m-%dT%H:%M:%SZ")))
