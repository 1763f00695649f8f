"""The report's page: nothing of the data becomes markup, nothing is loaded, every part that has
data is there.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from invar_ray.evaluation.charts import Bar, bar_chart, column_chart, line_chart
from invar_ray.evaluation.details import (
    SHIFTS,
    RankedFamily,
    rank_shifts,
    recall_curve,
    worst_questions,
)
from invar_ray.evaluation.outcome import Outcome, compare_systems, write_outcome
from invar_ray.evaluation.page import (
    findings,
    render_html,
    render_markdown,
    retrieval_columns,
    sentence,
)
from invar_ray.evaluation.per_question import QuestionTable
from invar_ray.evaluation.report import Report, Row, read_report
from invar_ray.evaluation.tables import render_tables

EVIL = "<script>alert(1)</script>\"'&"
VOID = {"meta"}


class Tags(HTMLParser):
    """Every tag and attribute of a page; fails where tags do not nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def family(*ranked: str, gold: str = "g", name: str = "q") -> RankedFamily:
    return RankedFamily(
        name,
        [EVIL] * len(ranked),
        list(map(list, ranked)),
        [EVIL] * len(ranked),
        [EVIL],
        list(gold),
    )


def outcome() -> Outcome:
    ids, clusters = ["q0", "q1", "q2"], ["a", "b", "c"]
    rows, tables, details = [], [], {}
    for system, value in ((EVIL, 1.0), ("base", 0.0), ("stage 1", 1.0), ("both stages", 1.0)):
        columns: dict[str, Any] = dict.fromkeys(
            [
                "recall_at_1",
                "recall_at_5",
                "overlap_at_5",
                "change_by_rewrite_at_5",
                "exact_match",
                "f1",
            ],
            [value] * 3,
        )
        tables.append(QuestionTable(system, EVIL, ids, clusters, columns))
        metrics = {name: value for name in columns} | {
            "num_families": 3.0,
            "num_answered": 3.0,
            "map": None,
        }
        rows.append(Row(system, EVIL, metrics, {"recall_at_5": (value / 2, value)}))
        families = [family("ag", "bc"), family("g", "g")]
        bins = [{"low": 0.0, "high": 0.1, "count": 2, "confidence": 0.05, "accuracy": 0.5}]
        for kind, made in {
            "recall_curve": recall_curve(families, 3),
            "rank_shifts": rank_shifts(families),
            "worst_questions": worst_questions(families, 5, 2),
            "calibration": bins,
            "risk_coverage": [{"threshold": 0.9, "coverage": 0.5, "risk": 0.1}],
            "seconds_per_answer": {"mean": 0.1, "p50": 0.1, "p95": 0.2},
        }.items():
            details.setdefault(kind, {})[system] = made
    return Outcome(rows, tables, compare_systems(tables, 5, 0), details)


def test_the_page_escapes_everything_and_asks_for_nothing(tmp_path: Path) -> None:
    report = write_outcome(outcome(), tmp_path, overlap_k=5)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    tags = Tags(page)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in tags.found}
    assert not [a for _, a in tags.found if {"src", "href", "xlink:href", "onload"} & a.keys()]
    assert "url(" not in page
    assert "@import" not in page
    assert not re.search(r"https?://", page)
    assert "default-src 'none'" in page
    assert EVIL in tags.text
    for title in (
        "Retrieval",
        "Variance by cause",
        "Answers",
        "Paired comparisons",
        "Questions that change most",
    ):
        assert title in tags.text, title
    assert sum(tag == "svg" for tag, _ in tags.found) == 5
    assert read_report(tmp_path / "report.json").rows == list(report.rows)


def test_all_files_are_written(tmp_path: Path) -> None:
    write_outcome(outcome(), tmp_path, overlap_k=5)
    names = {path.name for path in tmp_path.iterdir()}
    assert {
        "report.json",
        "report.md",
        "report.html",
        "table.txt",
        "questions.parquet",
        "recall.png",
    } <= names
    assert "variance.png" in names


def test_an_empty_report_is_a_page_too() -> None:
    Tags(render_html(Report()))
    assert render_markdown(Report()).startswith("# Report")
    assert render_tables([]) == ""


def test_findings_in_words() -> None:
    report = Report(
        comparisons=[
            {
                "first": "base",
                "second": "stage 1",
                "metric": "recall_at_5",
                "first_mean": 0.46,
                "second_mean": 0.692,
                "difference": 0.232,
                "low": 0.2,
                "high": 0.26,
                "questions": 711,
            }
        ]
    )
    text = (
        "stage 1 against base: recall@5 0.692 against 0.460, +0.232 [+0.200, +0.260], higher (711 "
        "questions)"
    )
    assert findings(report) == [text]
    same = dict(report.comparisons[0]) | {"low": -0.1}
    assert "no difference shown" in sentence(same)


def test_the_terminals_tables_fit_100_columns() -> None:
    names = ["stage 1, rewrites fused", "both stages, oracle passage"]
    retrieval = "recall_at_1 recall_at_5 mrr_at_10 overlap_at_5 worst_recall_at_5 overlap_between_questions_at_5".split()  # noqa: E501
    answers = "exact_match f1 accuracy flip_rate abstained calibration_error".split()
    rows = [
        Row(
            names[0],
            "d",
            dict.fromkeys(retrieval, 0.5) | {"num_families": 711.0},
            {"recall_at_5": (0.4, 0.6)},
        ),
        Row(names[1], "d", dict.fromkeys(answers, 0.5) | {"num_answered": 100.0}),
    ]
    text = render_tables(rows)
    assert max(map(len, text.splitlines())) <= 100
    assert "retrieval, 711 questions" in text
    assert "answers, 100 questions" in text
    assert "[" not in text


