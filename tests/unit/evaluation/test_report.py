"""Reports: JSON there and back, refusals, tables, pictures with their numbers beside them."""

from __future__ import annotations

import csv
import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from invar_ray.errors import ArtifactError, CorruptArtifactError, MissingArtifactError
from invar_ray.evaluation.plots import plot_losses, plot_metrics, plot_recall, plot_variance
from invar_ray.evaluation.report import (
    Report,
    Row,
    read_report,
    render_table,
    write_report,
)
from invar_ray.evaluation.tables import print_name

ROWS = [
    Row(
        "untrained",
        "dev",
        {"recall_at_5": 0.5, "overlap_at_5": 0.25, "overlap_between_questions_at_5": 0.1},
    ),
    Row(
        "stage 1",
        "dev",
        {"recall_at_5": 0.75, "overlap_at_5": 0.5, "mrr_at_10": None},
        {"recall_at_5": (0.7, 0.8)},
    ),
]


def read_csv(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.reader(stream))


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_json_holds_what_the_format_says() -> None:
    answer = {"question": "q", "text": "t", "citations": [{"number": 1}]}
    values = json.loads(Report(ROWS, {"train": 1.5}, answer, meta={"seed": 3}).to_json())
    assert values["schema_version"] == 1
    assert values["rows"][0] == {
        "system": "untrained",
        "dataset": "dev",
        "metrics": dict(ROWS[0].metrics),
    }
    assert values["rows"][1]["metrics"]["mrr_at_10"] is None
    assert values["rows"][1]["intervals"] == {"recall_at_5": [0.7, 0.8]}
    assert (values["seconds"], values["answer"], values["meta"]) == (
        {"train": 1.5},
        answer,
        {"seed": 3},
    )


@given(
    st.lists(
        st.builds(
            Row,
            st.text(),
            st.text(),
            st.dictionaries(
                st.text(), st.none() | st.floats(allow_nan=False, allow_infinity=False)
            ),
            st.dictionaries(st.text(), st.tuples(st.floats(0, 1), st.floats(0, 1))),
        ),
        max_size=3,
    ),
    st.dictionaries(st.text(), st.floats(0, 1e6)),
)
def test_json_there_and_back(rows: list[Row], seconds: dict[str, float]) -> None:
    report = Report(rows, seconds)
    assert Report.from_json(report.to_json()) == report


def test_nan_is_written_as_not_measured() -> None:
    values = json.loads(
        Report([Row("s", "d", {"f1": math.nan, "exact_match": math.inf})]).to_json()
    )
    assert values["rows"][0]["metrics"] == {"f1": None, "exact_match": None}


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_unknown_versions_are_refused(version: object) -> None:
    with pytest.raises(ArtifactError, match=r"schema_version.*Expected: 1"):
        Report.from_json(json.dumps({"schema_version": version, "rows": []}))


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"schema_version": 1}',
        '{"schema_version": 1, "rows": [{"system": "s"}]}',
        '{"schema_version": 1, "rows": [{"system": "s", "dataset": "d", "metrics": {"f1": "high"}}]}',  # noqa: E501
        '{"schema_version": 1, "rows": [], "seconds": [1]}',
    ],
)
def test_broken_reports_are_refused(text: str) -> None:
    with pytest.raises(CorruptArtifactError):
        Report.from_json(text)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.json"
    write_report(Report(ROWS), path)
    write_report(Report(ROWS[:1]), path)
    assert read_report(path) == Report(ROWS[:1])
    assert [entry.name for entry in path.parent.iterdir()] == ["report.json"]
    with pytest.raises(MissingArtifactError, match="evaluate first"):
        read_report(tmp_path / "none.json")


def test_a_failed_write_leaves_the_old_report(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_report(Report(ROWS), path)
    with pytest.raises(TypeError):
        write_report(Report(meta={"not": object()}), path)
    assert read_report(path) == Report(ROWS)
    assert len(list(tmp_path.iterdir())) == 1


def test_print_names() -> None:
    assert print_name("recall_at_5") == "recall@5"
    assert print_name("overlap_between_questions_at_5") == "overlap between questions@5"
    assert print_name("exact_match") == "exact match"


def test_plain_table() -> None:
    assert render_table(ROWS, ["recall_at_5", "mrr_at_10"]) == "\n".join(
        [
            "system                 recall@5  mrr@10",
            "----------------------------------------",
            "untrained                 0.500       -",
            "stage 1    0.750 [0.700, 0.800]       -",
        ]
    ).replace("-" * 40, "-" * 39)


def test_table_shows_the_dataset_where_there_are_several() -> None:
    rows = [*ROWS, Row("stage 1", "other", {"recall_at_5": 1.0})]
    assert render_table(rows, ["recall_at_5"]).splitlines()[-1].split() == [
        "stage",
        "1",
        "other",
        "1.000",
    ]


def test_markdown_table() -> None:
    rows = [Row("a|b", "dev", {"f1": 0.5})]
    assert render_table(rows, markdown=True).splitlines() == [
        "| system | dataset |    f1 |",
        "| ------ | ------- | ----: |",
        "| a\\|b    | dev     | 0.500 |",
    ]


def test_losses_are_drawn_and_written(tmp_path: Path) -> None:
    records = [
        {
            "step": step,
            "loss": 2.0 / step,
            "contrastive": 1.0 / step,
            "learning_rate": 1e-4,
            "note": "text",
        }
        for step in range(1, 61)
    ]
    records[2].pop("contrastive")
    records[3]["loss"] = math.nan
    picture = plot_losses(records, tmp_path / "plots" / "losses.png")
    assert min(png_size(picture)) > 300
    lines = read_csv(picture.with_suffix(".csv"))
    assert lines[0] == ["step", "loss", "contrastive", "learning_rate"]
    assert lines[1] == ["1", "2.0", "1.0", "0.0001"]
    assert lines[3][2] == ""
    assert lines[4][1] == ""
    assert len(lines) == 61


def test_losses_need_a_term(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no loss term"):
        plot_losses([{"step": 1, "accuracy": 0.5}], tmp_path / "losses.png")


def test_metrics_are_drawn_and_written(tmp_path: Path) -> None:
    picture = plot_metrics(ROWS, tmp_path / "metrics.png", ["recall_at_5", "f1"])
    assert min(png_size(picture)) > 300
    assert read_csv(picture.with_suffix(".csv")) == [
        ["dataset", "system", "metric", "value", "low", "high"],
        ["dev", "untrained", "recall_at_5", "0.5", "", ""],
        ["dev", "stage 1", "recall_at_5", "0.75", "0.7", "0.8"],
    ]
    with pytest.raises(ValueError, match="no row has any"):
        plot_recall([Row("s", "d", {"f1": 1.0})], tmp_path / "recall.png")


def test_variance_is_drawn_and_written(tmp_path: Path) -> None:
    picture = plot_variance(ROWS, tmp_path / "variance.png")
    assert min(png_size(picture)) > 200
    assert read_csv(picture.with_suffix(".csv")) == [
        ["dataset", "system", "one_minus_overlap_at_5", "overlap_between_questions_at_5"],
        ["dev", "untrained", "0.75", "0.1"],
        ["dev", "stage 1", "0.5", ""],
    ]


def test_matplotlib_is_imported_only_to_draw() -> None:
    code = "import invar_ray.evaluation.report, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
