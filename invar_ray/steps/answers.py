"""Generators answer the dev questions: from what each system found, from nothing, from
gold passages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from invar_ray.answering.rag import answer_batch
from invar_ray.config import Config
from invar_ray.console import Progress
from invar_ray.evaluation.measure import Answered, FoundFamily
from invar_ray.executor import Executor, Work
from invar_ray.models.base import BaseRef
from invar_ray.models.loading import open_base_generator, open_generator
from invar_ray.models.precision import inference_device, inference_precision
from invar_ray.schema import Document, Hit
from invar_ray.steps.hits import HIT_TYPE
from invar_ray.store.artifacts import Artifact, Store


@dataclass(frozen=True)
class System:
    """A row of the report.

    Attributes:
        name: as shown.
        hits: what it retrieves.
        generator: the ``generator`` artifact that answers; ``""`` answers with the bare base,
            ``None`` does not answer.
        shows_bounds: add rows for this generator with no passage (closed book) and with the gold
            one (oracle).
    """

    name: str
    hits: Artifact
    generator: Artifact | str | None
    shows_bounds: bool = False


Prompts = list[list[tuple[str, list[Hit]]]]
"""For each question, for each wording: the wording and its passages."""


@dataclass(frozen=True)
class AnswerTask:
    """What one generator answers for one row of the report.

    Attributes:
        reorders: the label of the task whose anchors this one asks again with their passages in
            reverse: no row of its own.
    """

    label: str
    system: str
    generator_uri: str
    prompts: Prompts
    reorders: str | None = None


def answer_tasks(
    system: System,
    families: Sequence[FoundFamily],
    documents: Mapping[str, Document],
    config: Config,
) -> list[AnswerTask]:
    """The rows of answers of a system: none, if it does not answer or there is no question."""
    if not families or system.generator is None:
        return []
    uri = system.generator.uri if isinstance(system.generator, Artifact) else ""
    tasks = [AnswerTask(system.name, system.name, uri, _prompts(families, config))]
    reordered = [_reordered(asked) for asked in tasks[0].prompts]
    if any(reordered):
        label = f"{system.name}, passages reversed"
        tasks.append(AnswerTask(label, system.name, uri, reordered, reorders=system.name))
    if system.shows_bounds:
        closed: Prompts = [[(family.wordings[0], [])] for family in families]
        tasks.append(AnswerTask(f"{system.name}, closed book", system.name, uri, closed))
        oracle = [
            [(family.wordings[0], _gold(family, documents, config.generator.top_k))]
            for family in families
        ]
        if any(found for question in oracle for _, found in question):
            tasks.append(AnswerTask(f"{system.name}, oracle passage", system.name, uri, oracle))
    return tasks


def answer_all(
    config: Config,
    base: BaseRef,
    store: Store,
    tasks: Sequence[AnswerTask],
    executor: Executor,
) -> dict[str, list[list[Answered]]]:
    """Every task's answers: label -> question -> wording; one job for each generator (few
    questions: in this process).
    """
    answers: dict[str, list[list[Answered]]] = {}
    for uri in dict.fromkeys(task.generator_uri for task in tasks):
        of_generator = [task for task in tasks if task.generator_uri == uri]
        answers |= _answer_with(config, base, store, uri, of_generator, executor)
    return answers


class AnswerBlock:
    """Loads a generator once, then answers blocks of (question, hits)."""

    def __init__(
        self, root_uri: str, base: Mapping[str, Any], generator_uri: str, config: Config
    ) -> None:
        where: dict[str, Any] = {
            "precision": inference_precision(config),
            "device": inference_device(config.scale),
        }
        if generator_uri:
            self._generator = open_generator(generator_uri, **where)
        else:
            context = config.generator.max_tokens
            self._generator = open_base_generator(
                BaseRef(**base), Store(root_uri), context, **where
            )
        self._config = config

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """One block; answers in its order."""
        answers = answer_batch(
            self._generator,
            list(row["questions"]),
            [[Hit(**hit) for hit in hits] for hits in row["hits"]],
            max_new_tokens=self._config.generator.max_new_tokens,
            batch_size=self._config.evaluation.answer_batch_size,
        )
        found = [
            {
                "text": answer.guess or answer.text,
                "refused": answer.refused and not answer.low_confidence,
                "probability": answer.probability,
                "unsure": answer.low_confidence,
                "confidence": answer.confidence,
                "cited": list(dict.fromkeys(citation.document_id for citation in answer.citations)),
                "shown": list(dict.fromkeys(hit.document_id for hit in answer.hits)),
                "seconds": answer.timings["generate_s"],
                "removed": answer.removed_citations,
            }
            for answer in answers
        ]
        return {"block": int(row["block"]), "answers": found}


_BLOCK = pa.schema(
    [
        ("block", pa.int64()),
        ("questions", pa.list_(pa.string())),
        ("hits", pa.list_(pa.list_(HIT_TYPE))),
    ]
)


def _prompts(families: Sequence[FoundFamily], config: Config) -> Prompts:
    top_k, reworded = config.generator.top_k, config.evaluation.num_reworded_answers
    counts = [
        config.evaluation.answer_wordings if reworded is None or number < reworded else 1
        for number in range(len(families))
    ]
    return [
        [
            (wording, list(hits[:top_k]))
            for wording, hits in list(zip(family.wordings, family.hits, strict=True))[:count]
        ]
        for family, count in zip(families, counts, strict=True)
    ]


def _reordered(asked: Sequence[tuple[str, list[Hit]]]) -> list[tuple[str, list[Hit]]]:
    """The anchor with its passages in reverse, of a question that is asked in several wordings."""
    anchor, found = asked[0]
    return [(anchor, found[::-1])] if len(asked) > 1 and len(found) > 1 else []


def _gold(family: FoundFamily, documents: Mapping[str, Document], top_k: int) -> list[Hit]:
    gold = [documents[name] for name in family.positive_ids if name in documents][:top_k]
    return [
        Hit(d.id, d.id, rank, 1.0, d.title, d.text, d.uri) for rank, d in enumerate(gold, start=1)
    ]


def _answer_with(
    config: Config,
    base: BaseRef,
    store: Store,
    generator_uri: str,
    tasks: Sequence[AnswerTask],
    executor: Executor,
) -> dict[str, list[list[Answered]]]:
    flat = [prompt for task in tasks for question in task.prompts for prompt in question]
    size = config.evaluation.answer_batch_size
    blocks = [
        {
            "block": number,
            "questions": [question for question, _ in flat[start : start + size]],
            "hits": [[asdict(hit) for hit in hits] for _, hits in flat[start : start + size]],
        }
        for number, start in enumerate(range(0, len(flat), size))
    ]
    progress = Progress(
        f"answer ({'stage 2' if generator_uri else 'base'})", len(flat), "questions"
    )
    arguments = {
        "root_uri": store.root_uri,
        "base": asdict(base),
        "generator_uri": generator_uri,
        "config": config,
    }
    found: dict[int, list[Answered]] = {}
    scale = config.scale
    work = Work(
        label=progress.label,
        worker=AnswerBlock,
        arguments=arguments,
        rows=blocks,
        texts=len(flat),
        leaves_from=scale.in_process_below,
        schema=_BLOCK,
        workers=(scale.fewest_embed_workers, scale.fewest_embed_workers),
        num_cpus=scale.cpus_per_worker,
        num_gpus=scale.embed_gpus_per_worker,
    )
    for row in executor.run(work):
        found[int(row["block"])] = [
            Answered(
                answer["text"],
                bool(answer["refused"]),
                answer["confidence"],
                tuple(answer["cited"]),
                tuple(answer["shown"]),
                float(answer["seconds"]),
                int(answer["removed"]),
                answer["probability"],
                bool(answer["unsure"]),
            )
            for answer in row["answers"]
        ]
        progress.advance(len(row["answers"]))
    answers = iter([answer for number in sorted(found) for answer in found[number]])
    return {
        task.label: [[next(answers) for _ in question] for question in task.prompts]
        for task in tasks
    }
