r"""Bring the index up to the corpus: read, cut, embed what is new or changed, build.  Run it again
after a kill.

``index.encoder`` says with what: ``retriever`` (the base with this run's stage-1 adapter, trained
first if it is missing), ``base``, ``minilm``, or the URI of a stage-1 adapter that stands already.
Where an earlier version stands that the same encoder made, only new and changed passages are
embedded (``scale.incremental=false`` embeds all).

A corpus that is too large for one index is cut into shards (``index.shards``, by hand or by what
``index.max_memory_mb`` leaves to each); they are built by tasks of the cluster, verified, and
published together as one version, which a service with ``index_uri: <root>/published/main`` then
serves.

Command::

    python -m jobs.reindex --config tiny
    python -m jobs.reindex --config tiny corpus.uri=corpus.jsonl.gz index.encoder=minilm \
        storage.root_uri=/shared/index
    ray job submit --working-dir . -- python -m jobs.reindex --config mine.yaml \
        storage.root_uri=s3://bucket/invar
"""

from __future__ import annotations

import time

from invar_ray.pipeline import Pipeline
from invar_ray.store.artifacts import Artifact
from invar_ray.store.publication import Version
from invar_ray.store.published import Published
from jobs.entry import run_job

_COUNTED = ("embedded", "reused", "tombstones")


def main(pipeline: Pipeline) -> None:
    """Print what it took and the index's URI; several shards are published, and one that takes the
    place of several.
    """
    published = Published(pipeline.store)
    before = published.current()
    shards = report(pipeline)
    if len(shards) > 1 or (before is not None and len(before.index) > 1):
        publish(published, shards, before.number if before else 0)


def publish(
    published: Published, shards: tuple[Artifact, ...], expected: int, note: str = ""
) -> Version:
    """Make an index current, all its shards at once, if version ``expected`` still is."""
    # Shards have been read and verified, each where it was built.
    version = published.publish(shards, expected=expected, note=note, verify=len(shards) == 1)
    done = "is current already" if version.number == expected else "is current now"
    print(f"version {version.number} {done}; serve it with index_uri: {published.uri}")
    return version


def report(pipeline: Pipeline) -> tuple[Artifact, ...]:
    """Make the index, print what it took and the URI of each shard."""
    started = time.monotonic()
    shards = pipeline.reindexed
    passages = pipeline.passages.info
    made = [index.parent("vectors").info for index in shards]
    print(f"{'step':<40}{'wall s':>10}{'CPU s here':>12}")
    for label, seconds in pipeline.seconds.items():
        print(f"{label:<40}{seconds:>10.1f}{pipeline.cpu_seconds.get(label, 0.0):>12.1f}")
    count = {key: sum(vectors[key] for vectors in made) for key in _COUNTED}
    usage = [vectors["usage"] for vectors in made]
    cpu = {key: sum(each["cpu_s"][key] for each in usage) for key in ("start", "encode", "driver")}
    padding = max(each["padding_share"] for each in usage)
    print(
        f"embedding: {count['embedded']:,} passages embedded, {count['reused']:,} re-used, "
        f"{count['tombstones']:,} tombstones; padding {padding:.1%}; "
        f"CPU s: {cpu['start']:.1f} start-up, {cpu['encode']:.1f} encoding, {cpu['driver']:.1f} "
        "driver"
    )
    print(
        f"{passages['documents']:,} documents, {passages['passages']:,} passages, "
        f"{time.monotonic() - started:.1f} s"
    )
    for index in shards:
        print(f"index: {index.uri}")
    return shards


if __name__ == "__main__":
    run_job(__doc__, main)
