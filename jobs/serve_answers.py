"""Serve the trained system over HTTP until Ctrl-C.

Command::

    python -m jobs.serve_answers --config tiny serve.port=8000
"""

from __future__ import annotations

from invar_ray.cli.serving import serve_until_stopped
from invar_ray.pipeline import Pipeline
from jobs.entry import run_job


def main(pipeline: Pipeline) -> None:
    """Serve what is current; what is missing is an error."""
    serve_until_stopped(pipeline.config)


if __name__ == "__main__":
    run_job(__doc__, main)