def test_rank_shifts_by_hand() -> None:
    families = [
        family("gab", "agb", "abc"),  # 1 -> 2: 1 down; 1 -> none: lost
        family("xyz", "gxy", "xyz"),  # none -> 1: found; none -> none: not counted
        family("abcdeg", "g", "abcdeg"),  # 6 -> 1: 5 up; the same
    ]
    wanted = {"1 to 3 down": 0.2, "lost": 0.2, "found": 0.2, "4 or more up": 0.2, "same": 0.2}
    assert rank_shifts(families) == pytest.approx(dict.fromkeys(SHIFTS, 0.0) | wanted)
    assert rank_shifts([family("a", "b", gold="")]) == {}


def test_recall_curve_by_hand() -> None:
    assert recall_curve([family("abg"), family("g"), family("x")], 4) == pytest.approx(
        [1 / 3, 1 / 3, 2 / 3, 2 / 3]
    )
    assert recall_curve([family("abg", gold="")], 4) == []


def test_the_worst_question_is_one_that_a_wording_loses() -> None:
    families = [
        family("g", "g", name="steady"),
        family("gab", "xyz", name="lost"),
        family("ga", "gb", name="shaky"),
    ]
    found = worst_questions(families, 5, 2)
    assert [entry["question_id"] for entry in found] == ["lost", "shaky"]
    assert [w["gold_rank"] for w in found[0]["wordings"]] == [1, None]
    assert found[1]["wordings"][1]["overlap"] == pytest.approx(1 / 3)
    assert worst_questions([family("g")], 5, 2) == []


def test_charts_escape_and_nest() -> None:
    colours = {EVIL: 0}
    charts = [
        line_chart(
            {EVIL: [(1.0, 0.0), (20.0, 1.0)]}, colours, x_label=EVIL, y_label=EVIL, dots=True
        ),
        line_chart({EVIL: []}, colours, x_label="x", y_label="y", dots=True),
        line_chart({EVIL: [(0.5, 0.5)]}, colours, x_label="x", y_label="y", diagonal=True),
        bar_chart([Bar(EVIL, 0.5, (0.4, 0.6), 0), Bar("zero", 0.0, None, 0)], label=EVIL),
        column_chart(["a", EVIL], {EVIL: [0.0, 2.0]}, colours, label=EVIL),
        bar_chart([Bar("zero", 0.0, None, 0)], label="all zero"),
    ]
    for chart in charts:
        assert "script" not in {tag for tag, _ in Tags(chart).found}
        assert "nan" not in chart.lower()


def test_charts_take_their_colours_from_the_page_and_refer_to_nothing() -> None:
    chart = line_chart(
        {"a $b$ c": [(1.0, 0.5), (2.0, 1.0)]}, {"a $b$ c": 3}, x_label="k", y_label="$y$", dots=True
    )
    assert set(re.findall(r"#\w+", chart)) == set()
    assert set(re.findall(r"var\(--(\w+)\)", chart)) == {"rule", "c3"}
    assert not re.search(r"href|url\(|\bid=|font-family", chart)
    tags = Tags(chart)
    assert sum(tag == "title" for tag, _ in tags.found) == 3, (
        "the curve's name, and its points' values"
    )
    assert "a $b$ c: 2, 1.000" in tags.text
    assert "$y$" in tags.text, "a name is no formula"


def row(system: str, recall: float) -> Row:
    return Row(system, "dev", {"recall_at_5": recall, "num_families": 3.0})


def test_a_row_is_shown_once_unless_it_found_other_things() -> None:
    same = render_html(Report([row("stage 1", 0.5), row("both stages", 0.5)]))
    other = render_html(Report([row("stage 1", 0.5), row("both stages", 0.7)]))
    assert "<th scope=row>both stages</th>" not in same
    assert "<th scope=row>both stages</th>" in other


def test_the_page_says_where_it_comes_from_what_columns_mean_and_what_was_answered() -> None:
    answers = [{"question": "Who?", "gold": ["Ada"], "text": EVIL, "right": False}]
    right = [{"question": "Who?", "gold": ["Ada"], "text": "Ada", "right": True}]
    page = render_html(
        Report(
            [Row("base", "dev", {"exact_match": 0.0, "num_answered": 1.0}), row("base", 0.5)],
            meta={"model": "m", "recipe": "r", "date": "2026-01-02", "command": "c --x"},
            details={"answers": {"base": answers, "both stages": right}},
        )
    )
    text = Tags(page).text
    assert "model m · recipe r · date 2026-01-02 · command c --x" in text
    assert "share of questions whose document is among the first k" in text
    assert "Answers side by side" in text
    assert text.count(EVIL) == 1
    assert "<td class='text best'>Ada</td>" in page


def test_the_first_table_has_no_more_columns_than_a_page_is_wide() -> None:
    metrics = dict.fromkeys(retrieval_columns(5), 0.5)
    page = render_html(Report([Row("stage 1", "dev", {**metrics, "num_families": 3.0})]))
    first, more = page.split("<table>")[1:3]
    assert first.count("<th title=") == 7
    assert "overlap@5" in first
    assert more.count("<th title=") == len(metrics) - 7
