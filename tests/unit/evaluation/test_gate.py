"""The gate and the comparison of two reports, from files to exit codes."""

from __future__ import annotations

import random
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from typer.testing import CliRunner

from invar_ray.cli.main import app
from invar_ray.errors import ArtifactError, DataError, MissingArtifactError
from invar_ray.evaluation.gate import Limits, run_gate
from invar_ray.evaluation.per_question import (
    QUESTIONS_FILE,
    QuestionTable,
    compare_reports,
    compare_tables,
    open_report,
    read_questions,
    table_of,
    write_questions,
)
from invar_ray.evaluation.report import Report, Row, write_report
from invar_ray.evaluation.significance import (
    bootstrap_columns,
    cluster_bootstrap,
    question_clusters,
)

IDS = [f"q{number}" for number in range(120)]
CLUSTERS = [f"c{number // 3}" for number in range(120)]


def column(share: float, seed: int) -> list[float | None]:
    draw = random.Random(seed)
    return [float(draw.random() < share) for _ in IDS]


def made(folder: Path, system: str = "stage 1", **columns: list[float | None]) -> Path:
    """A report of one system on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    metrics: dict[str, Any] = {
        name: fmean(v for v in c if v is not None) for name, c in columns.items()
    }
    write_report(Report([Row(system, "dev", metrics)]), folder / "report.json")
    write_questions([QuestionTable(system, "dev", IDS, CLUSTERS, columns)], folder / QUESTIONS_FILE)
    return folder


GOOD = {
    "recall_at_5": column(0.7, 1),
    "overlap_at_5": column(0.6, 2),
    "exact_match": column(0.4, 3),
}


def gate(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["gate", *arguments])
    return result.exit_code, result.output


def test_an_equal_candidate_passes_and_what_was_checked_is_said(tmp_path: Path) -> None:
    base, same = made(tmp_path / "a", **GOOD), made(tmp_path / "b", **GOOD)
    code, text = gate(
        "--baseline",
        str(base),
        "--candidate",
        str(same),
        "--max-variance",
        "0.5",
        "--min-recall",
        "0.6",
    )
    assert code == 0, text
    assert text.count("pass  ") == 5
    assert "recall@5 is 0.683; allowed: at least 0.6" in text
    assert "1 - overlap@5" in text
    assert "-0.000" not in text
    assert "all 5 checks passed" in text


@pytest.mark.parametrize(
    "broken, words", [("recall_at_5", "FAIL  recall@5"), ("overlap_at_5", "FAIL  1 - overlap@5")]
)
def test_a_worse_candidate_is_stopped_with_its_reason(
    tmp_path: Path, broken: str, words: str
) -> None:
    base = made(tmp_path / "a", **GOOD)
    worse = made(
        tmp_path / "b",
        **(GOOD | {broken: [0.0 if n % 2 else v for n, v in enumerate(GOOD[broken])]}),
    )
    code, text = gate("--baseline", str(base), "--candidate", str(worse / "report.json"))
    assert code == 1
    assert words in text
    assert "1 of 3 checks failed" in text
    # The other way round it is an improvement.
    assert gate("--baseline", str(worse), "--candidate", str(base))[0] == 0


def test_limits_alone_and_tolerances(tmp_path: Path) -> None:
    base = open_report(made(tmp_path / "a", **GOOD))
    values = list(GOOD["recall_at_5"])
    hit = next(number for number, value in enumerate(values) if value)
    values[hit] = 0.0  # one question lost: not significant, but a loss
    worse = open_report(made(tmp_path / "b", **(GOOD | {"recall_at_5": values})))

    def passed(**limits: Any) -> list[bool]:
        return [check.passed for check in run_gate(base, worse, Limits(**limits), system="stage 1")]

    assert passed() == [True, True, True]
    with pytest.raises(DataError, match="the limit max_recall_drop is nan"):
        passed(max_recall_drop=float("nan"))
    assert passed(max_recall_drop=0.0) == [False, True, True]
    assert passed(max_recall_drop=1 / 120) == [True, True, True]
    assert passed(min_recall=0.99, max_variance=0.0, min_exact_match=0.0)[:3] == [
        False,
        False,
        True,
    ]


def test_faulty_input_is_one_clear_error(tmp_path: Path) -> None:
    base = made(tmp_path / "a", **GOOD)
    code, text = gate("--baseline", str(tmp_path / "none"), "--candidate", str(base))
    assert code == 1
    assert "no report at" in text
    lone = tmp_path / "lone"
    lone.mkdir()
    (lone / "report.json").write_bytes((base / "report.json").read_bytes())
    with pytest.raises(MissingArtifactError, match=r"questions\.parquet"):
        open_report(lone)
    (lone / QUESTIONS_FILE).write_text("no parquet")
    with pytest.raises(ArtifactError, match="not a table of questions"):
        open_report(lone)
    opened = open_report(base)
    with pytest.raises(DataError, match=r"0 rows for the system 'other'.*'stage 1'"):
        run_gate(opened, opened, Limits(), system="other")
    with pytest.raises(DataError, match="has no recall_at_7"):
        run_gate(opened, opened, Limits(k=7, min_recall=0.1), system="stage 1")
    elsewhere = QuestionTable("stage 1", "dev", [f"x{i}" for i in IDS], CLUSTERS, GOOD)
    with pytest.raises(DataError, match="no question in common"):
        run_gate((opened[0], [elsewhere]), opened, Limits(), system="stage 1")


def test_a_runs_own_report_leads_to_the_artifacts_questions(tmp_path: Path) -> None:
    artifact = made(tmp_path / "report" / "x", **GOOD)
    report, tables = open_report(artifact)
    write_report(Report(report.rows, meta={"report": str(artifact)}), tmp_path / "report.json")
    assert open_report(tmp_path)[1] == tables


def test_questions_there_and_back(tmp_path: Path) -> None:
    tables = [
        QuestionTable(
            "a", "dev", ["1", "2"], ["c", "c"], {"f1": [0.5, None], "recall_at_5": [1.0, 0.0]}
        ),
        QuestionTable("b", "dev", ["1"], ["c"], {"recall_at_5": [1.0]}),
    ]
    assert read_questions(write_questions(tables, tmp_path / "q.parquet")) == tables


def test_pairs_by_question_not_by_place() -> None:
    first = QuestionTable("a", "dev", ["1", "2", "3"], ["x", "y", "z"], {"f1": [0.0, 0.5, None]})
    second = QuestionTable(
        "b", "dev", ["3", "2", "1", "4"], ["z", "y", "x", "w"], {"f1": [1.0, 0.5, 1.0, 0.0]}
    )
    (found,) = compare_tables(first, second, ["f1", "exact_match"])
    assert (found.questions, found.first_mean, found.second_mean) == (2, 0.25, 0.75)
    assert found.difference.mean == 0.5
    assert (
        compare_tables(first, QuestionTable("c", "dev", ["9"], ["q"], {"f1": [1.0]}), ["f1"]) == []
    )


def test_compare_prints_what_differs(tmp_path: Path) -> None:
    one = made(tmp_path / "a", **GOOD)
    two = made(tmp_path / "b", **(GOOD | {"recall_at_5": [1.0] * 120}))
    result = CliRunner().invoke(app, ["compare", str(one), str(two)])
    assert result.exit_code == 0, result.output
    lines = {line.split()[0]: line for line in result.output.splitlines() if line}
    assert lines["recall@5"].endswith("*")
    assert not lines["overlap@5"].endswith("*")
    assert (
        CliRunner().invoke(app, ["compare", str(one), str(two), "--system", "none"]).exit_code == 1
    )
    with pytest.raises(DataError, match="share no system"):
        compare_reports(open_report(one)[1], [QuestionTable("z", "dev", IDS, CLUSTERS, GOOD)])
    with pytest.raises(DataError, match="2 tables"):
        table_of(open_report(one)[1] * 2, "stage 1")


def test_many_columns_have_the_intervals_of_one() -> None:
    columns = {"a": column(0.3, 5), "b": column(0.8, 6)}
    together = bootstrap_columns(columns, CLUSTERS, samples=500, seed=4)
    for name, values in columns.items():
        alone = cluster_bootstrap([v or 0.0 for v in values], CLUSTERS, samples=500, seed=4)
        assert together[name].low == pytest.approx(alone.low, abs=1e-12)
        assert together[name].high == pytest.approx(alone.high, abs=1e-12)
        assert together[name].mean == pytest.approx(alone.mean)
        assert together[name].clusters == alone.clusters


def test_missing_values_are_left_out_with_their_weight() -> None:
    values: list[float | None] = [1.0, None, 0.0, None]
    found = bootstrap_columns({"a": values, "none": [None] * 4}, ["x", "y", "z", "z"], samples=200)
    assert found.keys() == {"a"}
    assert (found["a"].mean, found["a"].low, found["a"].high, found["a"].clusters) == (
        0.5,
        0.0,
        1.0,
        2,
    )
    with pytest.raises(ValueError, match="got 1 values"):
        bootstrap_columns({"a": [1.0]}, ["x", "y"])
    with pytest.raises(ValueError, match="not finite"):
        bootstrap_columns({"a": [float("inf")]}, ["x"])


def test_clusters_join_questions_through_shared_documents() -> None:
    golds = [["a"], ["b"], ["a", "c"], ["d"], ["c"], []]
    found = question_clusters(golds, ["q0", "q1", "q2", "q3", "q4", "q5"])
    assert found == ["q0", "q1", "q0", "q3", "q0", "q5"]
