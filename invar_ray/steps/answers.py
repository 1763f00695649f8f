"""Generators answer the dev questions: from what each system found, from nothing, from gold
passages, and from what is found where the gold documents are left out.
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
from invar_ray.evaluation.scoring import answer_rule
from invar_ray.executor import Executor, Work
from invar_ray.models.base import BaseRef
from invar_ray.models.loading import open_base_generator, open_generator
from invar_ray.models.precision import inference_device, inference_precision
from invar_ray.schema import Answer, Document, Hit
from invar_ray.steps.hits import HIT_TYPE
from invar_ray.store.artifacts import Artifact, Store

_GONE = 4  # one in so many questions is asked without its documents


@dataclass(frozen=True)
class System:
    """A row of the report.

    Attributes:
        name: as shown.
        hits: what it retrieves.
        generator: the ``generator`` artifact that answers; ``""`` answers with the bare base,
            ``None`` does not answer.
        shows_bounds: add rows for this generator with no passage (closed book) and with the gold
            one (oracle); where it is trained, one without the gold documents, too (document gone).
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
        gold: of each question its gold answers: an anchor that is answered right is asked again
            with its passages in reverse.  Empty: none is.
    """

    label: str
    system: str
    generator_uri: str
    prompts: Prompts
    gold: tuple[tuple[str, ...], ...] = ()


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
    varies = config.evaluation.answer_wordings > 1
    gold = tuple(tuple(family.answers) for family in families) if varies else ()
    tasks = [AnswerTask(system.name, system.name, uri, _prompts(families, config), gold)]
    if system.shows_bounds:
        closed: Prompts = [[(family.wordings[0], [])] for family in families]
        tasks.append(AnswerTask(f"{system.name}, closed book", system.name, uri, closed))
        oracle = [
            [(family.wordings[0], _gold(family, documents, config.generator.top_k))]
            for family in families
        ]
        if any(found for question in oracle for _, found in question):
            tasks.append(AnswerTask(f"{system.name}, oracle passage", system.name, uri, oracle))
    if system.shows_bounds and uri:
        gone = [_without_gold(family, config) for family in families[: -(-len(families) // _GONE)]]
        tasks.append(AnswerTask(gone_label(system.name), system.name, uri, gone))
    return tasks


def gone_label(name: str) -> str:
    """The row of a system's answers without the gold documents."""
    return f"{name}, document gone"


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
        questions = list(row["questions"])
        given = [[Hit(**hit) for hit in hits] for hits in row["hits"]]
        answers = self._answers(questions, given)
        rule = answer_rule(self._config.evaluation.answer_rule)
        right = [
            number
            for number, (gold, hits) in enumerate(zip(row["gold"], given, strict=True))
            if len(gold)
            and len(hits) > 1
            and rule.score(_written(answers[number]), list(gold)).exact_match == 1.0
        ]
        again = self._answers([questions[n] for n in right], [given[n][::-1] for n in right])
        reordered = dict(zip(right, map(_written, again), strict=True))
        found = [
            {
                "text": _written(answer),
                "refused": answer.refused and not answer.low_confidence,
                "probability": answer.probability,
                "unsure": answer.low_confidence,
                "confidence": answer.confidence,
                "cited": list(dict.fromkeys(citation.document_id for citation in answer.citations)),
                "shown": list(dict.fromkeys(hit.document_id for hit in answer.hits)),
                "seconds": answer.timings["generate_s"],
                "removed": answer.removed_citations,
                "reordered": reordered.get(number),
            }
            for number, answer in enumerate(answers)
        ]
        return {"block": int(row["block"]), "answers": found}

    def _answers(self, questions: list[str], hits: list[list[Hit]]) -> list[Answer]:
        return answer_batch(
            self._generator,
            questions,
            hits,
            max_new_tokens=self._config.generator.max_new_tokens,
            batch_size=self._config.evaluation.answer_batch_size,
        )


def _written(answer: Answer) -> str:
    """What the model wrote, given or not."""
    return answer.guess or answer.text


_BLOCK = pa.schema(
    [
        ("block", pa.int64()),
        ("questions", pa.list_(pa.string())),
        ("hits", pa.list_(pa.list_(HIT_TYPE))),
        ("gold", pa.list_(pa.list_(pa.string()))),
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


def _without_gold(family: FoundFamily, config: Config) -> list[tuple[str, list[Hit]]]:
    others = [hit for hit in family.hits[0] if hit.document_id not in family.positive_ids]
    return [(family.wordings[0], others[: config.generator.top_k])]


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
    flat = [
        (*prompt, list(gold) if number == 0 else [])
        for task in tasks
        for question, gold in zip(task.prompts, task.gold or [()] * len(task.prompts), strict=True)
        for number, prompt in enumerate(question)
    ]
    size = config.evaluation.answer_batch_size
    # Prompts of like length together, longest first: little padding, and time left is told well.
    order = sorted(
        range(len(flat)), key=lambda place: -sum(len(hit.text) for hit in flat[place][1])
    )
    blocks = [
        {
            "block": number,
            "questions": [flat[place][0] for place in order[start : start + size]],
            "hits": [
                [asdict(hit) for hit in flat[place][1]] for place in order[start : start + size]
            ],
            "gold": [flat[place][2] for place in order[start : start + size]],
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
                answer["reordered"],
            )
            for answer in row["answers"]
        ]
        progress.advance(len(row["answers"]))
    in_blocks = [answer for number in sorted(found) for answer in found[number]]
    in_order = dict(zip(order, in_blocks, strict=True))
    answers = (in_order[place] for place in range(len(flat)))
    return {
        task.label: [[next(answers) for _ in question] for question in task.prompts]
        for task in tasks
    }
