"""The pictures of a report: PNG files, each with its numbers as CSV beside it, and the charts of its page as SVG text.

matplotlib is imported when a picture is drawn, with a canvas of its own: no display, no global backend.

Charts of the page (``*_chart``) take their colours, for light and dark, and their font from its style sheet: series
``n`` has the colour ``--c<n>``.  They hold no reference, not even to a part of themselves.  Sizes are in pixels.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invar_ray.evaluation.tables import Row, print_name, write_csv

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by colour-blind readers and in grey.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#555555")
# In a chart of the page a colour #0000nn stands for the nn-th of these variables of its style sheet, from 1 on.
_VARIABLES = ("rule", "guide", "soft", "ink", *(f"c{series}" for series in range(10)))
LOSS_NAMES = frozenset({"contrastive", "alignment", "invariance", "risk_variance", "answer"})


def plot_losses(records: Sequence[Mapping[str, Any]], path_png: str | os.PathLike[str]) -> Path:
    """Draw loss curves, one panel per term (the terms differ in scale), over the optimizer step.

    Args:
        records: one mapping per logged step with ``step`` and numbers. A *term* is a key that has the word ``loss`` in
            it or names one (``contrastive``, ``alignment``, ``invariance``, ``risk_variance``, ``answer``).
        path_png: the picture; a CSV with *all* numbers of the records is written beside it.

    Returns:
        The path of the picture.

    Raises:
        ValueError: no record, or no record with a loss term.
    """
    from matplotlib.ticker import MaxNLocator

    keys = list(dict.fromkeys(key for record in records for key, value in record.items() if _is_number(value)))
    terms = [key for key in keys if key in LOSS_NAMES or "loss" in key.lower().split("_")]
    if not terms:
        raise ValueError(f"no loss term among the keys of {len(records)} records: {keys}")
    terms.sort(key=lambda name: name != "loss")  # the sum first, the others as logged
    steps = [record.get("step", number) for number, record in enumerate(records, start=1)]

    columns = [key for key in keys if key != "step"]
    path = Path(path_png)
    lines = [
        [step, *(_number(record.get(key)) for key in columns)] for step, record in zip(steps, records, strict=True)
    ]
    write_csv(path.with_suffix(".csv"), ["step", *columns], lines)

    num_columns = 2 if len(terms) == 4 else min(len(terms), 3)
    num_rows = math.ceil(len(terms) / num_columns)
    figure = _figure(4.2 * num_columns, 2.9 * num_rows)
    for number, term in enumerate(terms):
        axes = figure.add_subplot(num_rows, num_columns, number + 1)
        points = [(s, v) for s, r in zip(steps, records, strict=True) if (v := _number(r.get(term))) is not None]
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
        _tidy(axes, grid="y")
    return _save(figure, path)


def plot_metrics(
    rows: Sequence[Row], path_png: str | os.PathLike[str], metrics: Sequence[str] = ("recall_at_1", "recall_at_5")
) -> Path:
    """Draw bars: a panel per dataset, a group per metric, a bar per system, intervals where a row has them.

    Metrics that no row has are left out. The CSV beside the picture holds one line per dataset, system and metric.

    Raises:
        ValueError: no row has any of ``metrics``.
    """
    shown = [name for name in metrics if any(_number(row.metrics.get(name)) is not None for row in rows)]
    if not shown:
        raise ValueError(f"no row has any of {list(metrics)}")
    path = Path(path_png)
    write_csv(
        path.with_suffix(".csv"),
        ["dataset", "system", "metric", "value", "low", "high"],
        [
            [row.dataset, row.system, name, _number(row.metrics.get(name)), *row.intervals.get(name, (None, None))]
            for row in rows
            for name in shown
        ],
    )
    datasets, systems = _names(rows)
    width = max(5.0, 1.2 + 0.42 * len(shown) * (len(systems) + 1))
    figure = _figure(width * len(datasets), 4.0)
    for number, dataset in enumerate(datasets):
        axes = figure.add_subplot(1, len(datasets), number + 1)
        bar = 0.8 / len(systems)
        for position, system in enumerate(systems):
            row = next((row for row in rows if row.dataset == dataset and row.system == system), None)
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
                        color="black",
                        capsize=2.5,
                        linewidth=1,
                    )
                axes.annotate(f"{value:.2f}", (x, top), (0, 2), textcoords="offset points", ha="center", fontsize=8)
        axes.set_xticks(range(len(shown)), [print_name(name) for name in shown])
        axes.set_ylim(0, 1.08)
        axes.set_title(dataset)
        _tidy(axes, grid="y")
    _legend(figure, systems)
    return _save(figure, path)


def plot_recall(rows: Sequence[Row], path_png: str | os.PathLike[str]) -> Path:
    """:func:`plot_metrics` for recall@1, recall@5 and the worst recall@5 among a question's rewordings."""
    return plot_metrics(rows, path_png, ("recall_at_1", "recall_at_5", "worst_recall_at_5"))


