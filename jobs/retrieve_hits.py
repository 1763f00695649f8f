"""Materialise what the training and dev questions retrieve from the served index, and what stage 2
reads of it (every passage in its windows).

Command::

    python -m jobs.retrieve_hits --config tiny
"""

from __future__ import annotations

from invar_ray.pipeline import Pipeline
from jobs.entry import run_job


def main(pipeline: Pipeline) -> None:
    """Print their URIs."""
    for split in ("train", "dev"):
        print(f"{split} hits: {pipeline.hits(pipeline.index, split).uri}")
    print(f"readings for stage 2: {pipeline.readings.uri}")


if __name__ == "__main__":
    run_job(__doc__, main)
