r"""Reindex and make the result current for services that follow it: the nightly job.

What is current is looked at before the work begins.  If another job publishes meanwhile, this one
changes nothing and exits 1: its result stands as an artifact, and the next night's job finds it.

Command::

    python -m jobs.publish_index --config tiny
    python -m jobs.publish_index --config mine.yaml index.factory=auto published=main keep=5 \
        note=nightly
    ray job submit --working-dir . -- python -m jobs.publish_index --config mine.yaml \
        storage.root_uri=s3://bucket/invar
"""

from __future__ import annotations

from invar_ray.errors import ConfigError
from invar_ray.pipeline import Pipeline
from invar_ray.store.garbage import collect
from invar_ray.store.published import Published
from jobs import reindex
from jobs.entry import run_job

_OPTIONS = {"published": "main", "keep": "0", "note": ""}
_MIN_AGE_S = 3600.0


def main(pipeline: Pipeline, options: dict[str, str]) -> None:
    """Print what was indexed, published and removed."""
    if not options["keep"].isdigit():
        raise ConfigError(
            f"keep is {options['keep']!r}", expected="how many versions stay; 0 keeps all"
        )
    published = Published(pipeline.store, options["published"])
    before = published.current()
    shards = reindex.report(pipeline)
    reindex.publish(published, shards, before.number if before else 0, options["note"])
    if int(options["keep"]):
        gone = collect(published, int(options["keep"]), min_age_s=_MIN_AGE_S)
        print(f"gave up {len(gone.versions)} versions, removed {len(gone.removed)} artifacts")


if __name__ == "__main__":
    run_job(__doc__, main, _OPTIONS)
