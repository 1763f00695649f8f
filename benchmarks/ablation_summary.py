"""Tables and pictures of the ablation's results."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, pstdev

from invar_ray.evaluation.charts import COLOURS, new_figure, tidy
from invar_ray.evaluation.significance import Interval, paired_cluster_bootstrap

# what the others are compared with; the first one's differences are drawn
REFERENCES = (
    "anchor",
    "environments",
)
# name in the tables, column of the questions' files, how a reader wants it
MEASURES: tuple[tuple[str, Callable[[dict[str, str]], float], str], ...] = (
    ("recall@5", lambda row: float(row["recall_at_5"]), "higher"),
    ("worst-of-family recall@5", lambda row: float(row["worst_recall_at_5"]), "higher"),
    ("1 - overlap@10", lambda row: 1.0 - float(row["overlap_at_10"]), "lower"),
)

Run = dict[str, str]
Questions = list[dict[str, str]]


def write_summary(folder: Path) -> str:
    """Write ``summary.md`` and ``summary-<split>.png`` into ``folder`` from ``runs.csv``; the text.

    A system that ran with several settings (a choice of weights) has a row for each.

    Raises:
        SystemExit: there are no results.
    """
    path = folder / "runs.csv"
    if not path.exists():
        raise SystemExit(f"{path} is not there: run `ablation.py run` first")
    with open(path, encoding="utf-8", newline="") as stream:
        runs = list(csv.DictReader(stream))
    lines = ["# Ablation of the losses", ""]
    lines += [
        "Intervals: 95 %, paired cluster bootstrap by gold document, values averaged over seeds "
        "first.",
        "",
    ]
    for split, questions, passages in dict.fromkeys(_set_of(run) for run in runs):
        lines += _section(
            folder, split, [run for run in runs if _set_of(run) == (split, questions, passages)]
        )
    text = "\n".join(lines) + "\n"
    (folder / "summary.md").write_text(text, encoding="utf-8")
    return text


def _set_of(run: Run) -> tuple[str, str, str]:
    return run["split"], run["questions"], run["passages"]


def _labels(runs: list[Run]) -> list[str]:
    """A name for each run's row: its system, and where that ran with several settings, those."""
    shared = set.intersection(*(set(run["overrides"].split()) for run in runs))
    settings: dict[str, set[str]] = {}
    for run in runs:
        settings.setdefault(run["system"], set()).add(run["settings"])
    labels = []
    for run in runs:
        own = [
            one.removeprefix("retriever.") for one in run["overrides"].split() if one not in shared
        ]
        several = len(settings[run["system"]]) > 1
        labels.append(
            f"{run['system']} ({', '.join(own) or 'as configured'})" if several else run["system"]
        )
    return labels


def _section(folder: Path, split: str, runs: list[Run]) -> list[str]:
    first = runs[0]
    lines = [
        f"## {split}",
        "",
        f"{first['questions']} questions, {first['passages']} passages.",
        "",
    ]
    labels = _labels(runs)
    of_system: dict[str, dict[int, Questions]] = {}
    for label, run in zip(labels, runs, strict=True):
        of_system.setdefault(label, {})[int(run["seed"])] = _questions(folder, run)
    names = [name for name, _, _ in MEASURES]
    lines.append(f"| system | seeds | {' | '.join(names)} | overlap@10 between questions |")
    lines.append("|---|" + "---|" * (len(names) + 2))
    for system, seeds in of_system.items():
        cells = []
        for _, value, _ in MEASURES:
            means = [fmean(value(row) for row in questions) for questions in seeds.values()]
            cells.append(
                f"{fmean(means):.3f}" + (f" ± {pstdev(means):.3f}" if len(means) > 1 else "")
            )
        between = [
            float(run["overlap_between_questions_at_10"])
            for label, run in zip(labels, runs, strict=True)
            if label == system and run.get("overlap_between_questions_at_10")
        ]
        cells.append(f"{fmean(between):.4f}" if between else "")
        lines.append(f"| {system} | {len(seeds)} | {' | '.join(cells)} |")
    lines.append("")
    lines += _by_kind(folder, labels, runs)
    for reference in (name for name in REFERENCES if name in of_system):
        parts: list[tuple[str, Callable[[dict[str, str]], bool]]] = [
            ("all questions", lambda row: True)
        ]
        seen = sum(row["seen"] == "1" for row in next(iter(of_system[reference].values())))
        if seen > 0:
            parts.append(
                (
                    f"without the {seen} whose passage or title occurs in train",
                    lambda row: row["seen"] == "0",
                )
            )
        for label, keep in parts:
            drawn = {
                system: [
                    _difference(seeds, of_system[reference], value, keep)
                    for _, value, _ in MEASURES
                ]
                for system, seeds in of_system.items()
                if system != reference
            }
            lines += _differences(
                reference, label, drawn, _mean(of_system[reference], MEASURES[-1][1], keep)
            )
            if drawn and reference == REFERENCES[0] and label == "all questions":
                _plot(drawn, folder / f"summary-{split}.png", split)
    return lines


