"""Small charts as SVG text, for the report's page: no library, no script, colours from the page's style sheet.

Series ``n`` is drawn in the class ``s<n>`` (``page.py`` gives ten colours, for light and dark).  All text is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_CHARACTER = 6.6  # width of an average character at the charts' size, in pixels


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
        dots: mark the points.
    """
    width, height, left, top, right, bottom = 680, 320, 52, 14, 16, 44
    xs = [x for points in series.values() for x, _ in points]
    first, last = (0.0, 1.0) if diagonal else (min(xs, default=0.0), max(xs, default=1.0))
    span = (last - first) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (x - first) / span * (width - left - right), height - bottom - y * (height - top - bottom)

    parts = [_open(width, height, f"{y_label} over {x_label}")]
    for tick in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        _, y = place(first, tick)
        parts.append(f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{width - right}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.1f}</text>')
    for x in [0.0, 0.2, 0.4, 0.6, 0.8, 1.0] if diagonal else _ticks(int(first), int(last)):
        at, _ = place(x, 0)
        text = f"{x:.1f}" if diagonal else f"{x:.0f}"
        parts.append(f'<text x="{at:.1f}" y="{height - bottom + 18}" text-anchor="middle">{text}</text>')
    if diagonal:
        (x1, y1), (x2, y2) = place(0, 0), place(1, 1)
        parts.append(f'<line class="guide" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')
    for name, points in series.items():
        at_points = [place(x, y) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at_points)
        parts.append(
            f'<polyline class="line s{colours[name]}" points="{path}"><title>{escape(name)}</title></polyline>'
        )
        if dots:
            for (x, y), (a, b) in zip(at_points, points, strict=True):
                title = escape(f"{name}: {a:.3g}, {b:.3f}")
                parts.append(
                    f'<circle class="dot s{colours[name]}" cx="{x:.1f}" cy="{y:.1f}" r="4">'
                    f"<title>{title}</title></circle>"
                )
    middle = (left + width - right) / 2
    parts.append(f'<text x="{middle:.0f}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>')
    at = (top + height - bottom) / 2
    parts.append(
        f'<text transform="translate(13 {at:.0f}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text></svg>'
    )
    return "".join(parts)


def bar_chart(bars: Sequence[Bar], *, label: str, largest: float | None = None) -> str:
    """Horizontal bars with their values and intervals, one below the other.

    Args:
        bars: from top to bottom.
        label: what the numbers are.
        largest: where the axis ends; ``None`` fits the bars.
    """
    names = max((len(bar.label) for bar in bars), default=1)
    left, row = int(names * _CHARACTER) + 16, 26
    width, height = 680, row * len(bars) + 34
    top = (
        largest
        or max((max(bar.value, bar.bounds[1] if bar.bounds else 0.0) for bar in bars), default=1.0) * 1.02
        or 1.0
    )
    scale = (width - left - 62) / top
    parts = [_open(width, height, label)]
    for number, bar in enumerate(bars):
        y = number * row + 4
        end = left + bar.value * scale
        parts.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(bar.label)}</text>')
        parts.append(
            f'<rect class="bar s{bar.series}" x="{left}" y="{y}" width="{bar.value * scale:.1f}" height="18"/>'
        )
        if bar.bounds is not None:
            low, high = (left + bound * scale for bound in bar.bounds)
            end = max(end, high)
            parts.append(f'<path class="whisker" d="M{low:.1f} {y + 9}H{high:.1f}"/>')
        parts.append(f'<text x="{end + 6:.1f}" y="{y + 13}">{bar.value:.3f}</text>')
    parts.append(f'<line class="axis" x1="{left}" y1="0" x2="{left}" y2="{row * len(bars)}"/>')
    parts.append(f'<text x="{left}" y="{height - 8}">{escape(label)}</text></svg>')
    return "".join(parts)


def column_chart(
    groups: Sequence[str], series: Mapping[str, Sequence[float]], colours: Mapping[str, int], *, label: str
) -> str:
    """Groups of upright bars, one a series.

    Args:
        groups: names below the axis.
        series: name -> a value for each group, 0 or more.
        colours: name -> number of its colour.
        label: what the numbers are.
    """
    width, height, left, top, bottom = 680, 300, 52, 14, 56
    largest = max((value for values in series.values() for value in values), default=0.0) or 1.0
    group = (width - left - 8) / max(1, len(groups))
    bar = group * 0.8 / max(1, len(series))
    parts = [_open(width, height, label)]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = height - bottom - share * (height - top - bottom)
        parts.append(f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{width}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{share * largest:.2f}</text>')
    for place, name in enumerate(groups):
        for number, (series_name, values) in enumerate(series.items()):
            tall = values[place] / largest * (height - top - bottom)
            x = left + place * group + group * 0.1 + number * bar
            title = escape(f"{series_name}, {name}: {values[place]:.3f}")
            parts.append(
                f'<rect class="bar s{colours[series_name]}" x="{x:.1f}" y="{height - bottom - tall:.1f}" '
                f'width="{bar * 0.92:.1f}" height="{tall:.1f}"><title>{title}</title></rect>'
            )
        middle = left + (place + 0.5) * group
        for line, text in enumerate(_two_lines(name)):
            y = height - bottom + 18 + 15 * line
            parts.append(f'<text x="{middle:.1f}" y="{y}" text-anchor="middle">{escape(text)}</text>')
    parts.append("</svg>")
    return "".join(parts)


def _open(width: int, height: int, title: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'


def _ticks(first: int, last: int) -> list[int]:
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000, 10**9) if (last - first) / step <= 12)
    return sorted({first, *(k for k in range(0, last + 1, step) if k > first), last} - _crowded(first, last, step))


def _crowded(first: int, last: int, step: int) -> set[int]:
    """A tick that would touch the first or the last one."""
    return {k for k in range(0, last + 1, step) if k not in (first, last) and min(k - first, last - k) < step * 0.4}


def _two_lines(text: str) -> list[str]:
    words = text.split()
    half = len(words) // 2 if len(text) > 8 and len(words) > 1 else len(words)
    return [" ".join(part) for part in (words[:half], words[half:]) if part]
