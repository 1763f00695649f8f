"""Stage 2: the ``generator`` artifact, a LoRA adapter that answers from what was retrieved, and in
its manifest how sure it has to be to answer.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from invar_ray.answering.certainty import Tried, fit, signs_of
from invar_ray.answering.rag import STOP_STRINGS, build_prompt
from invar_ray.config import Config, to_dict
from invar_ray.console import Progress
from invar_ray.executor import Executor
from invar_ray.models.adapters import load_adapter
from invar_ray.models.base import BaseRef
from invar_ray.models.generator import Generator
from invar_ray.models.loading import open_model
from invar_ray.models.precision import inference_device, inference_precision
from invar_ray.schema import Hit
from invar_ray.store.artifacts import Artifact, Building, Plan
from invar_ray.text.answers import contains_answer
from invar_ray.text.prompts import parse_answer
from invar_ray.training.sequences import ReadingSet, silenced
from invar_ray.training.trainer import train

VERSION = 10
_CALIBRATED_ON = 80
"""Train questions, each asked with what answers it and without."""
_KINDS = {True: "answerable", False: "unanswerable"}


def plan(config: Config, base: BaseRef, readings: Artifact) -> Plan:
    """The stage-2 adapter."""
    return Plan(
        kind="generator",
        name=config.name,
        config={
            "base": base.fingerprint,
            "generator": to_dict(config.generator) | to_dict(config.experimental.generator),
            "quantize": config.experimental.model.quantize,
            "precision": config.model.precision,
            "seed": config.seed,
        },
        parents={"readings": readings},
        version=VERSION,
    )


def build(
    building: Building, config: Config, base: BaseRef, readings: Artifact, *, executor: Executor
) -> None:
    """Stage 2: fill an adapter artifact.

    Args:
        building: gets it.
        config: the run.
        base: what is adapted.
        readings: questions with what was retrieved for them.
        executor: trains, on Ray.

    Raises:
        ResourceError: if the cluster cannot run the workers, or they keep failing.
    """
    reference = asdict(base)
    inputs = {"readings": readings.ref, "base": reference}
    with executor.on_cluster("training of the generator"):
        train(building, config, "generator", inputs, readings.store.root_uri)
    building.info |= {
        "base": reference,
        "precision": config.model.precision,
        "max_context": config.generator.max_tokens,
        "max_new_tokens": config.generator.max_new_tokens,
    }
    risk = config.experimental.generator.abstention_risk
    if risk is not None and (tried := _tried(building, config, base, readings)) is not None:
        made = fit(tried, risk, config.experimental.generator.abstention_unanswerable)
        building.info["certainty"] = None if made is None else made.to_json()
        building.info["tried"] = summary(tried)


def _tried(
    building: Building, config: Config, base: BaseRef, readings: Artifact
) -> list[Tried] | None:
    """The new generator's answers to train questions; ``None`` where it cannot be asked here."""
    device = inference_device(config.scale)
    if device != "cpu" and not torch.cuda.is_available():
        print("  this process has no GPU: the generator is not calibrated and never abstains")
        return None
    precision = inference_precision(config)
    model, tokenizer = open_model(base, readings.store, precision, device)
    adapted = load_adapter(model, building.path / "adapter", merge=True)
    generator = Generator(adapted, tokenizer, config.generator.max_tokens)
    asked = calibration_set(ReadingSet(readings), config, _CALIBRATED_ON)
    return try_answers(generator, asked, config)


@dataclass(frozen=True)
class Asked:
    """A question as the calibration asks it.

    Attributes:
        question_id: which.
        wording: of the question.
        answers: gold ones.
        hits: the passages to read.
        answerable: whether they are those that were found for it.
    """

    question_id: str
    wording: str
    answers: tuple[str, ...]
    hits: tuple[Hit, ...]
    answerable: bool


