"""What a version of the vectors is made of: all of it anew, what is new beside the shards of the
version before, or a compact version of both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from invar_ray import console
from invar_ray.config import Config
from invar_ray.errors import ArtifactError
from invar_ray.index.shards import Rows, ShardTask, input_hash
from invar_ray.index.vectors import SHARDS, vector_store
from invar_ray.models.encoder import EncoderSpec
from invar_ray.models.precision import Precision, inference_precision, made_in
from invar_ray.store.artifacts import Artifact, Building, Plan, Store
from invar_ray.store.earlier import (
    HashTable,
    column_hashes,
    cutting_differs,
    hashes_of,
    holds_all_of,
    passage_digest,
)

COMPACT_ABOVE = 0.2
"""Share of vectors of deleted or changed passages (tombstones) above which a new version of the
vectors is written compact; below, it keeps the files of the version before and adds its own.  Which
vectors count is the same."""
_READ_ROWS = 8192
_TRAINED = ("retriever", "arm")
"""Names of vectors whose encoder changes with each training."""


@dataclass
class Layout:
    """Which row holds the vector of which passage.

    Attributes:
        rows: for each passage its row among the vectors.
        tasks: shards to make.
        linked: shard files taken over from ``earlier``.
        embedded: passages that the encoder sees.
        tombstones: rows whose content no passage has any more.
    """

    rows: Rows
    tasks: list[ShardTask]
    linked: list[str]
    earlier: Artifact | None
    full_because: str
    embedded: int
    tombstones: int

    @property
    def rows_to_write(self) -> int:
        """Rows of the shards to make."""
        return sum(len(task.rows) for task in self.tasks)


def make_layout(
    building: Building, config: Config, passages: Artifact, spec: EncoderSpec
) -> Layout:
    """Compare with the earlier version and decide what is made: everything, what is new, or a
    compact version.
    """
    contents = _contents(passages)
    count, step = len(contents), config.scale.shard_rows
    earlier, reason, is_expected = None, "", False
    if config.scale.incremental:
        earlier, reason, is_expected = _earlier_vectors(
            passages.store,
            building.plan,
            spec.fingerprint,
            inference_precision(config, spec.kind),
            passages,
        )
    if reason:
        tell = console.detail if is_expected else console.say
        tell(f"  full reindex: {reason}")
    found = np.full(count, -1, np.int64)
    names: list[str] = []
    size = dead = 0
    if earlier is not None:
        source = vector_store(earlier)
        size = source.size
        stored = np.concatenate(
            [column_hashes(column) for _, column in source.contents()] or [hashes_of([])]
        )
        wanted = hashes_of(contents)
        found = HashTable(stored).find(wanted)
        dead = int((HashTable(wanted).find(stored) < 0).sum())
        names = sorted(name for name in earlier.manifest.files if name.startswith(f"{SHARDS}/"))
    fresh = np.flatnonzero(found < 0)
    kept = len(fresh) < count
    dead_share = dead / max(1, size + len(fresh))
    append = earlier is not None and kept and dead_share <= COMPACT_ABOVE
    if earlier is not None:
        _say_what_is_used(earlier, used=count - len(fresh), fresh=len(fresh), append=append)
    if append:
        rows = found.copy()
        rows[fresh] = size + np.arange(len(fresh))
        tasks = [
            _task(size + start, fresh[start : start + step], found, contents)
            for start in range(0, len(fresh), step)
        ]
        return Layout(rows, tasks, names, earlier, reason, len(fresh), dead)
    everything = np.arange(count)
    tasks = [
        _task(start, everything[start : start + step], found, contents)
        for start in range(0, count, step)
    ]
    return Layout(everything, tasks, [], earlier if kept else None, reason, len(fresh), 0)


def _say_what_is_used(earlier: Artifact, *, used: int, fresh: int, append: bool) -> None:
    if not used:
        line = (
            f"none of the vectors of {earlier.ref} can be used again; embedding {fresh:,} passages"
        )
    else:
        how = (
            "new ones are added to its files"
            if append
            else "it holds too many that are no longer needed: all are written anew"
        )
        line = f"{used:,} vectors of {earlier.ref} are used again, {fresh:,} to embed; {how}"
    (console.say if used else console.detail)(f"  {line}")


def _task(start: int, rows: Rows, found: Rows, contents: list[bytes]) -> ShardTask:
    rows = np.asarray(rows, np.int64)
    return ShardTask(start, rows, found[rows], input_hash(rows, [contents[row] for row in rows]))


def _contents(passages: Artifact) -> list[bytes]:
    """A hash of what is embedded of each passage."""
    return [
        passage_digest(title, text)
        for batch in _batches(passages, ["title", "text"])
        for title, text in zip(
            batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True
        )
    ]


def passage_ids(passages: Artifact) -> pa.Array:
    """Ids of all passages, in row order."""
    return pa.array(
        [id for batch in _batches(passages, ["id"]) for id in batch.column(0).to_pylist()],
        pa.string(),
    )


def _batches(passages: Artifact, columns: list[str]) -> Iterator[pa.RecordBatch]:
    store = passages.store
    with store.filesystem.open_input_file(
        store.location(f"{passages.ref}/passages.parquet")
    ) as stream:
        yield from pq.ParquetFile(stream).iter_batches(_READ_ROWS, columns=columns)


def _earlier_vectors(
    store: Store, plan: Plan, encoder: str, precision: Precision, passages: Artifact
) -> tuple[Artifact | None, str, bool]:
    """The newest ``vectors`` that rows can be taken from; why the newest of this name cannot (empty
    if it can); and whether that is expected: the retriever was trained anew, or is another arm of a
    report.

    Args:
        store: where to look.
        plan: of the vectors to be made.
        encoder: fingerprint of the encoder.
        precision: that it runs in: one version's vectors are all of one.
        passages: what is embedded.
    """
    reason, is_expected = "", False
    for artifact in reversed(store.list("vectors")):
        if artifact.ref == plan.ref:
            continue
        why = _vectors_differ(artifact, plan, encoder, precision, passages)
        if not why:
            return artifact, "", False
        if not reason and artifact.manifest.name == plan.name and _same_corpus(artifact, passages):
            reason = f"{artifact.ref} cannot be used: {why}"
            trained = plan.name.partition("-")[0] in _TRAINED  # a shard's is retriever-1of4
            is_expected = trained and artifact.manifest.config["encoder"] != encoder
    return None, reason, is_expected


def _vectors_differ(
    artifact: Artifact, plan: Plan, encoder: str, precision: Precision, passages: Artifact
) -> str:
    was = artifact.manifest.config.get("encoder")
    if was != encoder:
        return f"it was made by encoder {was}, this run's is {encoder}"
    if made_in(artifact) != precision:
        return f"it was made in {made_in(artifact)}, this run embeds in {precision}"
    if artifact.manifest.version != plan.version:
        return (
            f"this release embeds otherwise (version {artifact.manifest.version} of the step, now "
            f"{plan.version})"
        )
    try:
        parent = artifact.parent("passages")
    except ArtifactError as error:
        return f"its passages cannot be opened ({error})"
    if not holds_all_of(parent.manifest.config, passages.manifest.config):
        return "it is of other shards of the corpus"
    return cutting_differs(parent, passages.manifest.config, passages.manifest.version)


def _same_corpus(artifact: Artifact, passages: Artifact) -> bool:
    name, _, _ = artifact.manifest.parents.get("passages", "").rpartition("-")
    return name == f"passages/{passages.manifest.name}"
