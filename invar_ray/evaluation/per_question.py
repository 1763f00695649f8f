"""Values of every question, kept beside a report: what paired tests of two systems or two reports
need.

``questions.parquet``: a row for each system and question, with ``system``, ``dataset``,
``question_id``, ``cluster`` and a column for each metric (null where it was not measured).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from invar_ray.errors import CorruptArtifactError, DataError, MissingArtifactError
from invar_ray.evaluation.report import Report, read_report
from invar_ray.evaluation.significance import Interval, bootstrap_columns
from invar_ray.evaluation.variance import known

QUESTIONS_FILE = "questions.parquet"
_KEYS = ("system", "dataset", "question_id", "cluster")


@dataclass(frozen=True)
class QuestionTable:
    """One system's values on one dataset.

    Attributes:
        ids, clusters: of each question; clusters are what the bootstrap draws.
        columns: metric -> one value a question, ``None`` where there is none.
    """

    system: str
    dataset: str
    ids: Sequence[str]
    clusters: Sequence[str]
    columns: Mapping[str, Sequence[float | None]]


@dataclass(frozen=True)
class Comparison:
    """Two systems on the same questions, paired.

    Attributes:
        first, second: their names.
        metric: what was compared.
        first_mean, second_mean: over the questions that both have a value for.
        difference: second - first, with its interval.
        questions: how many that were.
    """

    first: str
    second: str
    metric: str
    first_mean: float
    second_mean: float
    difference: Interval
    questions: int


def compare_tables(
    first: QuestionTable,
    second: QuestionTable,
    metrics: Sequence[str],
    *,
    samples: int = 2000,
    seed: int = 0,
) -> list[Comparison]:
    """Paired cluster bootstrap of second - first, metric by metric.

    Only questions that both have, with a value in both; a metric that no question has in both is
    left out.
    """
    places = {name: number for number, name in enumerate(second.ids)}
    pairs = [(number, places[name]) for number, name in enumerate(first.ids) if name in places]
    differences: dict[str, list[float | None]] = {}
    values: dict[str, list[tuple[float, float]]] = {}
    for metric in metrics:
        if metric not in first.columns or metric not in second.columns:
            continue
        ours, theirs = first.columns[metric], second.columns[metric]
        both = [(ours[a], theirs[b]) for a, b in pairs]
        differences[metric] = [None if a is None or b is None else b - a for a, b in both]
        values[metric] = [(a, b) for a, b in both if a is not None and b is not None]
    clusters = [first.clusters[number] for number, _ in pairs]
    intervals = (
        bootstrap_columns(differences, clusters, samples=samples, seed=seed) if pairs else {}
    )
    return [
        Comparison(
            first.system,
            second.system,
            metric,
            sum(a for a, _ in values[metric]) / len(values[metric]),
            sum(b for _, b in values[metric]) / len(values[metric]),
            interval,
            len(values[metric]),
        )
        for metric, interval in intervals.items()
    ]


def compare_reports(
    first: Sequence[QuestionTable],
    second: Sequence[QuestionTable],
    *,
    system: str | None = None,
    second_system: str | None = None,
    dataset: str | None = None,
    samples: int = 2000,
    seed: int = 0,
) -> list[Comparison]:
    """Every metric of the systems that two reports share, or of one system in each.

    Raises:
        DataError: a system is not there, or the two have nothing in common.
    """
    if system is not None:
        pairs = [
            (table_of(first, system, dataset), table_of(second, second_system or system, dataset))
        ]
    else:
        theirs = {(table.system, table.dataset): table for table in second}
        pairs = [
            (table, theirs[key])
            for table in first
            if (key := (table.system, table.dataset)) in theirs and dataset in (None, table.dataset)
        ]
    found = [
        entry
        for one, other in pairs
        for entry in compare_tables(one, other, list(one.columns), samples=samples, seed=seed)
    ]
    if not found:
        raise DataError(
            "the two reports share no system with a question and a metric in common",
            expected="two reports on the same dev questions",
            action="evaluate both with the same questions.dev_uri, dev_limit and seed, or name a "
            "row with --system",
        )
    return found


def write_questions(tables: Sequence[QuestionTable], path: str | os.PathLike[str]) -> Path:
    """Write ``questions.parquet``."""
    metrics = list(dict.fromkeys(name for table in tables for name in table.columns))
    rows: dict[str, list[object]] = {name: [] for name in (*_KEYS, *metrics)}
    for table in tables:
        size = len(table.ids)
        rows["system"] += [table.system] * size
        rows["dataset"] += [table.dataset] * size
        rows["question_id"] += list(table.ids)
        rows["cluster"] += list(table.clusters)
        for name in metrics:
            rows[name] += list(table.columns.get(name, [None] * size))
    types = [(name, pa.string() if name in _KEYS else pa.float64()) for name in rows]
    pq.write_table(pa.table(rows, schema=pa.schema(types)), path)
    return Path(path)


def read_questions(path: str | os.PathLike[str]) -> list[QuestionTable]:
    """Read what :func:`write_questions` wrote; a system lacks the metrics that none of its
    questions has.

    Raises:
        MissingArtifactError: there is no such file.
        CorruptArtifactError: it is not such a file.
    """
    if not Path(path).is_file():
        raise MissingArtifactError(
            f"no values of single questions at {path}",
            expected=f"{QUESTIONS_FILE}, which evaluate writes beside report.json",
            action="evaluate again, or name the folder of the report artifact",
        )
    try:
        table = pq.read_table(path)
        keys = [table.column(name).to_pylist() for name in _KEYS]
    except (pa.ArrowException, KeyError, OSError) as error:
        raise CorruptArtifactError(
            f"{path} is not a table of questions ({(str(error).splitlines() or [''])[0]})",
            action="evaluate again",
        ) from error
    columns = {
        name: table.column(name).to_pylist() for name in table.column_names if name not in _KEYS
    }
    members: dict[tuple[str, str], list[int]] = {}
    for number, key in enumerate(zip(keys[0], keys[1], strict=True)):
        members.setdefault(key, []).append(number)
    found = []
    for (system, dataset), rows in members.items():
        values = {name: [column[row] for row in rows] for name, column in columns.items()}
        found.append(
            QuestionTable(
                system,
                dataset,
                [keys[2][row] for row in rows],
                [keys[3][row] for row in rows],
                {name: column for name, column in values.items() if known(column)},
            )
        )
    return found


def open_report(place: str | os.PathLike[str]) -> tuple[Report, list[QuestionTable]]:
    """A report and its questions, by the path of a ``report.json``, of its folder, or of a run's
    folder.

    Raises:
        MissingArtifactError: there is no report, or no table of questions beside it.
        ArtifactError: one of them cannot be read.
    """
    path = Path(place)
    if path.is_dir():
        path = path / "report.json"
    report = read_report(path)
    beside = path.parent / QUESTIONS_FILE
    # A run's own report.json names the artifact that has everything.
    artifact = report.meta.get("report")
    if not beside.is_file() and isinstance(artifact, str):
        beside = Path(artifact) / QUESTIONS_FILE
    return report, read_questions(beside)


def table_of(
    tables: Sequence[QuestionTable], system: str, dataset: str | None = None
) -> QuestionTable:
    """The table of a system, on a dataset if several have it.

    Raises:
        DataError: there is none, or more than one.
    """
    found = [
        table for table in tables if table.system == system and dataset in (None, table.dataset)
    ]
    if len(found) != 1:
        have = ", ".join(dict.fromkeys(repr(table.system) for table in tables))
        raise DataError(
            f"the report has {len(found)} tables for the system {system!r}"
            + (f" on {dataset!r}" if dataset else ""),
            expected=f"one of {have}" if not found else "a dataset too",
        )
    return found[0]
