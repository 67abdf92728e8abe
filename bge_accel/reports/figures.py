"""Figures of a report, each drawn twice from one description: SVG for a page, and PNG with matplotlib."""

import math
from collections.abc import Sequence
from html import escape as escape_html
from typing import Any, NamedTuple

from bge_accel.files.text import printable

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 30, 42
MAX_POINTS = 600  # of a line; more would not be seen
MARKED_POINTS = 60  # a line of no more points shows each
COLORS = ("#2563c9", "#d2691e", "#23875c", "#a03fb3", "#c23b3b", "#6b7280")  # a page has its own for dark screens


def escape(text: str) -> str:
    """A text as HTML shows it, control characters written out."""
    return escape_html(printable(text))


class Line(NamedTuple):
    """One line of a chart."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


class LineChart(NamedTuple):
    """Lines over a common axis."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    log_x: bool = False


class Histogram(NamedTuple):
    """Distributions over common bins, each as shares of its own sum."""

    title: str
    x_label: str
    edges: Sequence[float]
    """(bins + 1,)"""
    counts: Sequence[tuple[str, Sequence[float]]]
    """(label, (bins,))"""


class Intervals(NamedTuple):
    """Values with their confidence intervals, one a row."""

    title: str
    x_label: str
    rows: Sequence[tuple[str, float, float, float]]
    """(label, value, low, high)"""


Figure = LineChart | Histogram | Intervals


def legend(figure: Figure) -> list[str]:
    """Labels in the order of the colours; none where there is one line alone."""
    if isinstance(figure, Intervals):
        return []
    labels = [line.label for line in figure.lines] if isinstance(figure, LineChart) else [of[0] for of in figure.counts]
    return labels if len(labels) > 1 else []


def svg(figure: Figure) -> str:
    """An `<svg>` element, coloured by the page's classes `c0`, `c1`, ...; axes carry their units."""
    if isinstance(figure, Intervals):
        return _svg_intervals(figure)
    return _svg_lines(figure) if isinstance(figure, LineChart) else _svg_histogram(figure)


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers, at most `most`, that span from below `low` to above `high`."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / (most - 2)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Ticks as people read them, all with the same number of decimals."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    decimals = max(0, -math.floor(math.log10(abs(step)) + 1e-9))
    if round(step, decimals) != round(step, decimals + 1):  # steps of 2.5
        decimals += 1
    return [f"{tick + 0.0:,.{decimals}f}" for tick in ticks]


def _exponent(values: Sequence[float]) -> int:
    """Power of ten to take out of an axis of very small or large numbers; 0 where they read well."""
    largest = max((abs(value) for value in values), default=0)
    power = math.floor(math.log10(largest)) if largest > 0 else 0
    return power if power < -2 or power > 5 else 0


def _with_unit(label: str, exponent: int) -> str:
    digits = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{label} (× 10{digits})" if exponent else label


