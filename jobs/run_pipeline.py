r"""The whole way: corpus -> index -> stage 1 -> reindex -> stage 2 -> report.

Command::

    python -m jobs.run_pipeline --config tiny
    ray job submit --working-dir . -- python -m jobs.run_pipeline --config demo \
        storage.root_uri=/shared/runs/demo
"""

from __future__ import annotations

from pathlib import Path

from invar_ray.evaluation.report import write_report
from invar_ray.pipeline import Pipeline
from invar_ray.store.published import Published
from jobs.entry import run_job


def main(pipeline: Pipeline) -> None:
    """Run it, make its index current; print the table; write ``report.json`` at the top of a local
    storage root.
    """
    report = pipeline.run()
    Published(pipeline.store).publish([pipeline.index], verify=False)
    print(pipeline.report.path("table.txt").read_text(encoding="utf-8"))
    if pipeline.store.is_local:
        print(f"report: {write_report(report, Path(pipeline.store.root, 'report.json'))}")


if __name__ == "__main__":
    run_job(__doc__, main)
