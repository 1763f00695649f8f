"""Stage 1: train the ``retriever`` adapter.

Command::

    python -m jobs.train_retriever --config tiny scale.num_workers=4
"""

from __future__ import annotations

from invar_ray.pipeline import Pipeline
from jobs.entry import run_job


def main(pipeline: Pipeline) -> None:
    """Print the adapter's URI."""
    print(f"adapter: {pipeline.retriever.uri}")


if __name__ == "__main__":
    run_job(__doc__, main)
