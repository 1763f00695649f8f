"""A report: rows of metrics, how long each step took, one answered question; as JSON, as a table,
as pictures.

``report.json`` (``schema_version`` 1)::

    {"schema_version": 1,
     "rows": [{"system": "untrained", "dataset": "dev", "metrics": {"recall_at_5": 0.64}}],
     "seconds": {"train_retriever": 41.2},
     "answer": {"question": "..", "text": "..", "citations": [..]} | null,
     "comparisons": [{"first": "base", "second": "stage 1", "metric": "recall_at_5",
                      "difference": 0.2, ..}],
     "details": {..},
     "meta": {..}}

Metric names are written ``recall_at_5`` in code and JSON, ``recall@5`` in print.  Rows and tables
live in :mod:`invar_ray.evaluation.tables`, pictures in :mod:`invar_ray.evaluation.plots`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from invar_ray.errors import ArtifactError, CorruptArtifactError, MissingArtifactError
from invar_ray.evaluation.tables import (
    RETRIEVAL_METRICS,
    VARIANCE_METRICS,
    Row,
    finite,
    render_table,
)
from invar_ray.store.files import write_atomic

__all__ = [
    "RETRIEVAL_METRICS",
    "SCHEMA_VERSION",
    "VARIANCE_METRICS",
    "Report",
    "Row",
    "read_report",
    "render_table",
    "write_report",
]

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Report:
    """What a run produced.

    Attributes:
        seconds: wall-clock seconds of each step.
        answer: ``{"question", "text", "citations"}`` of one question asked at the end, or ``None``.
        comparisons: paired differences of two systems, as
            :func:`invar_ray.evaluation.outcome.comparison_rows` makes them.
        details: what the plots of ``report.html`` draw; see ``docs/design/report.md``.
        meta: anything that makes the numbers reproducible (artifact names, versions, seeds);
            JSON-able.
    """

    rows: Sequence[Row] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    answer: Mapping[str, Any] | None = None
    schema_version: int = SCHEMA_VERSION
    meta: Mapping[str, Any] = field(default_factory=dict)
    comparisons: Sequence[Mapping[str, Any]] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Strict JSON (no NaN), two spaces of indent, a newline at the end."""
        rows = []
        for row in self.rows:
            entry: dict[str, Any] = {
                "system": row.system,
                "dataset": row.dataset,
                "metrics": {name: finite(value) for name, value in row.metrics.items()},
            }
            if row.intervals:
                entry["intervals"] = {name: list(bounds) for name, bounds in row.intervals.items()}
            rows.append(entry)
        values = {
            "schema_version": self.schema_version,
            "rows": rows,
            "seconds": dict(self.seconds),
            "answer": dict(self.answer) if self.answer is not None else None,
            "comparisons": [dict(entry) for entry in self.comparisons],
            "details": dict(self.details),
            "meta": dict(self.meta),
        }
        return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what :meth:`to_json` wrote.

        Raises:
            CorruptArtifactError: not JSON, or a field is missing or of a wrong type.
            ArtifactError: a ``schema_version`` that this release does not know.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise CorruptArtifactError(
                f"the report is not JSON: {error}", action="evaluate again"
            ) from error
        if not isinstance(values, dict):
            raise CorruptArtifactError(
                f"the report holds a {type(values).__name__}", expected="an object"
            )
        if values.get("schema_version") != SCHEMA_VERSION:
            raise ArtifactError(
                f"a report of schema_version {values.get('schema_version')!r}",
                expected=f"{SCHEMA_VERSION}",
                action="read it with the release that wrote it, or evaluate again",
            )
        try:
            rows = [
                Row(
                    system=str(row["system"]),
                    dataset=str(row["dataset"]),
                    metrics={
                        name: None if value is None else float(value)
                        for name, value in row["metrics"].items()
                    },
                    intervals={
                        name: (float(low), float(high))
                        for name, (low, high) in row.get("intervals", {}).items()
                    },
                )
                for row in values["rows"]
            ]
            seconds = {name: float(value) for name, value in values.get("seconds", {}).items()}
            answer, meta = values.get("answer"), values.get("meta", {})
            return cls(
                rows,
                seconds,
                None if answer is None else dict(answer),
                SCHEMA_VERSION,
                dict(meta),
                tuple(dict(entry) for entry in values.get("comparisons", [])),
                dict(values.get("details", {})),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptArtifactError(
                f"the report lacks a field or holds one of a wrong type: {error!r}",
                expected="rows of system, dataset and metrics",
                action="evaluate again",
            ) from error


def write_report(report: Report, path: str | os.PathLike[str]) -> Path:
    """Write ``report`` as JSON, all or nothing: a reader sees the old file or the new one, never a
    part.
    """
    write_atomic(Path(path), report.to_json().encode("utf-8"))
    return Path(path)


def read_report(path: str | os.PathLike[str]) -> Report:
    """Read a report file.

    Raises:
        MissingArtifactError: there is no such file.
        ArtifactError: see :meth:`Report.from_json`.
    """
    place = Path(path)
    if not place.is_file():
        raise MissingArtifactError(f"no report at {place}", action="evaluate first")
    return Report.from_json(place.read_text(encoding="utf-8"))
