"""Hits and adapters to a report: the ``report`` artifact.

Rows: retrieval of each system over the dev families; answers of each generator with the passages that each system
found, from nothing (closed book) and from the gold passages (oracle).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from invar_ray.artifacts import Artifact, Building, Plan, Store
from invar_ray.config import Config, to_dict
from invar_ray.evaluating.hits import HIT_TYPE, FoundFamily, load_hits
from invar_ray.evaluation.metrics import (
    answer_recall_at_k,
    exact_match,
    f1,
    first_ranks,
    ndcg_at_k,
    reciprocal_rank,
)
from invar_ray.evaluation.plots import plot_recall, plot_variance
from invar_ray.evaluation.report import Report, Row, write_report
from invar_ray.evaluation.tables import render_table
from invar_ray.evaluation.variance import Family, flip_rate, summarise_families
from invar_ray.models.locate import BaseRef, open_base, open_generator
from invar_ray.progress import Progress
from invar_ray.retrieval.rag import answer_batch
from invar_ray.schema import Document, Hit, from_table
from invar_ray.versions import STEPS

KS = (1, 5, 20)


@dataclass(frozen=True)
class System:
    """A row of the report.

    Attributes:
        name: as shown.
        hits: what it retrieves.
        generator: URI of the ``generator`` artifact that answers; ``""`` answers with the bare base, ``None`` does not
            answer.
        shows_bounds: add rows for this generator with no passage (closed book) and with the gold one (oracle).
    """

    name: str
    hits: Artifact
    generator: Artifact | str | None
    shows_bounds: bool = False


def report_plan(config: Config, systems: Sequence[System]) -> Plan:
    """The report over these systems."""
    parents: dict[str, Artifact] = {}
    for system in systems:
        parents[f"hits/{system.name}"] = system.hits
        if isinstance(system.generator, Artifact):
            parents[f"generator/{system.name}"] = system.generator
    settings = to_dict(config.evaluation)
    for key in (
        "file_uri",
        "provider",
        "num_rewrites",
        "answer_batch_size",
    ):  # these are in the questions, or are scale
        del settings[key]
    return Plan(
        kind="report",
        name=config.name,
        config={
            "evaluation": settings,
            "generator": {"top_k": config.generator.top_k, "max_new_tokens": config.generator.max_new_tokens},
            "systems": [system.name for system in systems],
            "max_tokens": config.generator.max_tokens,
        },
        parents=parents,
        version=STEPS["report"].version,
    )


def build_report(building: Building, config: Config, base: BaseRef, systems: Sequence[System], dataset: str) -> None:
    """Measure every system and write ``report.json``, ``table.txt``, ``answers.jsonl``, ``recall.png``,
    ``variance.png``.
    """
    chosen = {system.name: load_hits(system.hits)[: config.evaluation.num_answers] for system in systems}
    tasks = [task for system in systems if system.generator is not None for task in _tasks(system, chosen, config)]
    answers: dict[str, list[list[str]]] = {}
    for uri in dict.fromkeys(task.generator_uri for task in tasks):
        same = [task for task in tasks if task.generator_uri == uri]
        answers |= _answer_all(config, base, systems[0].hits.store, uri, same)
    rows: list[Row] = []
    records: list[dict[str, Any]] = []
    for system in systems:
        metrics = retrieval_metrics(load_hits(system.hits), config.evaluation.overlap_k)
        mine = [task for task in tasks if task.system == system.name]
        for task in mine:
            measured = answer_metrics(chosen[system.name], answers[task.label])
            rows.append(Row(task.label, dataset, (metrics if task.label == system.name else {}) | measured))
            for family, texts in zip(chosen[system.name], answers[task.label], strict=True):
                record = {"system": task.label, "question_id": family.question_id, "question": family.wordings[0]}
                records.append(record | {"answers": list(family.answers), "texts": texts})
        if not mine:
            rows.append(Row(system.name, dataset, metrics))
    report = Report(rows=tuple(rows), seconds={}, answer=None)
    write_report(report, building.path / "report.json")
    (building.path / "table.txt").write_text(render_table(rows) + "\n", encoding="utf-8")
    with open(building.path / "answers.jsonl", "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    measured_rows = [row for row in rows if "recall_at_5" in row.metrics]
    plot_recall(measured_rows, building.path / "recall.png")
    plot_variance(measured_rows, building.path / "variance.png", config.evaluation.overlap_k)
    building.info |= {"rows": [asdict(row) for row in rows]}


def retrieval_metrics(families: Sequence[FoundFamily], overlap_k: int) -> dict[str, float]:
    """Everything about retrieval over question families; ranks are over *documents*, a document counts at its best
    passage.
    """
    lists = [[first_ranks(hit.document_id for hit in hits) for hits in family.hits] for family in families]
    golds = [family.positive_ids for family in families]
    depth = max(len(hits) for family in families for hits in family.hits)
    metrics = summarise_families(
        [Family(ranked, gold) for ranked, gold in zip(lists, golds, strict=True)],
        overlap_k=overlap_k,
        ks=[k for k in KS if k <= depth],
        depth=depth,
    )
    anchors = [ranked[0] for ranked in lists]
    metrics["mrr_at_10"] = fmean(reciprocal_rank(ranked, gold) for ranked, gold in zip(anchors, golds, strict=True))
    metrics["ndcg_at_10"] = fmean(ndcg_at_k(ranked, gold, 10) for ranked, gold in zip(anchors, golds, strict=True))
    metrics["answer_recall_at_5"] = fmean(
        answer_recall_at_k([f"{hit.title} {hit.text}" for hit in family.hits[0]], family.answers, 5)
        for family in families
    )
    return metrics


def answer_metrics(families: Sequence[FoundFamily], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """EM and F1 of the anchors' answers, and the flip rate where rewordings were answered too."""
    metrics = {
        "exact_match": fmean(
            exact_match(texts[0], family.answers) for family, texts in zip(families, answers, strict=True)
        ),
        "f1": fmean(f1(texts[0], family.answers) for family, texts in zip(families, answers, strict=True)),
        "num_answered": float(len(families)),
    }
    right = [
        [exact_match(text, family.answers) == 1.0 for text in texts]
        for family, texts in zip(families, answers, strict=True)
    ]
    flips = flip_rate(right)
    return metrics if flips is None else metrics | {"flip_rate": flips}


