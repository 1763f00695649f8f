"""Embed the corpus with the bare base and with MiniLM: the start of stage 1, and two rows of every
report.

Command::

    python -m jobs.index_base --config tiny
"""

from __future__ import annotations

from invar_ray.pipeline import Pipeline
from jobs.entry import run_job


def main(pipeline: Pipeline) -> None:
    """Print both URIs."""
    print(f"base index: {pipeline.base_index.uri}")
    print(f"coarse index: {pipeline.coarse_index.uri}")


if __name__ == "__main__":
    run_job(__doc__, main)
