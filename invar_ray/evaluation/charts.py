"""Drawing with matplotlib: figures, bars, and the charts of a report's page as SVG text.

matplotlib is imported when something is drawn, with a canvas of its own: no display, no global
backend.

Charts of the page (``*_chart``) take their colours, for light and dark, and their font from its
style sheet: each colour below stands there as a variable.  They refer to nothing, not even to a
part of themselves.  Their sizes are in pixels.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette and two more: told apart by colour-blind readers.
COLOURS = (
    *("#0072b2", "#e69f00", "#009e73", "#555555", "#d55e00"),
    *("#56b4e9", "#cc79a7", "#8a6d00", "#7b4fb5", "#8c8c8c"),
)
INK, SOFT, RULE, GUIDE = "#1b1f24", "#5d6670", "#d9dee3", "#9aa3ab"
_VARIABLES = {colour: f"c{series}" for series, colour in enumerate(COLOURS)}
_VARIABLES |= {INK: "ink", SOFT: "soft", RULE: "rule", GUIDE: "guide"}


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of :func:`draw_bars`.

    Attributes:
        value: 0 or more; ``None`` where it was not measured.
        bounds: low and high of its interval, if any.
        series: number of its colour.
    """

    label: str
    value: float | None
    bounds: tuple[float, float] | None
    series: int


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)  # bound to this figure; pyplot and its global backend stay out of it
    return figure


def tidy(axes: Axes, *, grid: str) -> None:
    """Two spines, small labels, and lines across ``grid``, ``x`` or ``y``."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y" if grid == "y" else "x", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.title.set_fontsize(11)
    axes.tick_params(labelsize=9)


def draw_bars(axes: Axes, bars: Sequence[Bar]) -> None:
    """Horizontal bars with their values and intervals, from top to bottom."""
    ends = [max(bar.value or 0.0, *(bar.bounds or (0.0,))) for bar in bars]
    for place, (bar, end) in enumerate(zip(bars, ends, strict=True)):
        axes.barh(place, bar.value or 0.0, 0.7, color=COLOURS[bar.series % len(COLOURS)])
        if bar.bounds is not None:
            axes.plot(bar.bounds, [place, place], color=INK, linewidth=1.6, solid_capstyle="butt")
        text = "not measured" if bar.value is None else f"{bar.value:.3f}"
        axes.annotate(text, (end, place), (6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlim(0, 1.14 * (max(ends, default=0.0) or 1.0))


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

    with _page_style():
        figure, axes = _panel(680, 320)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.set_ylim(0, 1)
        axes.grid(axis="y", color=RULE, linewidth=1)
        if diagonal:
            axes.set_xlim(0, 1)
            axes.plot([0, 1], [0, 1], color=GUIDE, linestyle=(0, (4, 4)), linewidth=1)
        else:
            xs = [x for points in series.values() for x, _ in points]
            first = min(xs, default=0.0)
            last = max([*xs, first + 1])
            ticks = MaxNLocator(10, integer=True).tick_values(first, last)
            axes.set_xticks(
                [first, *(x for x in ticks if 0.04 < (x - first) / (last - first) <= 1)]
            )
            axes.set_xlim(first, last)
        for name, points in series.items():
            colour = COLOURS[colours[name]]
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=2.2, gid=_titled(name))
            for x, y in points if dots else ():
                # A line of no length with round ends; a marker would be a reference.
                title = _titled(f"{name}: {x:.3g}, {y:.3f}")
                axes.plot(
                    [x, x], [y, y], color=colour, linewidth=8, solid_capstyle="round", gid=title
                )
        return _svg(figure, f"{y_label} over {x_label}")


def bar_chart(bars: Sequence[Bar], *, label: str) -> str:
    """:func:`draw_bars` for the page; ``label`` says what the numbers are."""
    with _page_style():
        figure, axes = _panel(680, 26 * len(bars) + 40)
        draw_bars(axes, bars)
        axes.axvline(0, color=SOFT, linewidth=1)
        axes.set_xticks([])
        axes.set_xlabel(label, loc="left")
        return _svg(figure, label)


def column_chart(
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    colours: Mapping[str, int],
    *,
    label: str,
) -> str:
    """Groups of upright bars, one a series, with their values where the pointer rests.

    Args:
        groups: names below the axis.
        series: name -> a value for each group, 0 or more.
        colours: name -> number of its colour.
        label: what the numbers are.
    """
    width = 0.8 / max(1, len(series))
    with _page_style():
        figure, axes = _panel(680, 300)
        axes.grid(axis="y", color=RULE, linewidth=1)
        for number, (name, values) in enumerate(series.items()):
            for place, value in enumerate(values):
                left, title = (
                    place - 0.4 + number * width,
                    _titled(f"{name}, {groups[place]}: {value:.3f}"),
                )
                axes.bar(
                    left, value, 0.92 * width, align="edge", color=COLOURS[colours[name]], gid=title
                )
        axes.set_xlim(-0.5, len(groups) - 0.5)
        axes.set_ylim(
            0, max((value for values in series.values() for value in values), default=0) or 1
        )
        axes.set_xticks(range(len(groups)), [_two_lines(name) for name in groups])
        return _svg(figure, label)


@contextlib.contextmanager
def _page_style() -> Iterator[None]:
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "text.parse_math": False, "font.size": 12}):
        yield


def _panel(width: float, height: float) -> tuple[Figure, Axes]:
    figure = new_figure(width / 72, height / 72)
    axes = figure.add_subplot()
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    axes.spines[:].set_visible(False)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=8)
    return figure, axes


def _titled(text: str) -> str:
    """The id of what is to have ``text`` as its title."""
    return f"title-{text.encode().hex()}"


def _svg(figure: Figure, label: str) -> str:
    """An ``<svg>`` element for the page; ``label`` is for those who do not see it."""
    stream = io.StringIO()
    figure.savefig(
        stream, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    text = stream.getvalue().partition("<svg")[2].partition(">")[2]
    # Definitions: paths to clip at, and a style that would hold for the whole page.
    text = re.sub(r"<defs>.*?</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r' clip-path="[^"]*"|; font-family: [^;"]*', "", text)
    text = re.sub(
        r'<g id="title-(\w*)">',
        lambda found: f"<g><title>{escape(bytes.fromhex(found[1]).decode())}</title>",
        text,
    )
    text = re.sub(r'(?<=<g) id="[^"]*"', "", text)
    for colour, name in _VARIABLES.items():
        text = text.replace(f": {colour}", f": var(--{name})")
    width, height = (72 * size for size in figure.get_size_inches())
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}">{text}'


def _two_lines(text: str) -> str:
    words = text.split()
    half = len(words) // 2 if len(text) > 8 and len(words) > 1 else len(words)
    return "\n".join(" ".join(part) for part in (words[:half], words[half:]) if part)
