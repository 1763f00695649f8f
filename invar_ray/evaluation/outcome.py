"""Everything that an evaluation found, written in every form that a report has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from invar_ray.evaluation.page import render_html, render_markdown
from invar_ray.evaluation.per_question import (
    QUESTIONS_FILE,
    Comparison,
    QuestionTable,
    compare_tables,
    write_questions,
)
from invar_ray.evaluation.plots import plot_recall, plot_variance
from invar_ray.evaluation.report import Report, Row, write_report
from invar_ray.evaluation.tables import render_tables

RETRIEVAL_PAIRS = (
    ("base", "stage 1"),
    ("stage 1, rewrites fused", "stage 1"),
    ("base, rewrites fused", "stage 1"),
    ("MiniLM", "stage 1"),
    ("BM25", "stage 1"),
    ("stage 1 + BM25", "stage 1, reranked"),
)
ARM, FUSED = "stage 1, ", ("stage 1, rewrites fused", "stage 1, reranked")
"""How the rows of ``evaluation.arms`` begin, and those that begin so and are none."""
ANSWER_PAIRS = (
    ("stage 1", "both stages"),
    ("base", "both stages"),
    ("base, oracle passage", "both stages, oracle passage"),
    ("base, closed book", "both stages, closed book"),
)
"""What a report compares, first against second; the systems of a pair stand in rows of these names.

``stage 1`` and ``both stages`` answer from the same passages: their answers differ by stage 2
alone.
"""


@dataclass(frozen=True)
class Outcome:
    """What was measured.

    Attributes:
        rows: of the tables.
        tables: values of every question, a table a row.
        comparisons: paired differences.
        details: for the plots; kind -> system -> value.
        meta: where it comes from: model, recipe, date, command.
    """

    rows: Sequence[Row]
    tables: Sequence[QuestionTable]
    comparisons: Sequence[Comparison]
    details: Mapping[str, Mapping[str, Any]]
    meta: Mapping[str, Any] = field(default_factory=dict)


def compare_systems(tables: Sequence[QuestionTable], overlap_k: int, seed: int) -> list[Comparison]:
    """The pairs above, as far as their systems are there, each on the metrics that it is about."""
    by_name = {table.system: table for table in tables}
    retrieval = (
        "recall_at_1",
        "recall_at_5",
        "mrr_at_10",
        f"overlap_at_{overlap_k}",
        "worst_recall_at_5",
    )
    answers = ("exact_match", "f1", "accuracy", "flip_rate", "abstained")
    found = []
    arms = [(name, "stage 1") for name in by_name if name.startswith(ARM) and name not in FUSED]
    for pairs, metrics in (((*RETRIEVAL_PAIRS, *arms), retrieval), (ANSWER_PAIRS, answers)):
        for first, second in pairs:
            if first in by_name and second in by_name:
                found += compare_tables(by_name[first], by_name[second], metrics, seed=seed)
    return found


def comparison_rows(comparisons: Sequence[Comparison]) -> Iterator[dict[str, Any]]:
    """Comparisons as they stand in ``report.json``."""
    for entry in comparisons:
        yield {
            "first": entry.first,
            "second": entry.second,
            "metric": entry.metric,
            "first_mean": entry.first_mean,
            "second_mean": entry.second_mean,
            "difference": entry.difference.mean,
            "low": entry.difference.low,
            "high": entry.difference.high,
            "questions": entry.questions,
            "clusters": entry.difference.clusters,
        }


def write_outcome(outcome: Outcome, folder: Path, *, overlap_k: int) -> Report:
    """Write ``report.json``, ``report.md``, ``report.html``, ``table.txt``, ``questions.parquet``,
    ``recall.png`` and ``variance.png``.
    """
    report = Report(
        tuple(outcome.rows),
        comparisons=tuple(comparison_rows(outcome.comparisons)),
        details=outcome.details,
        meta=outcome.meta,
    )
    write_report(report, folder / "report.json")
    write_questions(outcome.tables, folder / QUESTIONS_FILE)
    (folder / "table.txt").write_text(
        render_tables(outcome.rows, overlap_k) + "\n", encoding="utf-8"
    )
    write_pages(report, folder, overlap_k=overlap_k)
    measured = [
        row for row in outcome.rows if row.system in outcome.details.get("recall_curve", {})
    ]
    if measured:
        plot_recall(measured, folder / "recall.png")
    if any(f"overlap_at_{overlap_k}" in row.metrics for row in measured):
        plot_variance(measured, folder / "variance.png", overlap_k)
    return report


def write_pages(report: Report, folder: Path, *, overlap_k: int) -> None:
    """Write ``report.md`` and ``report.html``."""
    (folder / "report.md").write_text(render_markdown(report, overlap_k), encoding="utf-8")
    (folder / "report.html").write_text(render_html(report, overlap_k), encoding="utf-8")
