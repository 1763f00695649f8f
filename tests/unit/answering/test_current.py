"""Which index is current: the published one, all of it; else the one that was made last."""

from __future__ import annotations

from pathlib import Path

import pytest

from invar_ray.answering.current import current_index, current_shards, newest_generator
from invar_ray.errors import MissingArtifactError, MixedArtifactsError
from invar_ray.store.published import Published
from serve.args import AppArgs
from tests.support import World


def test_the_published_index_is_current_with_all_its_shards(tmp_path: Path) -> None:
    small = World(tmp_path)
    store = small.store
    with pytest.raises(MissingArtifactError, match="no index below"):
        current_index(store)
    first, last = small.base_index, small.with_factory("IVF2,Flat").base_index
    assert current_index(store).ref == last.ref, "nothing is published: the last that was made"
    assert newest_generator(last) is None
    Published(store).publish([first])
    assert current_index(store).ref == first.ref
    assert current_index(store, str(tmp_path / "corpus.jsonl")).ref == first.ref
    with pytest.raises(MissingArtifactError, match="no index of elsewhere below"):
        current_index(store, "elsewhere")

    Published(store).publish([first, last])
    assert [shard.ref for shard in current_shards(store)] == [first.ref, last.ref]
    with pytest.raises(MixedArtifactsError, match="has 2 shards"):
        current_index(store)
    with pytest.raises(MixedArtifactsError, match="has 2 shards"):
        current_index(store, str(tmp_path / "corpus.jsonl"))
    args = AppArgs(store_uri=store.root_uri, generator_uri="g").resolved()
    assert args.configured == (first.uri, last.uri)
