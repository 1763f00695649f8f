"""The pictures beside a report and a training: PNG files, each with its numbers as CSV beside
it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invar_ray.evaluation.charts import COLOURS, INK, Bar, draw_bars, new_figure, tidy
from invar_ray.evaluation.tables import Row, print_name, write_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOSS_NAMES = frozenset({"contrastive", "alignment", "invariance", "risk_variance", "answer"})


def plot_losses(records: Sequence[Mapping[str, Any]], path_png: str | os.PathLike[str]) -> Path:
    """Draw loss curves, one panel per term (the terms differ in scale), over the optimizer step.

    Args:
        records: one mapping per logged step with ``step`` and numbers. A *term* is a key that has
            the word ``loss`` in it or names one (``contrastive``, ``alignment``, ``invariance``,
            ``risk_variance``, ``answer``).
        path_png: the picture; a CSV with *all* numbers of the records is written beside it.

    Returns:
        The path of the picture.

    Raises:
        ValueError: no record, or no record with a loss term.
    """
    from matplotlib.ticker import MaxNLocator

    keys = list(
        dict.fromkeys(
            key for record in records for key, value in record.items() if _is_number(value)
        )
    )
    terms = [key for key in keys if key in LOSS_NAMES or "loss" in key.lower().split("_")]
    if not terms:
        raise ValueError(f"no loss term among the keys of {len(records)} records: {keys}")
    terms.sort(key=lambda name: name != "loss")  # the sum first, the others as logged
    steps = [record.get("step", number) for number, record in enumerate(records, start=1)]

    columns = [key for key in keys if key != "step"]
    path = Path(path_png)
    lines = [
        [step, *(_number(record.get(key)) for key in columns)]
        for step, record in zip(steps, records, strict=True)
    ]
    write_csv(path.with_suffix(".csv"), ["step", *columns], lines)

    num_columns = 2 if len(terms) == 4 else min(len(terms), 3)
    num_rows = math.ceil(len(terms) / num_columns)
    figure = new_figure(4.2 * num_columns, 2.9 * num_rows)
    for number, term in enumerate(terms):
        axes = figure.add_subplot(num_rows, num_columns, number + 1)
        points = [
            (s, v)
            for s, r in zip(steps, records, strict=True)
            if (v := _number(r.get(term))) is not None
        ]
        xs, ys = [x for x, _ in points], [y for _, y in points]
        colour = COLOURS[number % len(COLOURS)]
        smooth = _running_mean(ys, max(1, len(ys) // 20))
        if len(ys) >= 40:
            axes.plot(xs, ys, color=colour, alpha=0.3, linewidth=0.8)
        axes.plot(xs, smooth if len(ys) >= 40 else ys, color=colour, linewidth=1.8)
        axes.set_title(print_name(term))
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("nats")
        tidy(axes, grid="y")
    return _save(figure, path)


def plot_metrics(
    rows: Sequence[Row],
    path_png: str | os.PathLike[str],
    metrics: Sequence[str] = ("recall_at_1", "recall_at_5"),
) -> Path:
    """Draw bars: a panel per dataset, a group per metric, a bar per system, intervals where a row
    has them.

    Metrics that no row has are left out. The CSV beside the picture holds one line per dataset,
    system and metric.

    Raises:
        ValueError: no row has any of ``metrics``.
    """
    shown = [
        name for name in metrics if any(_number(row.metrics.get(name)) is not None for row in rows)
    ]
    if not shown:
        raise ValueError(f"no row has any of {list(metrics)}")
    path = Path(path_png)
    write_csv(
        path.with_suffix(".csv"),
        ["dataset", "system", "metric", "value", "low", "high"],
        [
            [
                row.dataset,
                row.system,
                name,
                _number(row.metrics.get(name)),
                *row.intervals.get(name, (None, None)),
            ]
            for row in rows
            for name in shown
        ],
    )
    datasets, systems = _names(rows)
    width = max(5.0, 1.2 + 0.42 * len(shown) * (len(systems) + 1))
    figure = new_figure(width * len(datasets), 4.0)
    for number, dataset in enumerate(datasets):
        axes = figure.add_subplot(1, len(datasets), number + 1)
        bar = 0.8 / len(systems)
        for position, system in enumerate(systems):
            row = next(
                (row for row in rows if row.dataset == dataset and row.system == system), None
            )
            if row is None:
                continue
            for group, name in enumerate(shown):
                value = _number(row.metrics.get(name))
                if value is None:
                    continue
                x = group + (position - (len(systems) - 1) / 2) * bar
                axes.bar(x, value, bar * 0.92, color=COLOURS[position % len(COLOURS)])
                top = value
                if bounds := row.intervals.get(name):
                    low, top = bounds
                    # A percentile interval of few clusters need not hold the mean.
                    axes.errorbar(
                        x,
                        value,
                        [[max(0.0, value - low)], [max(0.0, top - value)]],
                        color=INK,
                        capsize=2.5,
                        linewidth=1,
                    )
                axes.annotate(
                    f"{value:.2f}",
                    (x, top),
                    (0, 2),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                )
        axes.set_xticks(range(len(shown)), [print_name(name) for name in shown])
        axes.set_ylim(0, 1.08)
        axes.set_title(dataset)
        tidy(axes, grid="y")
    _legend(figure, systems)
    return _save(figure, path)


def plot_recall(rows: Sequence[Row], path_png: str | os.PathLike[str]) -> Path:
    """:func:`plot_metrics` for recall@1, recall@5 and the worst recall@5 among a question's
    rewrites.
    """
    return plot_metrics(rows, path_png, ("recall_at_1", "recall_at_5", "worst_recall_at_5"))


def plot_variance(rows: Sequence[Row], path_png: str | os.PathLike[str], k: int = 5) -> Path:
    """Draw the project's subject: how much the hits change with the wording, per system; lower is
    better.

    Left: 1 - overlap@k between the hits of a question and those of its rewrites. Right: the
    overlap@k between *different* questions, because a collapsed encoder would reach 0 on the left
    by giving everybody the same hits. A system is good where both are low. The CSV beside the
    picture holds one line per dataset and system.

    Raises:
        ValueError: no row has ``overlap_at_<k>``.
    """
    within, between = f"overlap_at_{k}", f"overlap_between_questions_at_{k}"
    usable = [row for row in rows if _number(row.metrics.get(within)) is not None]
    if not usable:
        raise ValueError(f"no row has {within}")
    labelled = [
        (
            row,
            row.system
            if len({r.dataset for r in usable}) == 1
            else f"{row.system} ({row.dataset})",
        )
        for row in usable
    ]
    changed = [1 - (_number(row.metrics[within]) or 0.0) for row in usable]
    shared = [_number(row.metrics.get(between)) for row in usable]
    lines = [
        [row.dataset, row.system, *values]
        for row, *values in zip(usable, changed, shared, strict=True)
    ]
    path = Path(path_png)
    write_csv(
        path.with_suffix(".csv"), ["dataset", "system", f"one_minus_{within}", between], lines
    )

    panels: list[tuple[Sequence[float | None], str]] = [
        (changed, f"1 \N{MINUS SIGN} overlap@{k} between rewrites")
    ]
    if any(value is not None for value in shared):
        panels.append((shared, f"overlap@{k} between different questions"))
    figure = new_figure(4.8 * len(panels) + 1.2, 1.5 + 0.42 * len(usable))
    _, systems = _names(usable)
    for number, (values, title) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        bars = [
            Bar(label if number == 0 else "", value, None, systems.index(row.system))
            for (row, label), value in zip(labelled, values, strict=True)
        ]
        draw_bars(axes, bars)
        axes.set_title(title)
        axes.set_xlabel("lower is better")
        tidy(axes, grid="x")
    return _save(figure, path)


def _legend(figure: Figure, systems: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(color=COLOURS[number % len(COLOURS)], label=name)
        for number, name in enumerate(systems)
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(len(systems), 4),
        frameon=False,
        fontsize=9,
    )


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


def _names(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Datasets and systems in order of appearance."""
    return list(dict.fromkeys(row.dataset for row in rows)), list(
        dict.fromkeys(row.system for row in rows)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _number(value: Any) -> float | None:
    return float(value) if _is_number(value) and math.isfinite(value) else None


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean over about ``width`` values around each; fewer at the ends, so that the curve does not
    lag.
    """
    windows = [values[max(0, i - width // 2) : i + width // 2 + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
