"""A report as pages: Markdown, and one HTML file with its charts that asks nothing of any server.

Everything from data is escaped; a content policy in the page forbids it to load or run anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from invar_ray.evaluation.charts import Bar, bar_chart, column_chart, line_chart
from invar_ray.evaluation.details import SHIFTS
from invar_ray.evaluation.per_question import Comparison
from invar_ray.evaluation.report import Report
from invar_ray.evaluation.tables import (
    ANSWER_METRICS,
    RETRIEVAL_METRICS,
    Row,
    finite,
    print_name,
    render_table,
)

CAUSES = {
    "rewrite": "other wording",
    "window": "other windows",
    "index": "approximate index",
    "precision": "precision",
}
ORIGIN = ("model", "recipe", "date", "command")
LOWER_IS_BETTER = (
    *("flip_rate", "removed_citations", "calibration_error", "change_by", "_std"),
    "worst_wording_loss",
    "wrong_given",
)


_MOST_ASKED = {
    *("recall_at_1", "recall_at_5", "recall_at_20", "mrr_at_10", "answer_recall_at_5"),
    "worst_recall_at_5",
}
"""Columns of the page's first table, beside the overlap: it has to fit its width."""


def retrieval_columns(k: int) -> list[str]:
    """Columns of the retrieval table."""
    recalls = ["recall_at_1", "recall_at_5", "recall_at_20", "recall_at_100"]
    variance = [
        f"overlap_at_{k}",
        *(["overlap_at_10"] if k != 10 else []),
        f"rbo_at_{k}",
        "worst_recall_at_5",
        "worst_wording_loss_at_5",
        f"overlap_between_questions_at_{k}",
    ]
    return [*recalls, "mrr_at_10", "ndcg_at_10", "map", "answer_recall_at_5", *variance]


def answer_columns() -> list[str]:
    """Columns of the answer table."""
    steadiness = ["order_flip_rate", "answer_agreement", "answer_agreement_f1"]
    citations = ["citation_precision", "citation_recall", "removed_citations"]
    return [*ANSWER_METRICS, "wrong_given", *steadiness, *citations]


EXPLAINED = {
    "recall": "share of questions whose document is among the first k",
    "worst recall": "share of questions whose document every wording has among its first k",
    "worst wording loss": "share of what the questions as asked find that some wording loses",
    "overlap": "of the first k of two wordings, how much is shared (0 to 1): higher is steadier",
    "rbo": "like overlap, but the first ranks count most (rank-biased overlap)",
    "between questions": "overlap of different questions: high means that all look alike",
    "mrr": "1 / rank of the document, mean",
    "ndcg": "1 / log2(1 + rank) of the document, mean: low ranks cost less than in mrr",
    "map": "mean precision at the ranks of all right documents",
    "answer recall": "share of questions with a passage among the first 5 that holds the answer",
    "change by": "1 - overlap when only this changes: lower is steadier",
    "exact match": "share of answers equal to a right one",
    "f1": "words shared with a right answer",
    "accuracy": "share of answers that hold a right one",
    "flip rate": "of questions answered right as asked, the share of rewordings answered wrong",
    "order flip rate": "share of right answers that turn wrong when the passages are reversed",
    "answer agreement": "share of wordings whose answer is that of the question as asked",
    "answer agreement f1": "words that the answers of two wordings share",
    "abstained": "share of questions that are refused, or answered with a guess only",
    "wrong given": "share of questions that get a wrong answer, and not as a guess",
    "calibration error": "how far confidence is from the share that is right",
    "citation precision": "share of citations that point to the right document",
    "citation recall": "share of the right documents in the prompt that are cited",
    "removed citations": "marks that pointed to no passage, per answer",
}
"""What a column means, by the beginning of its printed name; the longest that fits counts."""


def headline(report: Report, k: int = 5) -> list[str]:
    """What a reader wants first: how often things are found, by stage 1, the base, MiniLM and BM25,
    how steadily, how many answers are right, and what that means.
    """
    rows = {row.system: row.metrics for row in report.rows}

    def told(metric: str, names: Sequence[str], form: str) -> str:
        values = [(name, finite(rows.get(name, {}).get(metric))) for name in names]
        return ", ".join(f"{name} {value:{form}}" for name, value in values if value is not None)

    found = ("stage 1", "base", "MiniLM", "BM25")
    lines = [
        (f"Document among the first {k}", told(f"recall_at_{k}", found, ".0%")),
        ("In every wording", told(f"worst_recall_at_{k}", found, ".0%")),
        (f"Shared by the first {k} of two wordings", told(f"overlap_at_{k}", found, ".2f")),
        ("Right answers", told("exact_match", ("both stages", "stage 1", "base"), ".0%")),
    ]
    return [f"{title}: {text}." for title, text in lines if text] + [*_meaning(report, k)]


