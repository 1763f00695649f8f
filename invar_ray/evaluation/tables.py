"""Rows of metrics, as aligned tables and as CSV."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from invar_ray.store.files import write_atomic

RETRIEVAL_METRICS = ("recall_at_1", "recall_at_5", "mrr_at_10", "ndcg_at_10", "answer_recall_at_5")
VARIANCE_METRICS = ("overlap_at_5", "worst_recall_at_5", "overlap_between_questions_at_5")
ANSWER_METRICS = ("exact_match", "f1", "accuracy", "flip_rate", "abstained", "calibration_error")
"""What a terminal shows; a page shows more."""


@dataclass(frozen=True)
class Row:
    """What one system reached on one dataset.

    Attributes:
        metrics: name -> value; ``None`` where it was not measured. NaN counts as not measured.
        intervals: name -> (low, high) of the metrics that have a confidence interval.
    """

    system: str
    dataset: str
    metrics: Mapping[str, float | None]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def print_name(metric: str) -> str:
    """``recall_at_5`` -> ``recall@5``; ``worst_recall_at_5`` -> ``worst recall@5``."""
    return re.sub(r"_at_(\d+)", r"@\1", metric).replace("_", " ")


def render_tables(rows: Sequence[Row], overlap_k: int = 5) -> str:
    """Retrieval and answers, a table each, for a terminal of 100 columns; without intervals."""
    retrieval = [row for row in rows if "num_families" in row.metrics]
    answers = [row for row in rows if "num_answered" in row.metrics]
    columns = (
        *(
            "recall_at_1",
            "recall_at_5",
            "mrr_at_10",
            f"overlap_at_{overlap_k}",
            "worst_recall_at_5",
        ),
        f"overlap_between_questions_at_{overlap_k}",
    )
    # 100 columns do not hold the whole name
    headers = {columns[-1]: f"between questions@{overlap_k}"}
    parts = []
    if retrieval:
        count = int(retrieval[0].metrics["num_families"] or 0)
        shown = [
            name
            for name in columns
            if any(finite(row.metrics.get(name)) is not None for row in retrieval)
        ]
        parts.append(
            f"retrieval, {count:,} "
            f"questions\n{render_table(retrieval, shown, intervals=False, headers=headers)}"
        )
    if answers:
        count = int(answers[0].metrics["num_answered"] or 0)
        shown = [
            name
            for name in ANSWER_METRICS
            if any(finite(row.metrics.get(name)) is not None for row in answers)
        ]
        fewer = {row.system: int(row.metrics["num_answered"] or 0) for row in answers}
        told = "".join(f"; {name}: {n:,}" for name, n in fewer.items() if n != count)
        parts.append(
            f"answers, {count:,} questions{told}\n{render_table(answers, shown, intervals=False)}"
        )
    return "\n\n".join(parts)


def render_table(
    rows: Sequence[Row],
    columns: Sequence[str] | None = None,
    *,
    markdown: bool = False,
    intervals: bool = True,
    headers: Mapping[str, str] | None = None,
) -> str:
    """The rows as an aligned table.

    Args:
        rows: one a line.
        columns: metrics to show, in order; ``None`` shows every metric that some row has, in order
            of appearance.
        markdown: pipes and a rule, for pages; otherwise plain text, for a terminal.
        intervals: show them where a row has them.
        headers: metric -> what stands above its column instead of :func:`print_name`.

    Returns:
        One line a row, without a final newline. A metric that a row lacks is shown as ``-``; one
        with an interval as ``0.640 [0.602, 0.677]``. The dataset column is left out where all rows
        share one dataset and it is plain text.
    """
    names = (
        list(columns)
        if columns is not None
        else list(dict.fromkeys(name for row in rows for name in row.metrics))
    )
    with_dataset = markdown or len({row.dataset for row in rows}) > 1
    head = [
        "system",
        *(["dataset"] if with_dataset else []),
        *((headers or {}).get(name, print_name(name)) for name in names),
    ]
    body = [
        [
            row.system,
            *([row.dataset] if with_dataset else []),
            *(_cell(row, name, intervals) for name in names),
        ]
        for row in rows
    ]
    num_text = 2 if with_dataset else 1
    widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]

    def align(line: Sequence[str]) -> list[str]:
        return [
            text.ljust(width) if column < num_text else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ]

    if markdown:
        rule = [
            "-" * width if column < num_text else "-" * (width - 1) + ":"
            for column, width in enumerate(widths)
        ]
        escaped = [[text.replace("|", "\\|") for text in align(line)] for line in body]
        return "\n".join("| " + " | ".join(line) + " |" for line in [align(head), rule, *escaped])
    lines = ["  ".join(align(line)).rstrip() for line in [head, *body]]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def write_csv(path: Path, header: Sequence[str], lines: Sequence[Sequence[Any]]) -> Path:
    """Write a CSV file, all or nothing; ``None`` becomes an empty cell."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([["" if cell is None else cell for cell in line] for line in lines])
    write_atomic(path, buffer.getvalue().encode("utf-8"))
    return path


def finite(value: float | None) -> float | None:
    """``value``, or ``None`` where it is NaN, infinite or ``None``."""
    return None if value is None or not math.isfinite(value) else float(value)


def _cell(row: Row, name: str, with_interval: bool) -> str:
    value = finite(row.metrics.get(name))
    if value is None:
        return "-"
    bounds = row.intervals.get(name) if with_interval else None
    return f"{value:.3f}" + (f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else "")
