"""Embedding on Ray Data: what a killed run had finished is kept, what was cut off is made again,
bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from invar_ray.errors import ModelError, ResourceError
from invar_ray.executor import Here
from invar_ray.index.shards import ShardTask
from invar_ray.models.encoder import open_encoder
from invar_ray.pipeline import Pipeline
from invar_ray.steps import vectors as embed
from invar_ray.steps.passages import load_passages
from invar_ray.steps.vectors import EmbedShard
from invar_ray.store.artifacts import Artifact
from tests.distributed.small_store import small_config

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

SHARD_ROWS = 8


def pipeline_in(root: Path, *overrides: str) -> Pipeline:
    # One actor, so that shards are made in order.
    return Pipeline(small_config(root, ["scale.embed_workers=1", *overrides]), quiet=True)


def vectors_of(index: Artifact) -> Artifact:
    return index.parent("vectors")


def shards(folder: Path) -> dict[int, Path]:
    """First row -> file."""
    return {
        int(path.stem.removeprefix("part-")): path for path in sorted(folder.glob("part-*.parquet"))
    }


def matrix(vectors: Artifact) -> np.ndarray[Any, np.dtype[np.float32]]:
    """All vectors in row order, through pyarrow only."""
    tables = [pq.read_table(path) for path in shards(vectors.path("shards")).values()]
    flat = [table.column("vector").combine_chunks() for table in tables]
    halves = np.concatenate([np.asarray(array.flatten()).reshape(len(array), -1) for array in flat])
    return halves.astype(np.float32)


RAN: list[ray.data.Dataset] = []
"""The datasets of the run that nothing disturbed."""


@pytest.fixture(scope="module")
def whole(local_ray: Any, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """A run that nothing disturbed."""
    pipeline = pipeline_in(tmp_path_factory.mktemp("e") / "whole")
    with noted(RAN):
        assert pipeline.base_index.manifest.name == "base"
    return pipeline


@contextlib.contextmanager
def noted(ran: list[ray.data.Dataset]) -> Iterator[None]:
    """Add the datasets of Ray Data that are read to ``ran``."""
    plain = ray.data.Dataset.iter_rows

    def noting(dataset: ray.data.Dataset) -> Any:
        ran.append(dataset)
        return plain(dataset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray.data.Dataset, "iter_rows", noting)
        yield


def test_vectors_are_fixed_size_lists_for_plain_pyarrow(whole: Pipeline) -> None:
    vectors, rows = vectors_of(whole.base_index), load_passages(whole.passages)
    found = shards(vectors.path("shards"))
    assert list(found) == list(range(0, len(rows), SHARD_ROWS))
    ids: list[str] = []
    for path in found.values():
        schema = pq.read_schema(path)
        assert schema.field("vector").type == pa.list_(pa.float16(), 384)
        assert pa.types.is_fixed_size_list(schema.field("vector").type)
        ids += pq.read_table(path).column("id").to_pylist()
    assert ids == [passage.id for passage in rows]
    np.testing.assert_allclose(np.linalg.norm(matrix(vectors), axis=1), 1.0, atol=2.0**-11)


def test_vectors_do_not_depend_on_shards_or_workers(whole: Pipeline) -> None:
    """All passages in one batch of this process, up to rounding: padding differs."""
    spec = embed.EncoderSpec.from_json(vectors_of(whole.base_index).info["encoder"])
    passages = [(passage.title, passage.text) for passage in load_passages(whole.passages)]
    plain = open_encoder(spec, whole.store).encode_passages(passages)
    # 2^-11 is what a float16 rounds by
    np.testing.assert_allclose(
        matrix(vectors_of(whole.base_index)), plain, rtol=2.0**-11, atol=1e-5
    )


def test_a_run_that_failed_goes_on_where_it_was(
    whole: Pipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class FailsAtThirdShard(EmbedShard):
        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            if row["start"] >= 2 * SHARD_ROWS:
                raise RuntimeError("the test ends this run here")
            return super().__call__(row)

    root = tmp_path / "s"
    with monkeypatch.context() as patch:
        patch.setattr(embed, "EmbedShard", FailsAtThirdShard)
        with pytest.raises(
            ResourceError,
            match=r"RuntimeError: the test ends this run here\. To do: .*what is finished stands",
        ):
            _ = pipeline_in(root).base_index
    assert not list(root.glob("vectors/*")), "an unfinished run published something"

    [staging] = (root / ".staging").glob("vectors-*/shards")
    standing = shards(staging)
    assert list(standing) == [0, SHARD_ROWS]
    kept, cut = standing[0], standing[SHARD_ROWS]
    before = kept.stat().st_mtime_ns
    cut.write_bytes(cut.read_bytes()[:-100])  # as if the disk had been full
    (staging / ".part-0000000016.parquet.123").write_bytes(b"half a file")
    (staging / "part-0000000003.parquet").write_bytes(b"of another shard size")

    embedded = tmp_path / "embedded"

    class Noting(EmbedShard):
        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            with open(embedded, "a") as stream:
                stream.write(f"{row['start']} ")
            return super().__call__(row)

    with monkeypatch.context() as patch:
        patch.setattr(embed, "EmbedShard", Noting)
        vectors = vectors_of(pipeline_in(root).base_index)

    published = shards(vectors.path("shards"))
    rows = len(load_passages(whole.passages))
    assert list(published) == list(range(0, rows, SHARD_ROWS))
    assert {path.suffix for path in vectors.path("shards").iterdir()} == {".parquet", ".json"}
    assert sorted(map(int, embedded.read_text().split())) == list(
        range(SHARD_ROWS, rows, SHARD_ROWS)
    )
    assert published[0].stat().st_mtime_ns == before, "a finished shard was made again"
    assert np.array_equal(matrix(vectors), matrix(vectors_of(whole.base_index)))
    vectors.verify()


def test_embedding_is_a_dataset_of_ray_data(whole: Pipeline, tmp_path: Path) -> None:
    """A pool of actors works on the shards; with the executor ``Here`` nothing of it runs."""
    (dataset,) = RAN
    assert "MapBatches(EmbedShard)" in dataset.stats()
    config = replace(
        whole.config, storage=replace(whole.config.storage, root_uri=str(tmp_path / "h"))
    )
    ran: list[ray.data.Dataset] = []
    with noted(ran):
        here = vectors_of(Pipeline(config, quiet=True, executor=Here()).base_index)
    assert not ran
    assert np.array_equal(matrix(here), matrix(vectors_of(whole.base_index)))


@pytest.mark.slow
def test_a_killed_actor_is_replaced_and_changes_nothing(
    whole: Pipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mark = tmp_path / "killed"

    class KilledOnce(EmbedShard):
        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            if row["start"] == SHARD_ROWS and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(row)

    monkeypatch.setattr(embed, "EmbedShard", KilledOnce)
    vectors = vectors_of(pipeline_in(tmp_path / "s").base_index)
    assert mark.exists(), "nothing was killed: the test proves nothing"
    assert np.array_equal(matrix(vectors), matrix(vectors_of(whole.base_index)))


def test_a_users_mistake_on_an_actor_comes_out_as_such(
    monkeypatch: pytest.MonkeyPatch, whole: Pipeline
) -> None:
    """E.g. a base that one node cannot read: the command line prints InvarErrors without a
    traceback.
    """

    class CannotLoad(EmbedShard):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise ModelError("no folder 'base' on this node", action="copy it there")

    monkeypatch.setattr(embed, "EmbedShard", CannotLoad)
    changed = pipeline_in(Path(whole.store.root), "model.passage_max_tokens=100")
    with pytest.raises(
        ModelError, match=r"^no folder 'base' on this node\. To do: copy it there\.$"
    ):
        _ = changed.base_index


def test_how_the_work_is_spread_changes_nothing(whole: Pipeline, tmp_path: Path) -> None:
    """Tokenised by actors of their own, a pool that grows, documents cut by tasks: the same
    files.
    """
    overrides = "scale.cpu_workers=2", "scale.embed_workers=[1, 3]", "scale.incremental=false"
    spread = pipeline_in(tmp_path / "s", *overrides)
    assert spread.passages.manifest.files == whole.passages.manifest.files
    vectors, expected = vectors_of(spread.base_index), vectors_of(whole.base_index)
    assert np.array_equal(matrix(vectors), matrix(expected))
    assert vectors.info["embedded"] == vectors.info["rows"]
    assert vectors.info["usage"]["tokens"] == expected.info["usage"]["tokens"] > 0


def test_a_shard_that_stands_is_not_made_again(whole: Pipeline, tmp_path: Path) -> None:
    """Ray hands a task out again when it loses what came of it."""
    vectors = vectors_of(whole.base_index)
    task = shard_tasks(vectors)[0]
    place = tmp_path / "shards"
    place.mkdir()
    actor = EmbedShard(
        whole.store.root_uri,
        whole.passages.ref,
        vectors.info["encoder"],
        str(tmp_path),
        str(place),
        whole.config.scale,
        "fp32",
    )
    row = task.to_row()
    assert actor(row)["made"] is True
    before = shards(place)[0].stat().st_mtime_ns
    assert actor(row)["made"] is False
    assert shards(place)[0].stat().st_mtime_ns == before
    other = {**row, "input": "of other passages"}
    assert actor(other)["made"] is True


def shard_tasks(vectors: Artifact) -> list[ShardTask]:
    """The tasks that made an artifact, from its entries."""
    entries = [
        json.loads(path.read_text()) for path in sorted(vectors.path("shards").glob("*.json"))
    ]
    return [
        ShardTask(
            entry["start"],
            np.arange(entry["start"], entry["stop"]),
            np.full(entry["rows"], -1),
            entry["input"],
        )
        for entry in entries
    ]