def _meaning(report: Report, k: int) -> Iterable[str]:
    # A report without the base has MiniLM, which stage 1 starts from or is aligned to.
    against = {
        c["first"]: c
        for c in report.comparisons
        if c["second"] == "stage 1" and c["metric"] == f"recall_at_{k}"
    }
    name = "base" if "base" in against else "MiniLM"
    if name not in against:
        return
    entry, other = against[name], "its base" if name == "base" else name
    points = f"{entry['low'] * 100:+.0f} to {entry['high'] * 100:+.0f} points, 95 % interval"
    if entry["low"] > 0:
        yield f"Training made the retriever better than {other} ({points})."
    elif entry["high"] < 0:
        yield (
            f"Training made the retriever WORSE than {other} ({points}). To do: train longer "
            "(retriever.steps), at a lower retriever.optimizer.learning_rate, or on more "
            "questions; until then index with the base (invar-ray index --adapter base)."
        )
    else:
        yield (
            f"Training shows no difference to {other} ({points}). To do: more dev questions "
            "(questions.dev_limit) to see one, or more retriever.steps to make one."
        )


def findings(report: Report, k: int = 5) -> list[str]:
    """The comparisons that matter most, in words."""
    wanted = [
        ("base", "stage 1", "recall_at_5"),
        ("base", "stage 1", f"overlap_at_{k}"),
        ("base", "stage 1", "worst_recall_at_5"),
        ("stage 1, rewrites fused", "stage 1", f"overlap_at_{k}"),
        ("stage 1", "both stages", "exact_match"),
        ("stage 1", "both stages", "f1"),
    ]
    by_key = {(str(c["first"]), str(c["second"]), str(c["metric"])): c for c in report.comparisons}
    return [sentence(by_key[key]) for key in wanted if key in by_key]


def sentence(entry: Mapping[str, Any]) -> str:
    """A comparison in words:
    ``stage 1 against base: recall@5 0.692 against 0.460, +0.232 [0.20, 0.26], higher``.
    """
    return (
        f"{entry['second']} against {entry['first']}: {print_name(str(entry['metric']))} "
        f"{entry['second_mean']:.3f} "
        f"against {entry['first_mean']:.3f}, {entry['difference']:+.3f} [{entry['low']:+.3f}, "
        f"{entry['high']:+.3f}], "
        f"{verdict(entry)} ({entry['questions']} questions)"
    )


def verdict(entry: Mapping[str, Any]) -> str:
    """``higher``, ``lower``, or ``no difference shown`` where the interval holds 0."""
    return "higher" if entry["low"] > 0 else "lower" if entry["high"] < 0 else "no difference shown"


