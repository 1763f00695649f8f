"""Which ``retriever.invariance_weight`` fits a base and questions: stage 1 once for each of
``weights``, judged on train titles that are set aside.  The dev questions are not looked at.

Command::

    python -m jobs.tune_retriever --config tiny weights=0,40,160
"""

from __future__ import annotations

from invar_ray.cli.tune import WEIGHTS, advice, parse_weights, render, run_trials
from invar_ray.pipeline import Pipeline
from jobs.entry import run_job


def main(pipeline: Pipeline, options: dict[str, str]) -> None:
    """Print the trials and what to set."""
    trials = run_trials(
        pipeline.config, parse_weights(options["weights"]), executor=pipeline.executor
    )
    print(render(trials))
    print(advice(trials))


if __name__ == "__main__":
    run_job(__doc__, main, {"weights": ",".join(f"{weight:g}" for weight in WEIGHTS)})
