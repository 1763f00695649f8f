"""What a store serves: the index that is current, and the generator that goes with it."""

from __future__ import annotations

from pathlib import Path

from invar_ray.errors import InvarError, MissingArtifactError
from invar_ray.store.artifacts import Artifact, Store
from invar_ray.store.published import Published

_SERVED = {"base", "retriever"}
"""Names of indexes that are meant to be asked; MiniLM's is a baseline."""


def current_index(store: Store, corpus: str | None = None) -> Artifact:
    """The index that is current: the published one, or where nothing has been published the one
    that was made last.

    Args:
        store: where to look.
        corpus: only an index of this file or folder: the last that was published, or made.

    Raises:
        MissingArtifactError: there is none.
    """
    published = Published(store)
    newest = published.current()
    versions = [] if newest is None else [newest] if corpus is None else published.history()
    for version in reversed(versions):
        try:
            index = published.open(version)[0]
        except MissingArtifactError:  # collected
            continue
        if corpus is None or _is_of(index, corpus):
            return index
    made = store.newest("index", lambda index: _is_served(index) and _is_of(index, corpus))
    if made is None:
        raise MissingArtifactError(
            f"no index {f'of {corpus} ' if corpus else ''}below {store.root_uri}",
            action="run invar-ray index FOLDER, invar-ray demo or invar-ray train first, or name "
            "one with its option",
        )
    return made


def newest_generator(index: Artifact) -> Artifact | None:
    """The last generator that was trained on the base of an index, in the index's store."""
    base = index.info["encoder"].get("base") or {}
    return index.store.newest(
        "generator",
        lambda artifact: (
            artifact.info.get("base", {}).get("fingerprint") == base.get("fingerprint")
        ),
    )


def _is_served(index: Artifact) -> bool:
    return index.manifest.name in _SERVED


def _is_of(index: Artifact, corpus: str | None) -> bool:
    if corpus is None:
        return True
    try:
        source = index.parent("passages").info.get("source")
    except InvarError:  # its passages are gone: the index cannot be asked
        return False
    wanted = {corpus, str(Path(corpus).expanduser().absolute()).rstrip("/")}
    return str(source).rstrip("/") in wanted