def _by_kind(folder: Path, labels: list[str], runs: list[Run]) -> list[str]:
    """1 - overlap@10 with the question as asked, of each kind of rewrite (identical ones
    included).
    """
    values: dict[str, dict[str, list[float]]] = {}
    for label, run in zip(labels, runs, strict=True):
        path = folder / "wordings" / run["file"]
        for row in _rows(path) if path.exists() else ():
            values.setdefault(label, {}).setdefault(row["kind"], []).append(
                1.0 - float(row["overlap_at_10"])
            )
    kinds = sorted({kind for of_kind in values.values() for kind in of_kind})
    if not kinds:
        return []
    lines = ["1 - overlap@10 by kind of rewrite:", "", f"| system | {' | '.join(kinds)} |"]
    lines.append("|---|" + "---|" * len(kinds))
    for label, of_kind in values.items():
        lines.append(
            f"| {label} | {' | '.join(f'{fmean(of_kind[kind]):.3f}' if kind in of_kind else '' for kind in kinds)} |"  # noqa: E501
        )
    return [*lines, ""]


def _differences(
    reference: str, label: str, drawn: dict[str, list[Interval]], variance: float
) -> list[str]:
    """``variance``: the reference's last measure, of which the last column is a share."""
    names = [name for name, _, _ in MEASURES]
    lines = [
        f"Difference from `{reference}`, {label}:",
        "",
        f"| system | {' | '.join(names)} | relative |",
    ]
    lines.append("|---|" + "---|" * (len(names) + 1))
    for system, found in drawn.items():
        cells = [f"{one.mean:+.3f} [{one.low:+.3f}, {one.high:+.3f}]" for one in found]
        lines.append(f"| {system} | {' | '.join(cells)} | {found[-1].mean / variance:+.1%} |")
    return [*lines, ""]


def _mean(
    seeds: dict[int, Questions],
    value: Callable[[dict[str, str]], float],
    keep: Callable[[dict[str, str]], bool],
) -> float:
    return fmean(value(row) for questions in seeds.values() for row in questions if keep(row))


def _difference(
    seeds: dict[int, Questions],
    reference: dict[int, Questions],
    value: Callable[[dict[str, str]], float],
    keep: Callable[[dict[str, str]], bool],
) -> Interval:
    def kept(runs: dict[int, Questions]) -> list[list[float]]:
        return [[value(row) for row in questions if keep(row)] for questions in runs.values()]

    rows = [row for row in next(iter(reference.values())) if keep(row)]
    for questions in [*seeds.values(), *reference.values()]:
        if [row["id"] for row in questions if keep(row)] != [row["id"] for row in rows]:
            raise ValueError("the runs were measured on different questions")
    return paired_cluster_bootstrap(kept(seeds), kept(reference), [row["cluster"] for row in rows])


def _plot(drawn: dict[str, list[Interval]], path: Path, split: str) -> None:
    figure = new_figure(4.2 * len(MEASURES), 1.4 + 0.45 * len(drawn))
    systems: Sequence[str] = list(drawn)
    for number, (name, _, better) in enumerate(MEASURES):
        axes = figure.add_subplot(1, len(MEASURES), number + 1)
        for place, system in enumerate(systems):
            one = drawn[system][number]
            axes.errorbar(
                one.mean,
                place,
                xerr=[[one.mean - one.low], [one.high - one.mean]],
                fmt="o",
                color=COLOURS[place % len(COLOURS)],
                capsize=3,
            )
        axes.axvline(0.0, color="#555555", linewidth=0.8)
        axes.set_yticks(range(len(systems)), systems if number == 0 else [""] * len(systems))
        axes.invert_yaxis()
        axes.set_title(f"{name} ({split})")
        axes.set_xlabel(f"difference from {REFERENCES[0]}; {better} is better")
        tidy(axes, grid="x")
    figure.savefig(path, format="png")


def _questions(folder: Path, run: Run) -> Questions:
    return _rows(folder / "questions" / run["file"])


def _rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))
