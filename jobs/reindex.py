"""Embed the corpus and build the index that is served; trains stage 1 first only if its adapter is missing.

Command::

    python -m jobs.reindex --config tiny
"""

from __future__ import annotations

from invar_ray.pipeline import Pipeline
from jobs.entry import run_job


def main(pipeline: Pipeline) -> None:
    """Print the index's URI."""
    print(f"index: {pipeline.index.uri}")


if __name__ == "__main__":
    run_job(__doc__, main)
