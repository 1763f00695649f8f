"""Serve the trained system over HTTP until Ctrl-C.

Command::

    python -m jobs.serve_answers --config tiny serve.port=8000
"""

from __future__ import annotations

from invar_ray.pipeline import Pipeline, start_service
from jobs.entry import run_job


def main(pipeline: Pipeline) -> None:
    """Make what is missing, then serve."""
    index, generator = pipeline.index, pipeline.generator
    pipeline.session.ensure()
    start_service(index, generator, pipeline.config.serve, blocking=True)


if __name__ == "__main__":
    run_job(__doc__, main)
