"""Hits and adapters to a report: the ``report`` artifact.

Rows: retrieval of each system over the dev families; answers of each generator with the passages
that each system found, from nothing (closed book), from the gold passages (oracle) and without the
gold documents (document gone).
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from invar_ray.config import Config, to_dict
from invar_ray.errors import DataError
from invar_ray.evaluation.calibration import (
    calibration_bins,
    expected_calibration_error,
    risk_coverage,
)
from invar_ray.evaluation.details import RankedFamily, rank_shifts, recall_curve, worst_questions
from invar_ray.evaluation.measure import (
    Answered,
    Columns,
    FoundFamily,
    answer_columns,
    between_questions,
    change_column,
    depth_of,
    probability,
    ranked_documents,
    retrieval_columns,
)
from invar_ray.evaluation.metrics import OVERLAP_K
from invar_ray.evaluation.outcome import Outcome, compare_systems, write_outcome
from invar_ray.evaluation.per_question import QuestionTable
from invar_ray.evaluation.report import Row
from invar_ray.evaluation.scoring import AnswerRule, answer_rule
from invar_ray.evaluation.significance import bootstrap_columns, question_clusters
from invar_ray.evaluation.trec import file_name, write_qrels, write_run
from invar_ray.evaluation.variance import known, worst_wording_loss
from invar_ray.executor import Executor
from invar_ray.models.base import BaseRef
from invar_ray.models.precision import inference_precision
from invar_ray.steps.answers import (
    AnswerTask,
    System,
    answer_all,
    answer_tasks,
    gone_label,
)
from invar_ray.steps.hits import load_hits
from invar_ray.steps.passages import load_documents
from invar_ray.store.artifacts import Artifact, Building, Plan

VERSION = 11
_NOT_IN_PLAN = {
    "num_rewrites",  # it is in the questions
    "systems",  # they are in the hits
    "arms",
    "answer_batch_size",  # scale
}
_WORST_QUESTIONS = 8
_SHOWN_ANSWERS = 12
SYSTEM_NAMES = {
    "bm25": "BM25",
    "minilm": "MiniLM",
    "minilm_bm25": "MiniLM + BM25",
    "minilm_rewrites": "MiniLM, rewrites fused",
    "base": "base",
    "base_rewrites": "base, rewrites fused",
    "stage1": "stage 1",
    "stage1_bm25": "stage 1 + BM25",
    "stage1_rewrites": "stage 1, rewrites fused",
    "stage1_reranked": "stage 1, reranked",
    "both": "both stages",
}
"""How ``evaluation.systems`` are shown."""


@dataclass(frozen=True)
class Change:
    """A second look at a system's anchors in another setting.

    Attributes:
        system: whose name the row has.
        cause: ``window``, ``index`` or ``precision``.
        hits: what the same questions find there.
    """

    system: str
    cause: str
    hits: Artifact


def plan(config: Config, systems: Sequence[System], changes: Sequence[Change] = ()) -> Plan:
    """The report over these systems."""
    parents: dict[str, Artifact] = {}
    for system in systems:
        parents[f"hits/{system.name}"] = system.hits
        if isinstance(system.generator, Artifact):
            parents[f"generator/{system.name}"] = system.generator
    for change in changes:
        parents[f"{change.cause}/{change.system}"] = change.hits
    settings = {
        key: value for key, value in to_dict(config.evaluation).items() if key not in _NOT_IN_PLAN
    }
    return Plan(
        kind="report",
        name=config.name,
        config={
            "evaluation": settings,
            "generator": {
                "top_k": config.generator.top_k,
                "max_new_tokens": config.generator.max_new_tokens,
            },
            "systems": [system.name for system in systems],
            "max_tokens": config.generator.max_tokens,
            "precision": inference_precision(config),
        },
        parents=parents,
        version=VERSION,
    )


def build(
    building: Building,
    config: Config,
    base: BaseRef,
    systems: Sequence[System],
    dataset: str,
    passages: Artifact,
    changes: Sequence[Change] = (),
    *,
    executor: Executor,
) -> None:
    """Measure every system and write the report's files: see
    :func:`invar_ray.evaluation.outcome.write_outcome`, ``answers.jsonl`` and the TREC files below
    ``trec/``.

    Args:
        building: where to.
        config: the run.
        base: answers where a system's generator is ``""``.
        systems: the rows.
        dataset: the name of the dev questions.
        passages: the corpus, for the gold documents of oracle rows.
        changes: further causes of variance.
        executor: where the generators answer.

    Raises:
        DataError: a question that is to be answered has no gold answer.
    """
    rule = answer_rule(config.evaluation.answer_rule)
    hits = {system.name: load_hits(system.hits) for system in systems}
    made = _Rows(config, dataset, rule)
    for system in systems:
        made.add_retrieval(
            system.name, hits[system.name], [c for c in changes if c.system == system.name]
        )
        _write_trec(building.path / "trec", system.name, hits[system.name])
    count = config.evaluation.num_answers
    bare = [family.question_id for family in hits[systems[0].name][:count] if not family.answers]
    if bare:
        raise DataError(
            f"{len(bare)} of the questions to answer have no gold answer (first: {bare[0]})",
            action="set evaluation.num_answers=0, which measures retrieval alone",
        )
    asked = hits[systems[0].name][:count]
    documents = load_documents(passages, {name for family in asked for name in family.positive_ids})
    tasks = [
        task for s in systems for task in answer_tasks(s, hits[s.name][:count], documents, config)
    ]
    answers = answer_all(config, base, passages.store, tasks, executor)
    for task in tasks:
        made.add_answers(task, hits[task.system][: len(task.prompts)], answers[task.label])
    made.add_risk(tasks)
    _write_answers(building.path / "answers.jsonl", tasks, hits, answers)
    outcome = made.outcome(systems, tasks)
    write_outcome(outcome, building.path, overlap_k=OVERLAP_K)
    building.info |= {"rows": [asdict(row) for row in outcome.rows]}


@dataclass
class _Rows:
    """What is known of each row so far."""

    config: Config
    dataset: str
    rule: AnswerRule
    columns: dict[str, Columns] = field(default_factory=dict)
    families: dict[str, Sequence[FoundFamily]] = field(default_factory=dict)
    extra: dict[str, dict[str, float]] = field(default_factory=dict)
    details: dict[str, dict[str, Any]] = field(default_factory=dict)
    said: dict[str, list[tuple[float, bool]]] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)

    def add_retrieval(
        self, name: str, families: Sequence[FoundFamily], changes: Sequence[Change]
    ) -> None:
        k, top_k = OVERLAP_K, self.config.evaluation.top_k
        columns = retrieval_columns(families, k, top_k, self.rule)
        for change in changes:
            columns[f"change_by_{change.cause}_at_{k}"] = change_column(
                families, load_hits(change.hits), k
            )
        self.columns[name], self.families[name] = columns, families
        self.extra[name] = {"num_families": float(len(families))}
        between = between_questions(families, k)
        if between is not None:
            self.extra[name][f"overlap_between_questions_at_{k}"] = between
        ranked = [_ranked(family) for family in families]
        self._note(
            "recall_curve", name, recall_curve(ranked, min(top_k, max(depth_of(families), 1)))
        )
        self._note("rank_shifts", name, rank_shifts(ranked))
        self._note("worst_questions", name, worst_questions(ranked, k, _WORST_QUESTIONS))

    def add_answers(
        self,
        task: AnswerTask,
        families: Sequence[FoundFamily],
        answers: Sequence[Sequence[Answered]],
    ) -> None:
        columns = answer_columns(families, answers, self.rule)
        gone = task.label == gone_label(task.system)  # there a refusal is right
        anchors = [texts[0] for texts in answers]
        said = [
            (p, right)
            for a, right in zip(anchors, columns["exact_match"], strict=True)
            if not a.refused and (p := probability(a))
        ]
        bins = calibration_bins([p for p, _ in said], [right or 0.0 for _, right in said])
        error = expected_calibration_error(bins)
        told = [
            {
                "question": family.wordings[0],
                "gold": list(family.answers),
                "text": answer.text or ("(refused)" if answer.refused else ""),
                "right": bool(right) or (gone and (answer.refused or answer.unsure)),
            }
            for family, answer, right in zip(families, anchors, columns["exact_match"], strict=True)
        ]
        self._note("answers", task.label, told[:_SHOWN_ANSWERS])
        extra = {"num_answered": float(len(families))}
        if error is not None:
            extra["calibration_error"] = error
        self._note("calibration", task.label, [asdict(entry) for entry in bins])
        self.said[task.label] = [(p, right == 1.0) for p, right in said]
        self.asked[task.label] = len(families)
        seconds = [answer.seconds for texts in answers for answer in texts]
        shares = zip(("p50", "p95"), np.quantile(seconds, [0.5, 0.95]).tolist(), strict=True)
        self._note("seconds_per_answer", task.label, {"mean": fmean(seconds)} | dict(shares))
        # a system's own row: its retrieval stands there, over all questions
        if task.label in self.columns:
            self._add_columns(task.label, columns)
        else:
            self.columns[task.label], self.families[task.label] = columns, families
        self.extra[task.label] = self.extra.get(task.label, {}) | extra

    def add_risk(self, tasks: Sequence[AnswerTask]) -> None:
        """Risk and coverage of each row of answers; a system's own row has the questions whose
        documents are gone beside the others.
        """
        for task in tasks:
            gone = gone_label(task.label)
            said = self.said[task.label] + self.said.get(gone, [])
            asked = self.asked[task.label] + self.asked.get(gone, 0)
            curve = risk_coverage([p for p, _ in said], [right for _, right in said], asked)
            self._note("risk_coverage", task.label, [asdict(point) for point in curve])

    def _add_columns(self, name: str, columns: Columns) -> None:
        """Columns of a row's first questions."""
        whole = len(self.families[name])
        self.columns[name] |= {
            metric: [*column, *[None] * (whole - len(column))] for metric, column in columns.items()
        }

    def outcome(self, systems: Sequence[System], tasks: Sequence[AnswerTask]) -> Outcome:
        names: list[str] = []  # a system's own row, then its closed-book and oracle rows
        for system in systems:
            names += dict.fromkeys(
                [
                    system.name,
                    *(task.label for task in tasks if task.system == system.name),
                ]
            )
        rows, tables = [], []
        for name in names:
            families = self.families[name]
            ids = [family.question_id for family in families]
            clusters = [
                str(c) for c in question_clusters([family.positive_ids for family in families], ids)
            ]
            table = QuestionTable(name, self.dataset, ids, clusters, self.columns[name])
            tables.append(table)
            intervals = bootstrap_columns(table.columns, clusters, seed=self.config.seed)
            metrics = {
                key: fmean(values)
                for key, column in table.columns.items()
                if (values := known(column))
            }
            if "worst_recall_at_5" in metrics:
                loss = worst_wording_loss(
                    table.columns["recall_at_5"], table.columns["worst_recall_at_5"]
                )
                metrics |= {} if loss is None else {"worst_wording_loss_at_5": loss}
            bounds = {key: (interval.low, interval.high) for key, interval in intervals.items()}
            rows.append(Row(name, self.dataset, metrics | self.extra[name], bounds))
        comparisons = compare_systems(tables, OVERLAP_K, self.config.seed)
        return Outcome(rows, tables, comparisons, self.details, _origin(self.config))

    def _note(self, kind: str, name: str, value: Any) -> None:
        if value:
            self.details.setdefault(kind, {})[name] = value


