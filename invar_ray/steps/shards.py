"""A corpus that no node holds: the ``passages`` artifact cut into shards by a hash of the
documents' ids, and an index of each, built and verified by a task of its own.

A shard's passages are named by what they say, not by the corpus they come from: where they did not
change, neither they nor what is made of them is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from invar_ray.answering.bm25 import FOLDER, MOST_PASSAGES, build_bytes
from invar_ray.config import Config, IndexConfig
from invar_ray.config.measuring import MOST_SHARDS
from invar_ray.errors import ArtifactError, ConfigError, ResourceError
from invar_ray.executor import Executor
from invar_ray.index.blocks import vector_blocks
from invar_ray.index.build import Limits, first_planned, lists_to_share
from invar_ray.index.planner import AUTO, Candidate
from invar_ray.steps import centroids, index
from invar_ray.steps.verify import verify_index
from invar_ray.store.artifacts import Artifact, Building, Plan
from invar_ray.store.earlier import shard_of
from invar_ray.store.rowgroups import TableWriter

VERSION = 1
_READ_ROWS = 4096


def number(
    settings: IndexConfig,
    rows: int,
    dimension: Callable[[], int],
    largest: Callable[[int], int],
) -> int:
    """How many shards a corpus of so many passages has; see ``index.shards``.

    Args:
        settings: says how many, or the limits of each.
        rows: all passages.
        dimension: of their vectors; asked only where it decides.
        largest: how many passages the largest of so many shards has; likewise.

    Raises:
        ResourceError: if no number of shards keeps to the limits.
    """
    if settings.shards != "auto":
        return settings.shards
    if settings.factory != AUTO and settings.max_memory_mb is None:
        return 1
    count, width = 1, dimension()
    while True:
        try:
            _fitting(settings, -(-rows // count), width)
            if count > 1:  # a hash does not deal evenly
                _fitting(settings, largest(count), width)
            return count
        except ResourceError:
            if count >= min(MOST_SHARDS, rows):
                raise
            count *= 2


def largest(passages: Artifact, count: int) -> int:
    """How many passages the largest of so many shards has."""
    rows = np.zeros(count, dtype=np.int64)
    for batch in _batches(passages, ["document_id"]):
        owners = [shard_of(id, count) for id in batch.column("document_id").to_pylist()]
        rows += np.bincount(owners, minlength=count)
    return int(rows.max())


def _fitting(settings: IndexConfig, rows: int, dimension: int) -> Candidate:
    found = first_planned(settings, rows, dimension, strict=True)
    most = Limits.of(settings).max_memory_bytes
    if most is not None and found.memory_bytes > most:
        raise ResourceError(
            f"an index {settings.factory} of {rows:,} vectors needs {found.memory_bytes:,} bytes",
            expected=f"{most:,} or less (index.max_memory_mb)",
            action="set index.factory to auto",
        )
    return found


def name(shard: int, count: int) -> str:
    """Of a shard, counted from 0, among so many: ``2of4`` is the second."""
    return f"{shard + 1}of{count}"


def plan(config: Config, passages: Artifact, shard: int, count: int, content: str) -> Plan:
    """The ``passages`` of a shard, counted from 0, among so many; ``content`` is a hash of its
    rows.
    """
    cutting = ("chunk_tokens", "chunk_stride", "tokenizer", "metadata")
    return Plan(
        kind="passages",
        name=f"{config.name}-{name(shard, count)}",
        config={key: passages.manifest.config[key] for key in cutting}
        | {"shard": [shard, count], "content": content, "split": VERSION},
        parents={},
        version=passages.manifest.version,
    )


def cut(config: Config, passages: Artifact, count: int) -> list[Artifact]:
    """The ``passages`` of each shard, in the memory of some rows; those that stand stay.

    Raises:
        ConfigError: if a shard would be empty.
    """
    contents = _contents(passages, count)
    plans = [plan(config, passages, shard, count, contents[shard]) for shard in range(count)]
    store = passages.store
    missing = [one for one in plans if store.find(one) is None]
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(store.build(one)) for one in missing]
        if made:
            build(made, passages)
    return [store.open(one.ref) for one in plans]


def _contents(passages: Artifact, count: int) -> list[str]:
    """A hash of the rows of each shard: all that a reader of it sees."""
    hashers = [hashlib.sha256() for _ in range(count)]
    rows = [0] * count
    for shard, table in _shards(passages, range(count), count):
        rows[shard] += table.num_rows
        for row in table.to_pylist():
            hashers[shard].update(json.dumps(row).encode())
    if not all(rows):
        raise ConfigError(
            f"index.shards is {count}: shard {rows.index(0) + 1} of {sum(rows):,} passages is "
            "empty",
            expected="fewer shards than documents, by far",
            action="set index.shards lower, or to auto",
        )
    return [hasher.hexdigest() for hasher in hashers]


def build(buildings: Sequence[Building], passages: Artifact) -> None:
    """Fill shards in one pass over all passages.

    Args:
        buildings: each gets ``passages.parquet``.
        passages: of the whole corpus.
    """
    with contextlib.ExitStack() as stack:
        writers = {}
        for building in buildings:
            shard, count = building.plan.config["shard"]
            writers[shard] = stack.enter_context(TableWriter(building.path / "passages.parquet"))
        documents, last = dict.fromkeys(writers, 0), dict.fromkeys(writers, "")
        for shard, table in _shards(passages, list(writers), count):
            writers[shard].add(table)
            for id in table.column("document_id").to_pylist():  # one's passages are neighbours
                documents[shard] += id != last[shard]
                last[shard] = id
    for building, (shard, writer) in zip(buildings, writers.items(), strict=True):
        building.info |= {
            "source": passages.info["source"],
            "documents": documents[shard],
            "passages": writer.rows,
            "cut_from": passages.ref,
        }


def _shards(
    passages: Artifact, shards: Sequence[int], count: int
) -> Iterator[tuple[int, pa.Table]]:
    """(shard, its rows of some), in the order of all passages."""
    for batch in _batches(passages):
        ids = batch.column("document_id").to_pylist()
        owner = np.asarray([shard_of(id, count) for id in ids])
        table = pa.Table.from_batches([batch])
        for shard in shards:
            yield shard, table.filter(pa.array(owner == shard))


def _batches(passages: Artifact, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    with _opened(passages) as stream:
        yield from pq.ParquetFile(stream).iter_batches(_READ_ROWS, columns=columns)


def _opened(passages: Artifact) -> Any:
    store = passages.store
    return store.filesystem.open_input_file(store.location(f"{passages.ref}/passages.parquet"))


def _text_bytes(passages: Artifact) -> int:
    """Of all titles and texts, by the file's own record."""
    with _opened(passages) as stream:
        found = pq.ParquetFile(stream).metadata
    groups = [found.row_group(number) for number in range(found.num_row_groups)]
    columns = [group.column(place) for group in groups for place in range(group.num_columns)]
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema in ("title", "text"))


