"""Charts as plain values, and as SVG in the page's colours: lines are told apart by dashes, not by colour alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

from text_diffusion.visible import visible

WIDTH, HEIGHT = 440, 260
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 12, 40
# Told apart by those who see colours otherwise too (Okabe and Ito 2008), and by their dashes by everybody.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9")
DASHES = ("", "7 3", "2 3", "10 3 2 3", "4 4", "1 4")
Scale = Callable[[float], float]


def text(given: object) -> str:
    """Any text as HTML that shows it."""
    return escape(visible(str(given)))


@dataclass(frozen=True)
class Series:
    """A line; `points`: with a mark at each point."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    points: bool = False


@dataclass(frozen=True)
class Chart:
    """Lines over a common axis. key: of its file name; note: a sentence under it; unit: "%" shows shares as such."""

    key: str
    title: str
    x_title: str
    y_title: str
    series: list[Series] = field(default_factory=list)
    note: str = ""
    unit: str = ""
    log_x: bool = False
    log_y: bool = False
    ranges: tuple[tuple[float, float] | None, tuple[float, float] | None] = (None, None)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not any(self.points(series) for series in self.series)

    def points(self, series: Series) -> list[tuple[float, float]]:
        """What can be drawn: finite, and above 0 on a logarithmic axis."""
        return [
            (x, y)
            for x, y in zip(series.x, series.y, strict=True)
            if math.isfinite(x) and math.isfinite(y) and (x > 0 or not self.log_x) and (y > 0 or not self.log_y)
        ]


def svg(chart: Chart) -> str:
    """The chart as an <svg> element; style and colours are the page's."""
    drawn = [chart.points(series) for series in chart.series]
    low_x, high_x = _range([x for points in drawn for x, _ in points], chart.ranges[0], chart.log_x)
    ys = [y for points in drawn for _, y in points]
    low_y, high_y = _range(ys, chart.ranges[1], chart.log_y)
    if chart.unit == "%" and max(ys, default=1.0) <= 1:
        high_y = min(high_y, 1.0)
    to_x = _scale(low_x, high_x, LEFT, WIDTH - RIGHT, chart.log_x)
    to_y = _scale(low_y, high_y, HEIGHT - BOTTOM, TOP, chart.log_y)
    label = f"{chart.title}: {', '.join(series.name for series in chart.series)}"
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(label)}">']
    for value in ticks(low_y, high_y, chart.log_y):
        y = to_y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{shown(value, chart.unit)}</text>')
    for value in ticks(low_x, high_x, chart.log_x):
        x = to_x(value)
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 4}"/>'
        )
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{shown(value)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 5}" text-anchor="middle" class="axis">{text(chart.x_title)}</text>')
    for number, (series, points) in enumerate(zip(chart.series, drawn, strict=True)):
        parts.append(_line(series, number, [(to_x(x), to_y(y), x, y) for x, y in points], chart.unit))
    return "".join([*parts, "</svg>"])


def _line(series: Series, number: int, points: list[tuple[float, float, float, float]], unit: str) -> str:
    colour, dash = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y, *_ in points) if points else ""
    name = text(series.name)
    line = f'<path d="{path}" stroke="{colour}" stroke-dasharray="{dash}"><title>{name}</title></path>'
    if not (series.points or len(points) == 1):
        return line
    marks = [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}">'
        f"<title>{name}: {shown(b, unit)} at {shown(a)}</title></circle>"
        for x, y, a, b in points
    ]
    return line + "".join(marks)


def legend(chart: Chart) -> str:
    """The names of the lines, each beside a piece of it, as HTML; of a single line nothing."""
    if len(chart.series) < 2:
        return ""
    items = []
    for number, series in enumerate(chart.series):
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
        piece = f'<svg viewBox="0 0 28 8"><path d="M0 4H28" stroke="{colour}" stroke-dasharray="{dash}"/></svg>'
        items.append(f"<li>{piece}{text(series.name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def scatter(places: Sequence[tuple[str, float, float]], width: int = 900, height: int = 520) -> str:
    """Named points as SVG; names that would lie on others are left out, the first come first, and told on pointing."""
    xs, ys = [x for _, x, _ in places], [y for _, _, y in places]
    to_x = _scale(*_range(xs, None, False), 30, width - 60, False)
    to_y = _scale(*_range(ys, None, False), height - 20, 20, False)
    taken: list[tuple[float, float, float, float]] = []
    parts = [f'<svg class="map" viewBox="0 0 {width} {height}" role="img" aria-label="map of the word embeddings">']
    for name, x, y in places:
        a, b = to_x(x), to_y(y)
        box = (a, b - 8, a + 12 + 7.2 * len(name), b + 8)
        free = not any(box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in taken)
        parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3"><title>{text(name)}</title></circle>')
        if free and len(name) <= 24:
            taken.append(box)
            parts.append(f'<text x="{a + 6:.1f}" y="{b + 4:.1f}">{text(name)}</text>')
    return "".join([*parts, "</svg>"])


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers between two: decades (with 2 and 5 if those are few) or, else, multiples of 1, 2, 5."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        digits = (1, 2, 5) if len(decades) <= 3 else (1,)
        every = -(-len(decades) // 7)
        found = [digit * 10.0**decade for decade in decades if decade % every == 0 for digit in digits]
    else:
        step = _round_up((high - low) / 5)
        found = [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    found = [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9) or (not log and value == 0)]
    return ticks(low, high, False) if log and len(found) < 2 else found


def shown(value: float, unit: str = "") -> str:
    """A number as short as it may be."""
    if unit == "%":
        return f"{100 * value:.4g} %"
    if abs(value) >= 10_000:
        return f"{value / 1000:,.5g}k"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 or not value else f"{value:.0e}".replace("e-0", "e-")


def _round_up(step: float) -> float:
    """The next of ..., 0.1, 0.2, 0.5, 1, 2, 5, 10, ..."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= step * (1 - 1e-9))


def _range(values: list[float], fixed: tuple[float, float] | None, log: bool) -> tuple[float, float]:
    """The ends of an axis, a little apart also where all values are the same."""
    if fixed:
        return fixed
    low, high = min(values, default=1.0), max(values, default=2.0)
    if log:
        return (low / 1.1, high * 1.1) if high < 1.3 * low else (low, high)
    if high - low < 1e-9 * max(abs(high), 1e-6):
        return low - 0.5 * abs(low) - 1e-6, high + 0.5 * abs(high) + 1e-6
    return low, high


def _scale(low: float, high: float, start: float, stop: float, log: bool) -> Scale:
    f: Scale = math.log if log else float
    return lambda value: start + (f(value) - f(low)) / (f(high) - f(low)) * (stop - start)
