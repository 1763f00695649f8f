"""The gate before an index or an adapter is promoted: passes, or says in words why not.

Limits are of two kinds: on the candidate alone (``max_variance``, ``min_recall``,
``min_exact_match``), and on what it loses against the baseline on the same questions.  Where no
loss is allowed by number, a candidate must not be *significantly* worse: the paired 95 % interval
of the difference must not lie wholly on the bad side of 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from invar_ray.errors import DataError
from invar_ray.evaluation.per_question import Comparison, QuestionTable, compare_tables
from invar_ray.evaluation.report import Report
from invar_ray.evaluation.tables import Row, finite, print_name

_TRAINED = ("stage 1", "both stages")


@dataclass(frozen=True)
class Limits:
    """What a candidate must keep to.

    Attributes:
        k: of recall@k and of overlap@k; *variance* is 1 - overlap@k.
        max_variance, min_recall, min_exact_match: of the candidate alone; ``None`` sets no limit.
        max_variance_rise, max_recall_drop, max_exact_match_drop: most that may be lost against the
            baseline, by the means; ``None`` asks for no significant loss.
    """

    k: int = 5
    max_variance: float | None = None
    min_recall: float | None = None
    min_exact_match: float | None = None
    max_variance_rise: float | None = None
    max_recall_drop: float | None = None
    max_exact_match_drop: float | None = None

    def __post_init__(self) -> None:
        limits = {name: value for name, value in vars(self).items() if isinstance(value, float)}
        bad = [name for name, value in limits.items() if not math.isfinite(value)]
        if bad:  # nothing is above NaN: such a limit would let everything pass
            raise DataError(
                f"the limit {bad[0]} is {limits[bad[0]]}", expected="a finite number, or none"
            )


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        passed: whether the candidate may go on as far as this goes.
        text: what was found and what was allowed.
    """

    passed: bool
    text: str


def run_gate(
    baseline: tuple[Report, Sequence[QuestionTable]],
    candidate: tuple[Report, Sequence[QuestionTable]],
    limits: Limits,
    *,
    system: str,
    baseline_system: str | None = None,
    dataset: str | None = None,
    samples: int = 2000,
    seed: int = 0,
) -> list[Check]:
    """Hold a candidate's report against limits and a baseline's.

    Args:
        baseline, candidate: reports with their questions, as
            :func:`invar_ray.evaluation.per_question.open_report` reads them.
        limits: see :class:`Limits`.
        system: the candidate's row, e.g. ``both stages``.
        baseline_system: the baseline's row; ``None`` for the same name.
        dataset: of both rows, where reports have several.
        samples, seed: of the bootstrap.

    Raises:
        DataError: a report lacks the row or a metric that a limit is about, or the two share no
            question.
    """
    row = _row(candidate[0], system, dataset, "candidate")
    other = _row(baseline[0], baseline_system or system, dataset, "baseline")
    recall, overlap = f"recall_at_{limits.k}", f"overlap_at_{limits.k}"
    checks = []
    if limits.max_variance is not None:
        variance = 1.0 - _metric(row, overlap)
        checks.append(_limit(f"1 - overlap@{limits.k}", variance, "at most", limits.max_variance))
    if limits.min_recall is not None:
        checks.append(
            _limit(print_name(recall), _metric(row, recall), "at least", limits.min_recall)
        )
    if limits.min_exact_match is not None:
        checks.append(
            _limit("exact match", _metric(row, "exact_match"), "at least", limits.min_exact_match)
        )
    metrics = [recall, overlap, "exact_match"]
    tables = _table(baseline[1], other), _table(candidate[1], row)
    paired = {c.metric: c for c in compare_tables(*tables, metrics, samples=samples, seed=seed)}
    allowed = {
        recall: limits.max_recall_drop,
        overlap: limits.max_variance_rise,
        "exact_match": limits.max_exact_match_drop,
    }
    if not paired:
        raise DataError(
            f"baseline ({other.system!r}) and candidate ({row.system!r}) have no question in "
            "common",
            expected="two reports on the same dev questions",
            action="evaluate both with the same questions.dev_uri, dev_limit and seed",
        )
    for metric in metrics:
        if metric in paired:
            checks.append(_loss(paired[metric], allowed[metric], metric == overlap))
        elif allowed[metric] is not None:
            raise DataError(
                f"one of the reports has no {print_name(metric)} for {row.system!r}",
                action="evaluate with it",
            )
    return checks


def best_system(report: Report, k: int) -> str:
    """The trained row that finds most among the first ``k``; of equals the one that also answers.

    Raises:
        DataError: the report has no trained row.
    """
    trained = [row for row in report.rows if row.system.startswith(_TRAINED)]
    rows = [row for row in trained if finite(row.metrics.get(f"recall_at_{k}")) is not None]
    if not rows:
        raise DataError(
            f"the report has no trained system with recall@{k}",
            expected="a row of stage 1 or of both stages",
            action="name a row with --system",
        )

    def worth(row: Row) -> tuple[float, bool]:
        return row.metrics[f"recall_at_{k}"] or 0.0, row.system == "both stages"

    return max(rows, key=worth).system


def _loss(entry: Comparison, allowed: float | None, is_overlap: bool) -> Check:
    """A fall of recall, exact match or overlap; a fall of overlap is a rise of variance."""
    name = print_name(entry.metric)
    if is_overlap:
        name, first, second = f"1 - {name}", 1.0 - entry.first_mean, 1.0 - entry.second_mean
        change, low, high = (
            0.0 - entry.difference.mean,
            0.0 - entry.difference.high,
            0.0 - entry.difference.low,
        )
    else:
        first, second = entry.first_mean, entry.second_mean
        change, low, high = entry.difference.mean, entry.difference.low, entry.difference.high
    worse = entry.difference.high < 0.0 if allowed is None else -entry.difference.mean > allowed
    rule = "no significant loss" if allowed is None else f"a loss of at most {allowed:g}"
    text = (
        f"{name} {second:.3f} against the baseline's {first:.3f}: {change:+.3f}, interval "
        f"[{low:+.3f}, {high:+.3f}], "
        f"{entry.questions} paired questions; allowed: {rule}"
    )
    return Check(not worse, text)


def _limit(name: str, value: float, word: str, limit: float) -> Check:
    passed = value <= limit if word == "at most" else value >= limit
    return Check(passed, f"{name} is {value:.3f}; allowed: {word} {limit:g}")


def _row(report: Report, system: str, dataset: str | None, whose: str) -> Row:
    found = [row for row in report.rows if row.system == system and dataset in (None, row.dataset)]
    if len(found) != 1:
        raise DataError(
            f"the {whose}'s report has {len(found)} rows for the system {system!r}",
            expected="one of " + ", ".join(dict.fromkeys(repr(row.system) for row in report.rows))
            if not found
            else "a dataset too: " + ", ".join(row.dataset for row in found),
        )
    return found[0]


def _table(tables: Sequence[QuestionTable], row: Row) -> QuestionTable:
    found = [
        table for table in tables if (table.system, table.dataset) == (row.system, row.dataset)
    ]
    if not found:
        raise DataError(
            f"there are no values of single questions for {row.system!r} on {row.dataset!r}",
            action="evaluate again",
        )
    return found[0]


def _metric(row: Row, name: str) -> float:
    value = finite(row.metrics.get(name))
    if value is None:
        have = ", ".join(
            sorted(name for name, value in row.metrics.items() if finite(value) is not None)
        )
        raise DataError(
            f"the candidate's row {row.system!r} has no {name}", expected=f"one of {have}"
        )
    return value
