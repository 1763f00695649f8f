"""Which weights fit a base and questions that nobody has measured: of the invariance loss, and of
vectors against words in a hybrid search.

The dev questions are never looked at: a share of the train titles is set aside, stage 1 is trained
once for each weight of the loss on the rest, and what is set aside decides; then the retriever of
that weight decides between weights of a hybrid search, by the same rule.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NamedTuple

from invar_ray import console
from invar_ray.answering.fusion import fuse_lists, fusion_depth
from invar_ray.answering.retriever import has_bm25
from invar_ray.config import Config
from invar_ray.errors import ConfigError
from invar_ray.evaluation.metrics import first_ranks
from invar_ray.evaluation.variance import Family, family_values, known
from invar_ray.executor import Executor
from invar_ray.pipeline import Pipeline
from invar_ray.schema import Hit, Mode
from invar_ray.steps import hits
from invar_ray.steps.questions import load_examples, load_wordings
from invar_ray.training.batches import Trainset
from invar_ray.training.stage import HELDOUT, HELDOUT_OVERLAP

WEIGHTS = (0.0, 10.0, 40.0, 160.0)
"""At the default temperature of 0.1: what counts is weight / temperature^2."""
HELDOUT_SHARE = 0.2
DENSE_WEIGHTS = tuple(number / 10 for number in range(2, 11))
"""Of a hybrid search; 1 is a dense one."""
_OVERLAP_K = 10
_QUESTIONS = 1000  # asked for a hybrid search, at most


@dataclass(frozen=True)
class Trial:
    """What is found with a weight, on questions under titles that stage 1 never saw.

    Attributes:
        weight: ``retriever.invariance_weight`` or ``search.dense_weight``.
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


class Trials(NamedTuple):
    """What was tried.

    Attributes:
        loss: a trial for each weight of the loss, in the order asked.
        hybrid: one for each of :data:`DENSE_WEIGHTS`, over the whole corpus, with the retriever of
            the weight that ``loss`` advises; none where searches are not hybrid, the index has no
            BM25, or no question a rewrite.
    """

    loss: list[Trial]
    hybrid: list[Trial]


def run_trials(
    config: Config, weights: Sequence[float] = WEIGHTS, *, executor: Executor | None = None
) -> Trials:
    """Train stage 1 once for each weight, in their order, then search; what stands of an earlier
    call is re-used.

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
        console.say(_advice("retriever.invariance_weight", trials))
        return Trials(trials, _hybrid_trials(pipeline.arm(names[chosen(trials).weight])))


def _hybrid_trials(arm: Pipeline) -> list[Trial]:
    """Search with an arm's retriever for the questions that it did not train on."""
    if arm.config.search.mode != "hybrid":
        return []
    index = arm.index
    if not has_bm25(index):
        return []
    config, questions = arm.config, arm.questions
    trainset = Trainset(arm.trainset)
    trainset.hold_out(config.experimental.retriever.heldout_share, config.seed)
    draw = random.Random(f"{config.seed}-hybrid")
    rows = draw.sample(trainset.heldout, min(_QUESTIONS, len(trainset.heldout)))
    held = {trainset.question_ids[row] for row in rows}
    examples = [each for each in load_examples(questions, "train") if each.id in held]
    wordings = load_wordings(questions, "train")
    asked = [wordings[example.id] for example in examples]
    if max(map(len, asked)) == 1:
        return []

    def lists(mode: Mode) -> list[list[list[Hit]]]:
        label = f"search what was set aside, {mode}"
        depth, how = fusion_depth(_OVERLAP_K), hits.SearchMode(mode=mode)
        found = hits.search(config, index, asked, depth, how, label=label, executor=arm.executor)
        return [[[Hit(**hit) for hit in hits] for hits in family] for family in found]

    by_vectors, by_words = lists("dense"), lists("bm25")

    def trial(weight: float) -> Trial:
        families = [
            Family(
                [
                    first_ranks(hit.document_id for hit in fuse_lists(*both, _OVERLAP_K, weight))
                    for both in zip(near, worded, strict=True)
                ],
                example.positive_ids,
            )
            for example, near, worded in zip(examples, by_vectors, by_words, strict=True)
        ]
        columns = family_values(families, overlap_k=_OVERLAP_K, ks=(5,))
        names = "recall_at_5", "worst_recall_at_5", f"overlap_at_{_OVERLAP_K}"
        recall, worst, overlap = (fmean(known(columns[name])) for name in names)
        return Trial(weight, recall, worst, overlap, len(families))

    return [trial(weight) for weight in DENSE_WEIGHTS]


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


def told(trials: Trials) -> str:
    """All trials, then what to set, and why."""
    parts = [render(trials.loss)]
    if trials.hybrid:
        parts += ["vectors against words in a hybrid search:", render(trials.hybrid)]
    parts.append(_advice("retriever.invariance_weight", trials.loss))
    if trials.hybrid:
        parts.append(_advice("search.dense_weight", trials.hybrid))
    return "\n".join(parts)


def _advice(setting: str, trials: Sequence[Trial]) -> str:
    taken = chosen(trials)
    best = max(trials, key=lambda trial: trial.recall)
    return (
        f"{setting}={taken.weight:g}: the steadiest of those whose Recall@5 is "
        f"at least {best.recall - best.error:.3f}, the best less one standard error "
        f"({taken.questions} questions under titles that were set aside)"
    )
