r"""Prove that an index is sound: counts, checksums, unique ids, contents, probes, and vectors
encoded again.

Checks the newest index of ``index.encoder`` below ``storage.root_uri`` that this recipe's name has
(all shards of it, where the current version has several), or the one that ``uri=`` names.  Exits 1
if anything is wrong.

Command::

    python -m jobs.verify_index --config tiny
    python -m jobs.verify_index --config tiny uri=/shared/index/index/minilm-0123456789abcdef \
        samples=512
"""

from __future__ import annotations

import sys

from invar_ray.config import Config
from invar_ray.errors import ConfigError, MissingArtifactError
from invar_ray.models.precision import inference_device
from invar_ray.pipeline import Pipeline
from invar_ray.steps.shards import name as shard_name
from invar_ray.steps.verify import verify_index
from invar_ray.store.artifacts import Artifact, Store, open_artifact
from invar_ray.store.published import Published
from jobs.entry import run_job

_OPTIONS = {"uri": "", "samples": "256"}


def main(pipeline: Pipeline, options: dict[str, str]) -> None:
    """Print a line a check."""
    indexes = (
        [open_artifact(options["uri"], "index")]
        if options["uri"]
        else newest(pipeline.store, pipeline.config)
    )
    if not options["samples"].isdigit() or int(options["samples"]) < 1:
        raise ConfigError(f"samples is {options['samples']!r}", expected="a number above 0")
    faults = 0
    for index in indexes:
        print(f"{index.uri}, made {index.manifest.created}")
        found = verify_index(
            index,
            samples=int(options["samples"]),
            seed=pipeline.config.seed,
            device=inference_device(pipeline.config.scale),
        )
        faults += len(found.faults)
        for line in found.lines:
            print(line)
    if faults:
        print(f"{faults} faults: this index must not be served", file=sys.stderr)
        sys.exit(1)


def newest(store: Store, config: Config) -> list[Artifact]:
    """The newest index that ``jobs.reindex`` made with ``index.encoder``, one artifact a shard.

    Raises:
        MissingArtifactError: there is none.
    """
    # The index of an adapter that a URI names is called as that of the run's own.
    name = "retriever" if "/" in config.index.encoder else config.index.encoder

    def fits(index: Artifact, name: str = name) -> bool:
        passages = index.manifest.parents.get("passages", "")
        return index.manifest.name == name and passages.startswith(f"passages/{config.name}-")

    found = store.newest("index", fits)
    version = Published(store).current()
    if version is not None and len(version.index) > 1:
        # Shards belong together by their version alone.
        shards, count = Published(store).open(version), len(version.index)
        whole = all(fits(each, f"{name}-{shard_name(at, count)}") for at, each in enumerate(shards))
        last = max(shard.manifest.created for shard in shards)
        if whole and (found is None or last > found.manifest.created):
            return shards
    if found is not None:
        return [found]
    raise MissingArtifactError(
        f"no index {config.index.encoder!r} of {config.name!r} below {store.root_uri}",
        action="run python -m jobs.reindex first, or name one: "
        "uri=<root>/index/<name>-<fingerprint>",
    )


if __name__ == "__main__":
    run_job(__doc__, main, _OPTIONS)
