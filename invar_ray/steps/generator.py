"""Stage 2: the ``generator`` artifact, a LoRA adapter that answers from what was retrieved, and in
its manifest how sure it has to be to answer.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow.parquet as pq
import torch

from invar_ray.answering.certainty import Certainty, Signs, fit, signs_of
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
from invar_ray.steps.readings import READINGS
from invar_ray.store.artifacts import Artifact, Building, Plan
from invar_ray.text.answers import contains_answer
from invar_ray.text.prompts import parse_answer
from invar_ray.training.trainer import train

VERSION = 7
_CALIBRATED_ON = 40
"""Train questions, each asked with its documents and without them."""


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
    if risk is not None:
        made = _calibrated(building, config, base, readings, risk)
        building.info["certainty"] = None if made is None else made.to_json()


def _calibrated(
    building: Building, config: Config, base: BaseRef, readings: Artifact, risk: float
) -> Certainty | None:
    """How sure the new generator has to be, from its answers to train questions."""
    device = inference_device(config.scale)
    if device != "cpu" and not torch.cuda.is_available():
        print("  this process has no GPU: the generator is not calibrated and never abstains")
        return None
    precision = inference_precision(config)
    model, tokenizer = open_model(base, readings.store, precision, device)
    adapted = load_adapter(model, building.path / "adapter", merge=True)
    generator = Generator(adapted, tokenizer, config.generator.max_tokens)
    rows: list[dict[str, Any]] = pq.read_table(readings.path(READINGS)).to_pylist()
    chosen = random.Random(config.seed).sample(rows, min(_CALIBRATED_ON, len(rows)))
    asked = [
        (row, hits) for row in chosen for hits in (_hits(row), _hits(row, row["positive_ids"]))
    ]
    signs, right = answer_signs(generator, asked, config)
    return fit(signs, right, risk)


def _hits(row: Mapping[str, Any], without: Sequence[str] = ()) -> list[Hit]:
    """What a question's first wording found, but for passages of some documents."""
    kept = [found for found in row["hits"][0] if found["document_id"] not in without]
    return [
        Hit(each["passage_id"], each["document_id"], rank, 0.0, each["title"], each["texts"][0])
        for rank, each in enumerate(kept, start=1)
    ]


def answer_signs(
    generator: Generator, asked: Sequence[tuple[Mapping[str, Any], Sequence[Hit]]], config: Config
) -> tuple[list[Signs], list[bool]]:
    """The signs of a generator's answers and whether each is right; refusals of its own are left
    out.

    Args:
        generator: answers.
        asked: rows with ``wordings`` and ``answers``, and the passages to read.
        config: lengths and batches.
    """
    length = config.generator.max_new_tokens
    signs: list[Signs] = []
    right: list[bool] = []
    progress = Progress("calibrate", len(asked), "questions")
    size = config.evaluation.answer_batch_size
    for start in range(0, len(asked), size):
        batch = asked[start : start + size]
        prompts = [
            build_prompt(generator, row["wordings"][0], hits, max_new_tokens=length)
            for row, hits in batch
        ]
        made = generator.generate(
            [prompt.text for prompt in prompts], max_new_tokens=length, stop=STOP_STRINGS
        )
        for (row, _), prompt, generation in zip(batch, prompts, made, strict=True):
            parsed = parse_answer(generation.text, len(prompt.hits))
            found = signs_of(row["wordings"][0], prompt.hits, prompt.shown, parsed.text, generation)
            if found is not None and not parsed.refused:
                signs.append(found)
                right.append(contains_answer(parsed.text, row["answers"]))
        progress.advance(len(batch))
    return signs, right
