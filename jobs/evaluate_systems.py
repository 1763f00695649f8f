"""Evaluate base, stage 1 and both stages on the dev questions.

Command::

    python -m jobs.evaluate_systems --config tiny
"""

from __future__ import annotations

from invar_ray.pipeline import Pipeline
from jobs.entry import run_job


def main(pipeline: Pipeline) -> None:
    """Print the table and the report's URI."""
    print(pipeline.report.path("table.txt").read_text(encoding="utf-8"))
    print(f"report: {pipeline.report.uri}")
    pipeline.keep_numbers()


if __name__ == "__main__":
    run_job(__doc__, main)
