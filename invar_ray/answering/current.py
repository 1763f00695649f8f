"""What a store serves: the index that is current, and the generator that goes with it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from invar_ray.errors import InvarError, MissingArtifactError, MixedArtifactsError
from invar_ray.store.artifacts import Artifact, Store
from invar_ray.store.published import Published

_SERVED = {"base", "retriever", "starter"}
"""Names of indexes that are meant to be asked; MiniLM's is a baseline."""


def current_shards(store: Store, name: str = "main") -> list[Artifact]:
    """The index that is current, one artifact a shard: the published one, or where nothing has been
    published the one that was made last.

    Args:
        store: where to look.
        name: of the published versions.

    Raises:
        MissingArtifactError: there is none.
    """
    published = Published(store, name)
    newest = published.current()
    return [_made_last(store, None)] if newest is None else published.open(newest)


def current_index(store: Store, corpus: str | None = None) -> Artifact:
    """The index that is current, for those who search one.

    Args:
        store: where to look.
        corpus: only an index of this file or folder: the last that was published, or made.

    Raises:
        MissingArtifactError: there is none.  MixedArtifactsError: it has several shards.
    """
    if corpus is not None:
        published = Published(store)
        for version in reversed(published.history()):
            with contextlib.suppress(MissingArtifactError):  # collected
                shards = published.open(version)
                if _is_of(shards[0], corpus):
                    return _the_one(shards, store)
        return _made_last(store, corpus)
    return _the_one(current_shards(store), store)


def _the_one(shards: list[Artifact], store: Store) -> Artifact:
    index, *more = shards
    if more:
        raise MixedArtifactsError(
            f"the current version at {Published(store).uri} has {len(more) + 1} shards",
            expected="one index",
            action="name one with its option, or deploy the service (serve deploy), which searches "
            "all shards",
        )
    return index


def _made_last(store: Store, corpus: str | None) -> Artifact:
    made = store.newest("index", lambda index: _is_served(index) and _is_of(index, corpus))
    if made is None:
        raise MissingArtifactError(
            f"no index {f'of {corpus} ' if corpus else ''}below {store.root_uri}",
            action="run invar-ray index FOLDER, invar-ray demo or invar-ray train first, or name "
            "one with its option",
        )
    return made


def newest_generator(index: Artifact) -> Artifact | None:
    """The last generator in an index's store that goes with it; see :func:`fits_generator`."""
    return index.store.newest("generator", lambda artifact: fits_generator(index, artifact))


def fits_generator(index: Artifact, generator: Artifact) -> bool:
    """Whether a generator goes with an index: it has the base of the index's retriever, or, where
    that has an encoder of its own, the base in whose tokens the passages were cut.
    """
    encoder = index.info["encoder"]
    wanted = encoder["base"]["fingerprint"]
    if encoder["kind"] != "llm":
        wanted = index.parent("passages").manifest.config.get("tokenizer")
    base: Any = generator.info.get("base", {}).get("fingerprint")
    return bool(base == wanted)


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