class _Axes:
    """Places in a drawing of numbers on two axes."""

    def __init__(self, x: tuple[float, float], y_ticks: Sequence[float], *, log_x: bool = False) -> None:
        self.log_x, self.x, self.y_ticks = log_x, x, y_ticks

    def across(self, value: float) -> float:
        low, high = self.x
        if self.log_x:
            low, high, value = math.log(low), math.log(high), math.log(value)
        share = (value - low) / (high - low) if high > low else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def up(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def frame(self, x_ticks: Sequence[float], x_texts: Sequence[str], x_label: str, y_label: str) -> list[str]:
        parts = [f'<text class="unit" x="0" y="14">{escape(y_label)}</text>']
        for tick, text in zip(self.y_ticks, tick_labels(self.y_ticks), strict=True):
            y = self.up(tick)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
        base = HEIGHT - BOTTOM
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
        for tick, text in zip(x_ticks, x_texts, strict=True):
            x = self.across(tick)
            parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}"/>')
            parts.append(f'<text class="tick" x="{x:.1f}" y="{base + 18}" text-anchor="middle">{text}</text>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text class="unit" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
        return parts


def _drawing(title: str, parts: Sequence[str], height: int = HEIGHT) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">' + "".join(parts) + "</svg>"


def thinned(line: Line) -> Line:
    """At most `MAX_POINTS` points, each the mean of its neighbours."""
    size = -(-len(line.x) // MAX_POINTS)
    if size <= 1:
        return line
    starts = range(0, len(line.x), size)
    x, y = ([sum(of[i : i + size]) / len(of[i : i + size]) for i in starts] for of in (line.x, line.y))
    return Line(line.label, x, y)


def _svg_lines(figure: LineChart) -> str:
    lines = [thinned(line) for line in figure.lines]
    xs = [value for line in lines for value in line.x]
    exponent = _exponent([value for line in lines for value in line.y])
    scaled = [[value / 10.0**exponent for value in line.y] for line in lines]
    ys = [value for of in scaled for value in of]
    axes = _Axes((min(xs), max(xs)), nice_ticks(min(ys), max(ys)), log_x=figure.log_x)
    if figure.log_x:
        x_ticks = sorted(set(xs))
    else:
        x_ticks = [tick for tick in nice_ticks(min(xs), max(xs), 8) if min(xs) <= tick <= max(xs)]
    parts = axes.frame(x_ticks, tick_labels(x_ticks), figure.x_label, _with_unit(figure.y_label, exponent))
    for number, (line, values) in enumerate(zip(lines, scaled, strict=True)):
        color = f"c{number % len(COLORS)}"
        points = [(axes.across(x), axes.up(y)) for x, y in zip(line.x, values, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline class="line {color}" points="{path}"/>')
        if len(points) <= MARKED_POINTS:
            for (x, y), step, value in zip(points, line.x, line.y, strict=True):
                said = escape(f"{line.label}: {value:.4g} at {figure.x_label} {step:g}")
                parts.append(
                    f'<circle class="dot {color}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{said}</title></circle>'
                )
    return _drawing(figure.title, parts)


def _shares(counts: Sequence[float]) -> list[float]:
    total = sum(counts) or 1
    return [100 * count / total for count in counts]


def _svg_histogram(figure: Histogram) -> str:
    edges = figure.edges
    shares = [_shares(counts) for _, counts in figure.counts]
    axes = _Axes((edges[0], edges[-1]), nice_ticks(0, max(map(max, shares), default=1) or 1))
    x_ticks = [tick for tick in nice_ticks(edges[0], edges[-1], 8) if edges[0] <= tick <= edges[-1]]
    parts = axes.frame(x_ticks, tick_labels(x_ticks), figure.x_label, "% of each group")
    for number, ((label, counts), of) in enumerate(zip(figure.counts, shares, strict=True)):
        corners = [(axes.across(edges[0]), axes.up(0))]
        for low, high, share in zip(edges[:-1], edges[1:], of, strict=True):
            corners += [(axes.across(low), axes.up(share)), (axes.across(high), axes.up(share))]
        corners.append((axes.across(edges[-1]), axes.up(0)))
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
        said = escape(f"{label} ({sum(counts):,})")
        parts.append(f'<polygon class="area c{number % len(COLORS)}" points="{path}"><title>{said}</title></polygon>')
    return _drawing(figure.title, parts)


def _svg_intervals(figure: Intervals) -> str:
    row_height, left = max(26.0, (HEIGHT - TOP - BOTTOM) / max(len(figure.rows), 1)), 150
    height = TOP + round(row_height * len(figure.rows)) + BOTTOM
    ends = [0.0, *(end for _, _, low, high in figure.rows for end in (low, high))]
    ticks = nice_ticks(min(ends), max(ends), 8)
    parts = []

    def across(value: float) -> float:
        return left + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (WIDTH - left - RIGHT)

    base = height - BOTTOM
    for tick, text in zip(ticks, tick_labels(ticks), strict=True):
        kind = "axis" if abs(tick) < 1e-12 else "grid"
        parts.append(
            f'<line class="{kind}" x1="{across(tick):.1f}" x2="{across(tick):.1f}" y1="{TOP - 8}" y2="{base}"/>'
        )
        parts.append(f'<text class="tick" x="{across(tick):.1f}" y="{base + 18}" text-anchor="middle">{text}</text>')
    for number, (label, value, low, high) in enumerate(figure.rows):
        y = TOP + row_height * (number + 0.5) - 4
        color = "c2" if low > 0 else "c4" if high < 0 else "c5"
        said = escape(f"{label}: {value:+.4f} ({low:+.4f} to {high:+.4f})")
        parts.append(f'<text class="row" x="{left - 14}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>')
        parts.append(
            f'<line class="bar {color}" x1="{across(low):.1f}" x2="{across(high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<circle class="dot {color}" cx="{across(value):.1f}" cy="{y:.1f}" r="4.5"><title>{said}</title></circle>'
        )
    middle = (left + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="unit" x="{middle}" y="{height - 6}" text-anchor="middle">{escape(figure.x_label)}</text>'
    )
    return _drawing(figure.title, parts, height)


def save_png(figure: Figure, path: str) -> None:
    """Writes a PNG; matplotlib has to be installed."""
    from matplotlib.figure import Figure as Canvas

    height = 4.0 if not isinstance(figure, Intervals) else 1.4 + 0.3 * len(figure.rows)
    canvas = Canvas(figsize=(7, height), layout="constrained")
    axes: Any = canvas.subplots()
    axes.set_title(figure.title, loc="left")
    axes.set_xlabel(figure.x_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x" if isinstance(figure, Intervals) else "y", alpha=0.3)
    if isinstance(figure, LineChart):
        for number, line in enumerate(figure.lines):
            mark = "o" if len(line.x) <= MARKED_POINTS else ""
            color = COLORS[number % len(COLORS)]
            axes.plot(line.x, line.y, label=line.label, color=color, marker=mark, markersize=4)
        axes.set_ylabel(figure.y_label)
        if figure.log_x:
            ticks = sorted({value for line in figure.lines for value in line.x})
            axes.set_xscale("log")
            axes.set_xticks(ticks, tick_labels(ticks))
            axes.minorticks_off()
    elif isinstance(figure, Histogram):
        for number, (label, counts) in enumerate(figure.counts):
            axes.stairs(_shares(counts), figure.edges, label=label, color=COLORS[number], fill=True, alpha=0.5)
        axes.set_ylabel("% of each group")
    else:
        for number, (_, value, low, high) in enumerate(figure.rows):
            color = COLORS[2 if low > 0 else 4 if high < 0 else 5]
            axes.plot([low, high], [number, number], color=color, linewidth=2)
            axes.plot([value], [number], "o", color=color)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(figure.rows)), [row[0] for row in figure.rows])
        axes.invert_yaxis()
    if legend(figure):
        axes.legend(frameon=False)
    canvas.savefig(path, format="png", dpi=120)
