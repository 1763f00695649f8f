"""Which ``retriever.invariance_weight`` and ``search.dense_weight`` fit a base and questions: stage
1 once for each of ``weights``, judged on train titles that are set aside.  The dev questions are
not looked at.

Command::

    python -m jobs.tune_retriever --config tiny weights=0,40,160
"""

from __future__ import annotations

from invar_ray.cli.tune import WEIGHTS, parse_weights, run_trials, told
from invar_ray.pipeline import Pipeline
from jobs.entry import run_job


def main(pipeline: Pipeline, options: dict[str, str]) -> None:
    """Print the trials and what to set."""
    trials = run_trials(
        pipeline.config, parse_weights(options["weights"]), executor=pipeline.executor
    )
    print(told(trials))


if __name__ == "__main__":
    run_job(__doc__, main, {"weights": ",".join(f"{weight:g}" for weight in WEIGHTS)})