class AnswerBlock:
    """Ray Data actor: loads a generator once, then answers blocks of (question, hits)."""

    def __init__(self, root_uri: str, base: Mapping[str, Any], generator_uri: str, config: Config) -> None:
        if generator_uri:
            self._generator = open_generator(generator_uri)
        else:
            from invar_ray.models.generator import Generator

            model, tokenizer = open_base(BaseRef(**base), Store(root_uri))
            self._generator = Generator(model, tokenizer, config.generator.max_tokens)
        if config.scale.embed_gpus_per_worker > 0:
            self._generator.model.to("cuda")
        self._config = config

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """One block; texts in its order."""
        answers = answer_batch(
            self._generator,
            list(row["questions"]),
            [[Hit(**hit) for hit in hits] for hits in row["hits"]],
            max_new_tokens=self._config.generator.max_new_tokens,
            batch_size=self._config.evaluation.answer_batch_size,
        )
        return {"block": int(row["block"]), "texts": [answer.text for answer in answers]}


Prompts = list[list[tuple[str, list[Hit]]]]
_BLOCK = pa.schema(
    [("block", pa.int64()), ("questions", pa.list_(pa.string())), ("hits", pa.list_(pa.list_(HIT_TYPE)))]
)


def _prompts(families: Sequence[FoundFamily], config: Config) -> Prompts:
    count, top_k = config.evaluation.answer_wordings, config.generator.top_k
    return [
        [
            (wording, list(hits[:top_k]))
            for wording, hits in list(zip(family.wordings, family.hits, strict=True))[:count]
        ]
        for family in families
    ]


def _oracle_prompts(families: Sequence[FoundFamily], hits: Artifact, config: Config) -> Prompts:
    passages = hits.parent("index").parent("passages")
    documents = {
        document.id: document for document in from_table(pq.read_table(passages.path("documents.parquet")), Document)
    }
    prompts: Prompts = []
    for family in families:
        gold = [documents[name] for name in family.positive_ids if name in documents][: config.generator.top_k]
        found = [
            Hit(document.id, document.id, rank, 1.0, document.title, document.text, document.uri)
            for rank, document in enumerate(gold, start=1)
        ]
        prompts.append([(family.wordings[0], found)])
    return prompts


@dataclass(frozen=True)
class _Task:
    """What one generator answers for one row of the report."""

    label: str
    system: str
    generator_uri: str
    prompts: Prompts


def _tasks(system: System, chosen: Mapping[str, Sequence[FoundFamily]], config: Config) -> list[_Task]:
    families = chosen[system.name]
    if not families:
        return []
    uri = system.generator.uri if isinstance(system.generator, Artifact) else ""
    tasks = [_Task(system.name, system.name, uri, _prompts(families, config))]
    if system.shows_bounds:
        closed: Prompts = [[(family.wordings[0], [])] for family in families]
        tasks.append(_Task(f"{system.name}, closed book", system.name, uri, closed))
        oracle = _oracle_prompts(families, system.hits, config)
        tasks.append(_Task(f"{system.name}, oracle passage", system.name, uri, oracle))
    return tasks


def _answer_all(
    config: Config, base: BaseRef, store: Store, generator_uri: str, tasks: Sequence[_Task]
) -> dict[str, list[list[str]]]:
    """Everything that one generator answers, in one Ray Data job: label -> family -> texts."""
    flat = [prompt for task in tasks for family in task.prompts for prompt in family]
    size = config.evaluation.answer_batch_size
    blocks = [
        {
            "block": number,
            "questions": [question for question, _ in flat[start : start + size]],
            "hits": [[asdict(hit) for hit in hits] for _, hits in flat[start : start + size]],
        }
        for number, start in enumerate(range(0, len(flat), size))
    ]
    progress = Progress(f"answer ({'stage 2' if generator_uri else 'base'})", len(flat), "questions")
    table = pa.Table.from_pylist(blocks, schema=_BLOCK)
    stream = ray.data.from_arrow([table.slice(number, 1) for number in range(len(blocks))]).map(
        AnswerBlock,
        fn_constructor_kwargs={
            "root_uri": store.root_uri,
            "base": asdict(base),
            "generator_uri": generator_uri,
            "config": config,
        },
        num_cpus=config.scale.cpus_per_worker,
        num_gpus=config.scale.embed_gpus_per_worker or None,
        compute=ray.data.ActorPoolStrategy(size=min(config.scale.embed_workers, len(blocks))),
    )
    found: dict[int, list[str]] = {}
    for row in stream.iter_rows():
        found[int(row["block"])] = list(row["texts"])
        progress.advance(len(row["texts"]))
    texts = iter([text for number in sorted(found) for text in found[number]])
    return {task.label: [[next(texts) for _ in family] for family in task.prompts] for task in tasks}