def build_indexes(
    config: Config,
    name: str,
    vectors: Sequence[Artifact],
    passages: Sequence[Artifact],
    *,
    executor: Executor,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Artifact, ...]:
    """The index of each shard, built where it is missing; all are verified.

    Args:
        config: the run.
        name: of the encoder.
        vectors, passages: of each shard.
        executor: builds each in a task, on different nodes where they can be.
        say: gets how many there are to build, and what became of each.

    Raises:
        ArtifactError: if a check of :func:`verify_index` fails.
        ResourceError: if no node has room for one.
    """
    store, rows = vectors[0].store, max(made.info["rows"] for made in vectors)
    dimension = vector_blocks(vectors[0]).dimension
    planned = first_planned(config.index, rows, dimension)
    words = max(build_bytes(cut.info["passages"], _text_bytes(cut)) for cut in passages)
    apart = partial(
        executor.in_order,
        num_cpus=config.scale.cpu_workers or 1,
        memory=max(planned.memory_bytes, words) + 4.0 * planned.training_rows * dimension,
    )
    factory = planned.factory if config.index.factory == AUTO else config.index.factory
    lists, trained = lists_to_share(factory), None
    if lists and config.scale.incremental:
        trained = centroids.standing(store, vectors[0], name, factory, lists)
    if lists and trained is None:
        plan = centroids.plan(vectors, name, factory, lists)
        [ref] = apart(_TrainCentroids(plan), [list(vectors)], 1)
        trained = store.open(ref)
    parts = [
        (index.plan(config, made, cut, made.manifest.name, trained), made, cut, trained)
        for made, cut in zip(vectors, passages, strict=True)
    ]
    missing = sum(store.find(plan) is None for plan, *_ in parts)
    say(f"  {missing} of {len(parts)} shards to index, all to verify")
    made = tuple(map(store.open, apart(_BuildIndex(config), parts, len(parts))))
    for one in made:
        say(f"  {one.manifest.name}: {one.info['factory']}, {one.info['rows']:,} vectors")
    without = sum(not any(f.startswith(f"{FOLDER}/") for f in one.manifest.files) for one in made)
    if 0 < without < len(made):
        say(
            f"  {without} of {len(made)} shards have no BM25, so the service searches all by "
            f"vectors alone; above {MOST_PASSAGES:,} passages none is made: set index.shards higher"
        )
    return made


@dataclass(frozen=True)
class _TrainCentroids:
    """Trains the centroids of all shards; travels to a task."""

    plan: Plan

    def __call__(self, vectors: Sequence[Artifact]) -> str:
        """Their ref."""
        store = vectors[0].store
        made, _ = store.get_or_build(self.plan, lambda to: centroids.build(to, vectors), alone=True)
        return made.ref


@dataclass(frozen=True)
class _BuildIndex:
    """Builds the index of a shard and verifies it; travels to a task.

    Attributes:
        config: the run.
    """

    config: Config

    def __call__(self, parts: tuple[Plan, Artifact, Artifact, Artifact | None]) -> str:
        """The index's ref; of its plan, its vectors, passages and centroids.

        Raises:
            ArtifactError: if a check of :func:`verify_index` fails.
        """
        plan, vectors, passages, trained = parts
        made, _ = vectors.store.get_or_build(
            plan,
            lambda to: index.build(to, self.config, vectors, passages, trained),
            alone=True,
        )
        found = verify_index(made, samples=0, seed=0)
        if found.faults:
            raise ArtifactError(
                f"{made.uri} is not sound: {'; '.join(found.faults)}",
                action="delete that folder, and run it again with scale.incremental=false",
            )
        return made.ref
