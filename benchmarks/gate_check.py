"""The gate on real reports: what it lets through and what it stops.

    .venv/bin/python -m benchmarks.gate_check --config tiny retriever.steps=40

Four systems over the same dev questions: the *baseline* (the recipe), a candidate that was trained
twice as long, one trained without the invariance loss as long as the baseline, and a broken one,
the baseline's adapter with noise of ``--noise`` times each weight's standard deviation.  Each
report goes through ``invar-ray gate`` against the baseline's. The baseline itself and the longer
trained one must pass, the broken one must not; the one without the invariance loss must be stopped
where its variance is higher.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from invar_ray.config import Config, load_config
from invar_ray.models.encoder import llm_spec
from invar_ray.pipeline import Pipeline
from invar_ray.store.artifacts import Artifact, Building, Plan

ROW = "stage 1"


def noisy(pipeline: Pipeline, noise: float) -> Artifact:
    """The stage-1 adapter with Gaussian noise of ``noise`` times the standard deviation of each of
    its matrices.
    """
    whole = pipeline.retriever
    plan = Plan("retriever", "noisy", {"noise": noise}, {"retriever": whole})

    def body(building: Building) -> None:
        shutil.copytree(whole.path("adapter"), building.path / "adapter")
        file = building.path / "adapter" / "adapter_model.safetensors"
        weights, generator = load_file(file), torch.Generator().manual_seed(0)
        for name, value in weights.items():
            weights[name] = value + noise * value.std() * torch.randn(
                value.shape, generator=generator
            )
        save_file(weights, file)
        spec = llm_spec(pipeline.config.model, pipeline.base, (plan.ref, plan.fingerprint))
        building.info |= {"encoder": spec.to_json()}

    return pipeline.store.get_or_build(plan, body)[0]


def reports(config: Config, noise: float) -> dict[str, Artifact]:
    """The reports of all systems, by what they are."""
    steps, stage = config.retriever.steps, config.retriever
    runs = {
        "baseline": stage,
        "trained twice as long": replace(stage, steps=2 * steps),
        "without the invariance loss": replace(stage, invariance_weight=0.0),
        "broken": stage,
    }
    made: dict[str, Artifact] = {}
    for name, settings in runs.items():
        with Pipeline(replace(config, retriever=settings)) as pipeline:
            if name == "broken":
                # in the place of the one that was trained
                pipeline.__dict__["retriever"] = noisy(pipeline, noise)
            made[name] = pipeline.report
    return made


def gate(baseline: Artifact, candidate: Artifact, limits: list[str]) -> int:
    """Run ``invar-ray gate`` as a user does; its exit code."""
    files = [str(report.path("report.json")) for report in (baseline, candidate)]
    invar = str(Path(sys.executable).with_name("invar-ray"))
    command = [invar, "gate", "--baseline", files[0], "--candidate", files[1]]
    command += ["--system", ROW, *limits]
    return subprocess.run(command, check=False).returncode


def main() -> int:
    """Make the reports, print what the gate says, and whether it did right."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--noise", type=float, default=3.0)
    parser.add_argument("--limits", default="", help="further options of the gate, in quotes")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    retrieval_only = ["evaluation.num_answers=0", "evaluation.systems=[base, stage1]"]
    config = load_config(arguments.config, [*retrieval_only, *arguments.overrides])
    made = reports(config, arguments.noise)
    codes = {}
    for name, report in made.items():
        metrics = next(row["metrics"] for row in report.info["rows"] if row["system"] == ROW)
        shown = ", ".join(
            f"{key} {metrics[key]:.4f}"
            for key in ("recall_at_5", "worst_recall_at_5", "overlap_at_5")
        )
        print(f"\n== {name}: {shown}", flush=True)
        codes[name] = gate(made["baseline"], report, arguments.limits.split())
    print("\n" + "\n".join(f"{name}: exit {code}" for name, code in codes.items()))
    return (
        0
        if [codes["baseline"], codes["trained twice as long"], codes["broken"]] == [0, 0, 1]
        else 1
    )


if __name__ == "__main__":
    sys.exit(main())