def plot_variance(rows: Sequence[Row], path_png: str | os.PathLike[str], k: int = 5) -> Path:
    """Draw the project's subject: how much the hits change with the wording, per system; lower is better.

    Left: 1 - overlap@k between the hits of a question and those of its rewordings. Right: the overlap@k between
    *different* questions, because a collapsed encoder would reach 0 on the left by giving everybody the same hits.
    A system is good where both are low. The CSV beside the picture holds one line per dataset and system.

    Raises:
        ValueError: no row has ``overlap_at_<k>``.
    """
    within, between = f"overlap_at_{k}", f"overlap_between_questions_at_{k}"
    usable = [row for row in rows if _number(row.metrics.get(within)) is not None]
    if not usable:
        raise ValueError(f"no row has {within}")
    labelled = [
        (row, row.system if len({r.dataset for r in usable}) == 1 else f"{row.system} ({row.dataset})")
        for row in usable
    ]
    changed = [1 - (_number(row.metrics[within]) or 0.0) for row in usable]
    shared = [_number(row.metrics.get(between)) for row in usable]
    lines = [[row.dataset, row.system, *values] for row, *values in zip(usable, changed, shared, strict=True)]
    path = Path(path_png)
    write_csv(path.with_suffix(".csv"), ["dataset", "system", f"one_minus_{within}", between], lines)

    panels: list[tuple[Sequence[float | None], str]] = [(changed, f"1 \N{MINUS SIGN} overlap@{k} between rewordings")]
    if any(value is not None for value in shared):
        panels.append((shared, f"overlap@{k} between different questions"))
    figure = _figure(4.8 * len(panels) + 1.2, 1.5 + 0.42 * len(usable))
    _, systems = _names(usable)
    for number, (values, title) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        for position, (row, value) in enumerate(zip(usable, values, strict=True)):
            colour = COLOURS[systems.index(row.system) % len(COLOURS)]
            axes.barh(position, value or 0.0, 0.7, color=colour)
            text = "not measured" if value is None else f"{value:.3f}"
            axes.annotate(text, (value or 0.0, position), (4, 0), textcoords="offset points", va="center", fontsize=9)
        axes.set_yticks(range(len(usable)), [label for _, label in labelled] if number == 0 else [""] * len(usable))
        axes.invert_yaxis()
        axes.set_xlim(0, max(0.05, 1.25 * max((value for value in values if value is not None), default=0.0)))
        axes.set_title(title)
        axes.set_xlabel("lower is better")
        _tidy(axes, grid="x")
    return _save(figure, path)


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of :func:`bar_chart`.

    Attributes:
        bounds: low and high of its interval, if any.
        series: number of its colour.
    """

    label: str
    value: float
    bounds: tuple[float, float] | None
    series: int


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    colours: Mapping[str, int],
    *,
    x_label: str,
    y_label: str,
    diagonal: bool = False,
    dots: bool = False,
) -> str:
    """Curves over a common x axis; y runs from 0 to 1.

    Args:
        series: name -> (x, y) points by rising x.
        colours: name -> number of its colour.
        x_label, y_label: of the axes.
        diagonal: draw y = x, for calibration (x runs from 0 to 1 then).
        dots: mark the points, with their values where the pointer rests.
    """
    from matplotlib.ticker import MaxNLocator

    with _Chart(680, 320, f"{y_label} over {x_label}") as chart:
        axes = chart.axes
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.set_ylim(0, 1)
        axes.grid(axis="y", color=_colour("rule"), linewidth=1)
        if diagonal:
            axes.set_xlim(0, 1)
            axes.plot([0, 1], [0, 1], color=_colour("guide"), linestyle=(0, (4, 4)), linewidth=1)
        else:
            xs = [x for points in series.values() for x, _ in points]
            first = min(xs, default=0.0)
            last = max(*xs, first + 1)
            ticks = MaxNLocator(10, integer=True).tick_values(first, last)
            axes.set_xticks([first, *(tick for tick in ticks if 0.04 < (tick - first) / (last - first) <= 1)])
            axes.set_xlim(first, last)
        for name, points in series.items():
            colour = _colour(f"c{colours[name]}")
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=2.2, gid=chart.title(name))
            for x, y in points if dots else ():
                # A line of no length with round ends; a marker would be a reference to a part of the picture.
                title = chart.title(f"{name}: {x:.3g}, {y:.3f}")
                axes.plot([x, x], [y, y], color=colour, linewidth=8, solid_capstyle="round", gid=title)
    return chart.text


def bar_chart(bars: Sequence[Bar], *, label: str) -> str:
    """Horizontal bars with their values and intervals, one below the other.

    Args:
        bars: from top to bottom.
        label: what the numbers are.
    """
    ends = [max(bar.value, *(bar.bounds or (0.0,))) for bar in bars]
    largest = max(ends, default=0.0) or 1.0
    with _Chart(680, 26 * len(bars) + 40, label) as chart:
        axes = chart.axes
        for place, (bar, end) in enumerate(zip(bars, ends, strict=True)):
            axes.barh(place, bar.value, 0.7, color=_colour(f"c{bar.series}"))
            if bar.bounds is not None:
                axes.plot(bar.bounds, [place, place], color=_colour("ink"), linewidth=1.6, solid_capstyle="butt")
            axes.annotate(f"{bar.value:.3f}", (end, place), (6, 0), textcoords="offset points", va="center")
        axes.axvline(0, color=_colour("soft"), linewidth=1)
        axes.set_xlim(0, 1.14 * largest)
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_xticks([])
        axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
        axes.set_xlabel(label, loc="left")
    return chart.text


def column_chart(
    groups: Sequence[str], series: Mapping[str, Sequence[float]], colours: Mapping[str, int], *, label: str
) -> str:
    """Groups of upright bars, one a series, with their values where the pointer rests.

    Args:
        groups: names below the axis.
        series: name -> a value for each group, 0 or more.
        colours: name -> number of its colour.
        label: what the numbers are.
    """
    width = 0.8 / max(1, len(series))
    with _Chart(680, 300, label) as chart:
        axes = chart.axes
        axes.grid(axis="y", color=_colour("rule"), linewidth=1)
        for number, (name, values) in enumerate(series.items()):
            for place, value in enumerate(values):
                left = place - 0.4 + number * width
                title = chart.title(f"{name}, {groups[place]}: {value:.3f}")
                axes.bar(left, value, 0.92 * width, align="edge", color=_colour(f"c{colours[name]}"), gid=title)
        axes.set_xlim(-0.5, len(groups) - 0.5)
        axes.set_ylim(0, max((value for values in series.values() for value in values), default=0) or 1)
        axes.set_xticks(range(len(groups)), [_two_lines(name) for name in groups])
    return chart.text


class _Chart:
    """A figure of one panel that becomes ``text``, an ``<svg>`` element of the page, when the block ends.

    Args:
        width, height: in pixels.
        label: what is seen, for those who do not see it.
    """

    def __init__(self, width: float, height: float, label: str) -> None:
        from matplotlib import rc_context

        self.text = ""
        self._titles: list[str] = []
        self._open = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
        self._settings = rc_context({"svg.fonttype": "none", "text.parse_math": False, "font.size": 12})
        self._size = width / 72, height / 72

    def __enter__(self) -> _Chart:
        self._settings.__enter__()
        self._figure = _figure(*self._size)
        self._figure.patch.set_visible(False)
        self.axes = self._figure.add_subplot()
        self.axes.patch.set_visible(False)
        self.axes.spines[:].set_visible(False)
        self.axes.set_axisbelow(True)
        self.axes.tick_params(length=0, pad=8)
        return self

    def title(self, text: str) -> str:
        """The id by which what is drawn next gets ``text`` as its title."""
        self._titles.append(text)
        return f"title-{len(self._titles) - 1}"

    def __exit__(self, *raised: Any) -> None:
        try:
            if raised[0] is None:
                stream = io.StringIO()
                self._figure.savefig(
                    stream, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
                )
                self.text = self._open + self._for_the_page(stream.getvalue().partition("<svg")[2].partition(">")[2])
        finally:
            self._settings.__exit__(*raised)

    def _for_the_page(self, svg: str) -> str:
        svg = re.sub(r"<defs>.*?</defs>", "", svg, flags=re.DOTALL)  # paths to clip at, a style for the whole page
        svg = re.sub(r' clip-path="[^"]*"|; font-family: [^;"]*', "", svg)
        svg = re.sub(
            r'<g id="title-(\d+)">', lambda found: f"<g><title>{escape(self._titles[int(found[1])])}</title>", svg
        )
        svg = re.sub(r'(?<=<g) id="[^"]*"', "", svg)
        return re.sub(r": #0000(\w\w)\b", lambda found: f": var(--{_VARIABLES[int(found[1], 16) - 1]})", svg)


def _colour(variable: str) -> str:
    return f"#{_VARIABLES.index(variable) + 1:06x}"


def _two_lines(text: str) -> str:
    words = text.split()
    half = len(words) // 2 if len(text) > 8 and len(words) > 1 else len(words)
    return "\n".join(" ".join(part) for part in (words[:half], words[half:]) if part)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)  # bound to this figure; pyplot and its global backend stay out of it
    return figure


def _tidy(axes: Axes, *, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y" if grid == "y" else "x", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.title.set_fontsize(11)
    axes.tick_params(labelsize=9)


def _legend(figure: Figure, systems: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=COLOURS[number % len(COLOURS)], label=name) for number, name in enumerate(systems)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(systems), 4), frameon=False, fontsize=9)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


def _names(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Datasets and systems in order of appearance."""
    return list(dict.fromkeys(row.dataset for row in rows)), list(dict.fromkeys(row.system for row in rows))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _number(value: Any) -> float | None:
    return float(value) if _is_number(value) and math.isfinite(value) else None


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean over about ``width`` values around each; fewer at the ends, so that the curve does not lag."""
    windows = [values[max(0, i - width // 2) : i + width // 2 + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