def _origin(config: Config) -> dict[str, str]:
    """Where a report comes from, for its page."""
    program = "invar-ray" if Path(sys.argv[0]).name == "main.py" else Path(sys.argv[0]).name
    return {
        "model": " and ".join(filter(None, (config.model.retriever_base, config.model.base))),
        "recipe": config.name,
        "date": datetime.now(UTC).date().isoformat(),
        "command": textwrap.shorten(" ".join([program, *sys.argv[1:]]), 160, placeholder=" …"),
    }


def _ranked(family: FoundFamily) -> RankedFamily:
    return RankedFamily(
        family.question_id,
        family.wordings,
        ranked_documents(family),
        [hits[0].title or hits[0].document_id if hits else "" for hits in family.hits],
        family.answers,
        family.positive_ids,
    )


def _write_trec(folder: Path, name: str, families: Sequence[FoundFamily]) -> None:
    ranked = {family.question_id: ranked_documents(family) for family in families}
    write_qrels(
        folder / "qrels.txt", {family.question_id: family.positive_ids for family in families}
    )
    for wording in range(max(len(lists) for lists in ranked.values())):
        lists = {
            question: found[wording] for question, found in ranked.items() if len(found) > wording
        }
        write_run(folder / f"{file_name(name)}.wording-{wording}.run", lists, name)


def _write_answers(
    path: Path,
    tasks: Sequence[AnswerTask],
    hits: Mapping[str, Sequence[FoundFamily]],
    answers: Mapping[str, Sequence[Sequence[Answered]]],
) -> None:
    with open(path, "w", encoding="utf-8") as stream:
        for task in tasks:
            families = hits[task.system][: len(task.prompts)]
            for family, texts in zip(families, answers[task.label], strict=True):
                record = {
                    "system": task.label,
                    "question_id": family.question_id,
                    "question": family.wordings[0],
                    "answers": list(family.answers),
                    "positive_ids": list(family.positive_ids),
                    "texts": [answer.text for answer in texts],
                    "reordered": texts[0].reordered,
                    "refused": [answer.refused for answer in texts],
                    "confidences": [answer.confidence for answer in texts],
                    "probabilities": [answer.probability for answer in texts],
                    "unsure": [answer.unsure for answer in texts],
                    "cited": [list(answer.cited) for answer in texts],
                    "shown": [list(answer.shown) for answer in texts],
                    "removed_citations": [answer.removed for answer in texts],
                }
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
