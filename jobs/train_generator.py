"""Stage 2: train the ``generator`` adapter on what the served index retrieves.

Command::

    python -m jobs.train_generator --config tiny
"""

from __future__ import annotations

from invar_ray.pipeline import Pipeline
from jobs.entry import run_job


def main(pipeline: Pipeline) -> None:
    """Print the adapter's URI."""
    print(f"adapter: {pipeline.generator.uri}")


if __name__ == "__main__":
    run_job(__doc__, main)