def calibration_set(readings: ReadingSet, config: Config, count: int) -> list[Asked]:
    """Train questions in one of their wordings, each asked twice: with what was found for it, and
    without what answers it.

    The latter is by turns a corpus without the question's documents, and documents without the
    sentences that hold an answer, as where somebody asks what a text about the right thing does not
    say.  Questions that stage 2 trained on least go first.

    Args:
        readings: what stage 2 trains on.
        config: its steps and seed.
        count: how many questions.
    """
    settings = config.generator
    drawn = Counter(readings.step_rows(config.seed, 0, settings.steps * settings.global_batch_size))
    rng = random.Random(config.seed)
    order = rng.sample(range(len(readings)), len(readings))
    asked: list[Asked] = []
    for number, place in enumerate(sorted(order, key=drawn.__getitem__)[:count]):
        row = readings.rows[place]
        wording = rng.randrange(len(row["wordings"]))
        found = row["hits"][wording]
        gold = [hit["document_id"] in row["positive_ids"] for hit in found]
        quiet = [
            {**hit, "texts": [silenced(hit["texts"][0], row["answers"])]} if is_gold else hit
            for hit, is_gold in zip(found, gold, strict=True)
        ]
        told = any(
            is_gold and contains_answer(hit["title"], row["answers"])
            for hit, is_gold in zip(quiet, gold, strict=True)
        )
        if number % 2 == 0 and any(gold) and not told:
            without = quiet
        else:
            without = [hit for hit, is_gold in zip(found, gold, strict=True) if not is_gold]
        for hits, answerable in ((found, True), (without, False)):
            asked.append(
                Asked(
                    row["question_id"],
                    row["wordings"][wording],
                    tuple(row["answers"]),
                    _hits(hits[: settings.top_k]),
                    answerable,
                )
            )
    return asked


def _hits(found: Sequence[Mapping[str, Any]]) -> tuple[Hit, ...]:
    return tuple(
        Hit(each["passage_id"], each["document_id"], rank, 0.0, each["title"], each["texts"][0])
        for rank, each in enumerate(found, start=1)
    )


def try_answers(generator: Generator, asked: Sequence[Asked], config: Config) -> list[Tried]:
    """What a generator answers, with its signs, and whether it is right.

    Args:
        generator: answers.
        asked: questions with the passages to read.
        config: lengths and batches.
    """
    length, size = config.generator.max_new_tokens, config.evaluation.answer_batch_size
    asked = sorted(asked, key=lambda each: sum(len(hit.text) for hit in each.hits))
    tried: list[Tried] = []
    progress = Progress("calibrate", len(asked), "answers")
    for start in range(0, len(asked), size):
        batch = asked[start : start + size]
        prompts = [
            build_prompt(generator, each.wording, each.hits, max_new_tokens=length)
            for each in batch
        ]
        made = generator.generate(
            [prompt.text for prompt in prompts], max_new_tokens=length, stop=STOP_STRINGS
        )
        for each, prompt, generation in zip(batch, prompts, made, strict=True):
            parsed = parse_answer(generation.text, len(prompt.hits))
            signs = signs_of(each.wording, prompt.hits, prompt.shown, parsed.text, generation)
            tried.append(
                Tried(
                    each.question_id,
                    each.answerable,
                    None if parsed.refused else signs,
                    contains_answer(parsed.text, each.answers),
                )
            )
        progress.advance(len(batch))
    return tried


def summary(tried: Sequence[Tried]) -> dict[str, dict[str, int]]:
    """How many answers are right, wrong and refused by the model itself, before any threshold:
    ``answerable`` and ``unanswerable`` -> outcome -> number.
    """
    counts = {kind: dict.fromkeys(("right", "wrong", "refused"), 0) for kind in _KINDS.values()}
    for each in tried:
        said = "refused" if each.signs is None else "right" if each.right else "wrong"
        counts[_KINDS[each.answerable]][said] += 1
    return counts
