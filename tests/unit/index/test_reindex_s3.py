"""Corpus and store on an object store: read, cut, embed, a second version, and the proof."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from invar_ray.index.vectors import ROWS_FILE
from invar_ray.pipeline import Pipeline
from invar_ray.steps.verify import verify_index
from invar_ray.store.artifacts import resolve_uri
from tests.support import small_config
from tests.unit.conftest import S3
from tests.unit.index.test_incremental import changed, corpus


def put(uri: str, rows: list[dict[str, Any]]) -> None:
    filesystem, path = resolve_uri(uri)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with filesystem.open_output_stream(path, compression="zstd") as stream:
        stream.write(content)


def test_two_versions_on_an_object_store(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    uri = s3("reindex/corpus.jsonl.zst")
    config = small_config(
        tmp_path,
        f"corpus.uri={uri}",
        f"storage.root_uri={s3('reindex/store')}",
        "scale.shard_rows=100",
    )
    put(uri, corpus())
    whole = Pipeline(config, quiet=True).base_index
    put(uri, changed(corpus()))
    part = Pipeline(config, quiet=True).base_index
    assert part.parent("passages").info["changes"]["unchanged"] == 32
    vectors = part.parent("vectors")
    assert 0 < vectors.info["embedded"] < 10
    assert {ROWS_FILE, "shards/part-0000000000.parquet"} <= set(vectors.manifest.files)
    for index in (whole, part):
        found = verify_index(index, samples=20, seed=0)
        assert not found.faults
