"""Mine hard negatives, cut windows and take the teacher's vectors: what stage 1 trains on.

Command::

    python -m jobs.mine_negatives --config tiny
"""

from __future__ import annotations

from invar_ray.pipeline import Pipeline
from jobs.entry import run_job


def main(pipeline: Pipeline) -> None:
    """Print the training set's URI and what mining kept and dropped."""
    print(f"training set: {pipeline.trainset.uri}")
    print(f"mined: {pipeline.trainset.info['mining']}")


if __name__ == "__main__":
    run_job(__doc__, main)
