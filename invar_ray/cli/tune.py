"""Which weight the invariance loss should have on a base and questions that nobody has measured.

The dev questions are never looked at: a share of the train titles is set aside, stage 1 is trained
once for each weight on the rest, and what is set aside decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from invar_ray import console
from invar_ray.config import Config
from invar_ray.errors import ConfigError
from invar_ray.executor import Executor
from invar_ray.pipeline import Pipeline
from invar_ray.training.stage import HELDOUT, HELDOUT_OVERLAP

WEIGHTS = (0.0, 10.0, 40.0, 160.0)
"""At the default temperature of 0.1: what counts is weight / temperature^2."""
HELDOUT_SHARE = 0.2


@dataclass(frozen=True)
class Trial:
    """What stage 1 reaches with a weight, on questions under titles that it never saw.

    Attributes:
        weight: ``retriever.invariance_weight``.
        recall: Recall@5 of the questions as asked.
        worst: share of the questions that have it in every wording.
        overlap: overlap@10 between the wordings.
        questions: how many were asked.
    """

    weight: float
    recall: float
    worst: float
    overlap: float
    questions: int

    @property
    def error(self) -> float:
        """Standard error of ``recall``."""
        return math.sqrt(self.recall * (1.0 - self.recall) / self.questions)


def run_trials(
    config: Config, weights: Sequence[float] = WEIGHTS, *, executor: Executor | None = None
) -> list[Trial]:
    """Train stage 1 once for each weight, in their order; what stands of an earlier call is
    re-used.

    Args:
        config: the run. Its ``experimental.retriever.heldout_share`` is taken, or 0.2 where it is
            0; its dev questions are not.
        weights: at least one, none negative, no two the same.
        executor: see :class:`invar_ray.pipeline.Pipeline`.

    Raises:
        ConfigError: the weights are none of these.
        DataError: there are too few titles to set some aside.
    """
    usable = all(0.0 <= weight < math.inf for weight in weights)
    if not weights or not usable or len(set(weights)) < len(weights):
        raise ConfigError(
            f"weights are {list(weights)}",
            expected="one or more numbers from 0 on, each once",
            action="for instance --weights 0,10,40,160",
        )
    extra = config.experimental.retriever
    aside = replace(
        extra,
        heldout_share=extra.heldout_share or HELDOUT_SHARE,
        heldout_every=config.retriever.steps,  # at the end: each trial has all its steps
        heldout_patience=None,
    )
    names = {weight: f"weight-{weight:g}".replace(".", "_") for weight in weights}
    asked = replace(
        config,
        experimental=replace(config.experimental, retriever=aside),
        evaluation=replace(
            config.evaluation,
            arms={name: {"retriever": {"invariance_weight": w}} for w, name in names.items()},
        ),
    )
    trials = []
    with Pipeline(asked, executor=executor) as pipeline:
        for weight in weights:
            found = pipeline.arm(names[weight]).retriever.info["final"]
            trials.append(
                Trial(
                    weight,
                    found["heldout_recall_at_5"],
                    found[HELDOUT],
                    found[HELDOUT_OVERLAP],
                    int(found["heldout_questions"]),
                )
            )
            console.say(render(trials[-1:]))
    return trials


def parse_weights(text: str) -> list[float]:
    """``0,10,40`` as numbers.

    Raises:
        ConfigError: one is no number.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"weights are {text!r}", expected="numbers with commas between", action="0,10,40,160"
        ) from error


def chosen(trials: Sequence[Trial]) -> Trial:
    """The steadiest of those whose recall is within one standard error of the best: recall first.
    Of equals the lighter weight.
    """
    best = max(trials, key=lambda trial: trial.recall)
    fit = [trial for trial in trials if trial.recall >= best.recall - best.error]
    return max(fit, key=lambda trial: (trial.overlap, -trial.weight))


def render(trials: Sequence[Trial]) -> str:
    """A line a trial."""
    return "\n".join(
        f"weight {trial.weight:>5g}: Recall@5 {trial.recall:.3f} (standard error "
        f"{trial.error:.3f}), in every wording {trial.worst:.3f}, overlap@10 {trial.overlap:.3f}"
        for trial in trials
    )


def advice(trials: Sequence[Trial]) -> str:
    """What to set, and why."""
    taken = chosen(trials)
    best = max(trials, key=lambda trial: trial.recall)
    return (
        f"retriever.invariance_weight={taken.weight:g}: the steadiest of those whose Recall@5 is "
        f"at least {best.recall - best.error:.3f}, the best less one standard error "
        f"({taken.questions} questions under titles that were set aside)"
    )
