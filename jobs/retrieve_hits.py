"""Materialise what the training and dev questions retrieve from the served index.

Command::

    python -m jobs.retrieve_hits --config tiny
"""

from __future__ import annotations

from invar_ray.pipeline import Pipeline
from jobs.entry import run_job


def main(pipeline: Pipeline) -> None:
    """Print both URIs."""
    for split in ("train", "dev"):
        print(f"{split} hits: {pipeline.hits(pipeline.index, split).uri}")


if __name__ == "__main__":
    run_job(__doc__, main)
