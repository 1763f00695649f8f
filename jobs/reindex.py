r"""Bring the index up to the corpus: read, cut, embed what is new or changed, build.  Run it again
after a kill.

``index.encoder`` says with what: ``retriever`` (the base with this run's stage-1 adapter, trained
first if it is missing), ``base``, ``minilm``, or the URI of a stage-1 adapter that stands already.
Where an earlier version stands that the same encoder made, only new and changed passages are
embedded (``scale.incremental=false`` embeds all).

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
from jobs.entry import run_job


def main(pipeline: Pipeline) -> None:
    """Print what it took and the index's URI."""
    started = time.monotonic()
    index = pipeline.reindexed
    passages, vectors = index.parent("passages").info, index.parent("vectors").info
    print(f"{'step':<40}{'wall s':>10}{'CPU s here':>12}")
    for label, seconds in pipeline.seconds.items():
        print(f"{label:<40}{seconds:>10.1f}{pipeline.cpu_seconds.get(label, 0.0):>12.1f}")
    usage = vectors["usage"]
    cpu = usage["cpu_s"]
    print(
        f"embedding: {vectors['embedded']:,} passages embedded, {vectors['reused']:,} re-used, "
        f"{vectors['tombstones']:,} tombstones; padding {usage['padding_share']:.1%}; "
        f"CPU s: {cpu['start']:.1f} start-up, {cpu['encode']:.1f} encoding, {cpu['driver']:.1f} "
        "driver"
    )
    print(
        f"{passages['documents']:,} documents, {passages['passages']:,} passages, "
        f"{time.monotonic() - started:.1f} s"
    )
    print(f"index: {index.uri}")


if __name__ == "__main__":
    run_job(__doc__, main)