def render_comparisons(comparisons: Sequence[Comparison]) -> str:
    """Comparisons of two reports for a terminal, a table for each system."""
    parts = []
    for pair in dict.fromkeys((entry.first, entry.second) for entry in comparisons):
        mine = [entry for entry in comparisons if (entry.first, entry.second) == pair]
        width = max(len(print_name(entry.metric)) for entry in mine)
        title = pair[0] if pair[0] == pair[1] else f"{pair[0]} (first), {pair[1]} (second)"
        lines = [title, f"{'':{width}}   first  second  difference  interval            questions"]
        for entry in mine:
            bounds = f"[{entry.difference.low:+.3f}, {entry.difference.high:+.3f}]"
            mark = "  *" if entry.difference.excludes_zero else ""
            lines.append(
                f"{print_name(entry.metric):{width}}  {entry.first_mean:6.3f}  "
                f"{entry.second_mean:6.3f}  "
                f"{entry.difference.mean:+10.3f}  {bounds:18}  {entry.questions:9}{mark}"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n\n* the 95 % interval leaves out 0"


def render_markdown(report: Report, overlap_k: int = 5) -> str:
    """The report's tables as Markdown."""
    retrieval, answers = _split(report.rows)
    said = (*headline(report, overlap_k), *findings(report, overlap_k))
    parts = ["# Report", "", _origin(report), "", *(f"- {text}" for text in said), ""]
    if retrieval:
        shown = _shown(retrieval, retrieval_columns(overlap_k))
        parts += [
            "## Retrieval",
            "",
            _count(retrieval, "num_families"),
            "",
            _table(retrieval, shown),
            "",
        ]
        causes = [f"change_by_{cause}_at_{overlap_k}" for cause in CAUSES]
        if present := _shown(retrieval, causes):
            text = f"1 - overlap@{overlap_k} with what the anchor finds as served."
            parts += ["## Variance by cause", "", text, "", _table(retrieval, present), ""]
    if answers:
        shown = _shown(answers, answer_columns())
        parts += ["## Answers", "", _count(answers, "num_answered"), "", _table(answers, shown), ""]
    if report.comparisons:
        parts += [
            "## Paired comparisons",
            "",
            *(f"- {sentence(entry)}" for entry in report.comparisons),
            "",
        ]
    parts += [
        "Brackets are 95 % intervals: bootstrap over clusters of questions that share a gold "
        "document. "
        "A paired difference is real at that level where its interval leaves out 0.",
        "",
    ]
    return "\n".join(parts)


def render_html(report: Report, overlap_k: int = 5) -> str:
    """The report as one self-contained page."""
    retrieval, answers = _split(report.rows)
    names = dict.fromkeys(row.system for row in (*retrieval, *answers))
    colours = {name: number % 10 for number, name in enumerate(names)}
    details = report.details
    body = [f"<h1>Report</h1><p class=lead>{escape(_origin(report))}</p>"]
    if found := headline(report, overlap_k):
        body.append(
            "<ul class=findings>" + "".join(f"<li>{escape(text)}</li>" for text in found) + "</ul>"
        )
    if retrieval:
        body.append(_section("Retrieval", _count(retrieval, "num_families")))
        columns = _shown(retrieval, retrieval_columns(overlap_k))
        most = [
            name for name in columns if name in _MOST_ASKED or name == f"overlap_at_{overlap_k}"
        ]
        body.append(_html_table(_once(retrieval), most))
        if more := [name for name in columns if name not in most]:
            body.append("<h3>More measures</h3>")
            body.append(_html_table(_once(retrieval), more))
        body += _recall_figure(details.get("recall_curve", {}), colours)
        body += _variance_figures(retrieval, overlap_k, colours)
        body += _shift_figure(details.get("rank_shifts", {}), colours)
    if answers:
        body.append(_section("Answers", _count(answers, "num_answered")))
        body.append(_html_table(answers, _shown(answers, answer_columns())))
        body += _side_by_side(details.get("answers", {}))
        body += _calibration_figure(details.get("calibration", {}), colours)
        body += _risk_figure(details.get("risk_coverage", {}), colours)
        body += _latency(details.get("seconds_per_answer", {}))
    if report.comparisons:
        body.append(
            _section(
                "Paired comparisons",
                "Second minus first on the same questions, with its 95 % interval.",
            )
        )
        body.append(_comparison_table(report.comparisons))
    body += _worst(details.get("worst_questions", {}), overlap_k)
    note = (
        "Brackets and whiskers are 95 % intervals from a bootstrap over clusters of questions that "
        "share a gold "
        "document. Ranks are over documents, at their best passage."
    )
    body.append(f"<p class=note>{note}</p>")
    style = (resources.files("invar_ray.evaluation") / "page.css").read_text(encoding="utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>invar_ray report</title><style>{style}</style></head>\n<body><main>'
        + "\n".join(body)
        + "</main></body></html>\n"
    )


def _split(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    return [row for row in rows if "num_families" in row.metrics], [
        r for r in rows if "num_answered" in r.metrics
    ]


def _shown(rows: Sequence[Row], columns: Iterable[str]) -> list[str]:
    return [
        name for name in columns if any(finite(row.metrics.get(name)) is not None for row in rows)
    ]


def _table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    return render_table(rows, columns, markdown=True)


def _count(rows: Sequence[Row], name: str) -> str:
    counts = sorted({int(row.metrics[name] or 0) for row in rows})
    return (
        f"{' to '.join(f'{count:,}' for count in dict.fromkeys((counts[0], counts[-1])))} "
        "questions."
    )


def _origin(report: Report) -> str:
    """Model, recipe, questions, date and command, as far as the report has them."""
    datasets = ", ".join(dict.fromkeys(row.dataset for row in report.rows))
    parts = [f"{name} {report.meta[name]}" for name in ORIGIN if report.meta.get(name)]
    return " · ".join([f"Dev questions: {datasets}", *parts])


def _once(rows: Sequence[Row]) -> list[Row]:
    """Without the row of both stages where it retrieves as stage 1 does."""
    found = {row.system: [row.metrics.get(name) for name in RETRIEVAL_METRICS] for row in rows}
    same = found.get("both stages") == found.get("stage 1")
    return [row for row in rows if row.system != "both stages" or not same]


def _side_by_side(answers: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """A table a question: what each system answered."""
    if not answers:
        return []
    parts = [_section("Answers side by side", "The question as asked; right answers are marked.")]
    for number, first in enumerate(next(iter(answers.values()))):
        lines = []
        for system, entries in answers.items():
            if number < len(entries):
                entry = entries[number]
                mark = " class='text best'" if entry["right"] else " class=text"
                text = escape(str(entry["text"])) or "<i>nothing</i>"
                lines.append(f"<tr><th scope=row>{escape(system)}</th><td{mark}>{text}</td></tr>")
        gold = escape(" / ".join(first["gold"]))
        caption = f"{escape(str(first['question']))} <small>right: {gold}</small>"
        parts.append(
            f"<div class=wide><table class=answers><caption>{caption}</caption>"
            f"<tbody>{''.join(lines)}</tbody></table></div>"
        )
    return parts


def _meant(title: str) -> str:
    """What a column of this title means; empty where nothing is known."""
    fits = [name for name in EXPLAINED if title.startswith(name)]
    return EXPLAINED[max(fits, key=len)] if fits else ""


def _section(title: str, text: str) -> str:
    return f"<h2>{escape(title)}</h2><p>{escape(text)}</p>"


def _html_table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    best = {name: _best(rows, name) for name in columns}
    titles = (
        print_name(name).replace("overlap between questions", "between questions")
        for name in columns
    )
    shown = list(titles)
    head = "".join(f'<th title="{escape(_meant(title))}">{escape(title)}</th>' for title in shown)
    words: dict[str, list[str]] = {}
    for title in shown:
        words.setdefault(_meant(title), []).append(title)
    meanings = "".join(
        f"<dt>{escape(', '.join(alike))}</dt><dd>{escape(meant)}</dd>"
        for meant, alike in words.items()
        if meant
    )
    lines = []
    for row in rows:
        cells = []
        for name in columns:
            value = finite(row.metrics.get(name))
            if value is None:
                cells.append("<td class=none>–</td>")
                continue
            bounds = row.intervals.get(name)
            small = f"<small>{bounds[0]:.3f}–{bounds[1]:.3f}</small>" if bounds else ""
            mark = " class=best" if value == best[name] else ""
            cells.append(f"<td{mark}>{value:.3f}{small}</td>")
        lines.append(f"<tr><th scope=row>{escape(row.system)}</th>{''.join(cells)}</tr>")
    table = f"<div class=wide><table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    told = f"<details open><summary>What the columns mean</summary><dl>{meanings}</dl></details>"
    return table + (told if meanings else "")


def _best(rows: Sequence[Row], name: str) -> float | None:
    values = [value for row in rows if (value := finite(row.metrics.get(name))) is not None]
    if name == "abstained" or "between_questions" in name or len(set(values)) < 2:
        return None  # neither more nor less of these is better by itself
    return min(values) if any(part in name for part in LOWER_IS_BETTER) else max(values)


def _figure(
    title: str,
    text: str,
    chart: str,
    legend: Iterable[str] = (),
    colours: Mapping[str, int] | None = None,
) -> str:
    keys = "".join(f'<li class="k{(colours or {})[name]}">{escape(name)}</li>' for name in legend)
    return (
        f"<figure><figcaption><b>{escape(title)}</b> {escape(text)}</figcaption><div "
        f"class=chart>{chart}</div>"
        + (f"<ul class=legend>{keys}</ul>" if keys else "")
        + "</figure>"
    )


def _recall_figure(curves: Mapping[str, Sequence[float]], colours: Mapping[str, int]) -> list[str]:
    # Stage 2 retrieves as stage 1 does: its curve would hide the other.
    shown = {name: curve for name, curve in curves.items() if name != "both stages"}
    if not shown:
        return []
    points = {
        name: [(float(k), value) for k, value in enumerate(curve, start=1)]
        for name, curve in shown.items()
    }
    chart = line_chart(points, colours, x_label="k", y_label="recall@k")
    return [_figure("Recall@k", "of the questions as asked", chart, shown, colours)]


def _variance_figures(rows: Sequence[Row], k: int, colours: Mapping[str, int]) -> list[str]:
    found = []
    for cause, words in CAUSES.items():
        name = f"change_by_{cause}_at_{k}"
        bars = [
            Bar(row.system, value, row.intervals.get(name), colours[row.system])
            for row in rows
            if row.system != "both stages" and (value := finite(row.metrics.get(name))) is not None
        ]
        if bars:
            chart = bar_chart(bars, label=f"1 - overlap@{k}; lower is steadier")
            found.append(
                _figure(f"Variance: {words}", "how much of the first results changes", chart)
            )
    if not found:
        return []
    return [
        _section(
            "Variance by cause",
            "How much the first results change when nothing but one thing does.",
        ),
        *found,
    ]


def _shift_figure(
    shifts: Mapping[str, Mapping[str, float]], colours: Mapping[str, int]
) -> list[str]:
    shown = {
        name: shifts[name] for name in ("MiniLM", "base", "stage 1") if name in shifts
    } or dict(shifts)
    if not shown:
        return []
    series = {name: [values.get(shift, 0.0) for shift in SHIFTS] for name, values in shown.items()}
    text = "what a rewrite does to the rank of the gold document (share of rewrites)"
    return [
        _figure(
            "Rank shifts:", text, column_chart(SHIFTS, series, colours, label=text), shown, colours
        )
    ]


def _calibration_figure(
    bins: Mapping[str, Sequence[Mapping[str, float]]], colours: Mapping[str, int]
) -> list[str]:
    shown = {name: bins[name] for name in ("base", "stage 1", "both stages") if name in bins}
    if not shown:
        return []
    points = {
        name: [(b["confidence"], b["accuracy"]) for b in entries] for name, entries in shown.items()
    }
    chart = line_chart(
        points,
        colours,
        x_label="confidence of the answer",
        y_label="share right",
        diagonal=True,
        dots=True,
    )
    text = "on the diagonal, confidence is the chance to be right (exact match)"
    return [_figure("Calibration:", text, chart, shown, colours)]


def _risk_figure(
    curves: Mapping[str, Sequence[Mapping[str, float]]], colours: Mapping[str, int]
) -> list[str]:
    shown = {name: curves[name] for name in ("base", "stage 1", "both stages") if name in curves}
    if not shown:
        return []
    points = {
        name: [(point["coverage"], point["risk"]) for point in curve]
        for name, curve in shown.items()
    }
    chart = line_chart(
        points, colours, x_label="share of questions answered", y_label="share of these wrong"
    )
    text = "what answering only the questions that it is surest of would cost and spare"
    return [_figure("Risk and coverage:", text, chart, shown, colours)]


def _latency(seconds: Mapping[str, Mapping[str, float]]) -> list[str]:
    if not seconds:
        return []
    rows = "".join(
        f"<tr><th scope=row>{escape(name)}</th>"
        f"<td>{v['mean']:.3f}</td><td>{v['p50']:.3f}</td><td>{v['p95']:.3f}</td></tr>"
        for name, v in seconds.items()
    )
    head = "<tr><th>seconds an answer, batched</th><th>mean</th><th>median</th><th>95 %</th></tr>"
    return [f"<div class=wide><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>"]


def _comparison_table(comparisons: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for entry in comparisons:
        cells = [
            f"<th scope=row>{escape(str(entry['second']))} against "
            f"{escape(str(entry['first']))}</th>",
            f"<td class=text>{escape(print_name(str(entry['metric'])))}</td>",
            f"<td>{entry['first_mean']:.3f}</td><td>{entry['second_mean']:.3f}</td>",
            f"<td>{entry['difference']:+.3f}<small>{entry['low']:+.3f} to "
            f"{entry['high']:+.3f}</small></td>",
            f"<td class=text>{verdict(entry)}</td><td>{entry['questions']}</td>",
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    head = "<th></th><th class=text>metric</th><th>first</th><th>second</th><th>difference</th><th></th><th>questions</th>"
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def _worst(worst: Mapping[str, Sequence[Mapping[str, Any]]], k: int) -> list[str]:
    system = next((name for name in ("stage 1", "base") if name in worst), next(iter(worst), None))
    if system is None:
        return []
    text = f"What {system} finds for each wording of the questions whose results change most."
    parts = [_section("Questions that change most", text)]
    for entry in worst[system]:
        lines = []
        for number, wording in enumerate(entry["wordings"]):
            rank = "not found" if wording["gold_rank"] is None else str(wording["gold_rank"])
            overlap = "" if number == 0 else f"{wording['overlap']:.2f}"
            lines.append(
                f"<tr><td class=text>{escape(wording['text'])}</td><td>{rank}</td><td>{overlap}</td>"
                f"<td class=text>{escape(wording['top'])}</td></tr>"
            )
        head = (
            f"<th class=text>wording</th><th>rank of gold</th><th>overlap@{k}</th><th "
            "class=text>found first</th>"
        )
        answers = escape(" / ".join(entry["answers"]))
        parts.append(
            f"<div class=wide><table class=worst><caption>{escape(entry['question_id'])} · answer: "
            f"{answers}</caption>"
            f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        )
    return parts
