"""Line charts as geometry: metrics in, coordinates and SVG path strings out; the template draws them.

Drawn here rather than by a library: pygal's SVG cannot follow the reader's light or dark theme and loads
its tooltips from a network by default, Plotly's offline script weighs 4.8 MB, Matplotlib is a
core dependency too many. What a report needs is a hundred lines.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import floor, isfinite, log10
from typing import Any

from jgrpo.reporting.text import number, size

Value = float | None
WIDTH, HEIGHT = 480, 200
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 8, 24
MAX_POINTS = 400


@dataclass(frozen=True)
class Line:
    """One curve: y over x, gaps where y is None."""

    label: str
    x: Sequence[int]
    y: Sequence[Value]
    low: Sequence[Value] | None = None
    high: Sequence[Value] | None = None
    """Bounds of a band around the curve."""


@dataclass(frozen=True)
class DrawnLine:
    """A curve in the chart's coordinates; each path is the `d` of an SVG path."""

    label: str
    path: str
    faint_path: str
    """The values before smoothing; "" if the curve is not smoothed."""
    band_path: str
    dots: list[tuple[float, float]]
    last: str


@dataclass(frozen=True)
class Chart:
    """All that the template needs to draw one chart."""

    title: str
    note: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[DrawnLine]
    hover: dict[str, Any] = field(default_factory=dict)
    """x positions, steps and values for the pointer."""


def finite(values: Sequence[Value]) -> list[float]:
    """The values that are numbers."""
    return [value for value in values if value is not None and isfinite(value)]


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten) that span low to high."""
    raw = (high - low) / max(count - 1, 1)
    power = 10.0 ** floor(log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first, last = floor(low / step + 1e-9), -floor(-high / step + 1e-9)
    return [float(f"{k * step:.12g}") for k in range(int(first), int(last) + 1)]


def bounds(lines: Sequence[Line]) -> tuple[float, float] | None:
    """Lowest and highest value of curves and bands, widened if they are equal; None without a number."""
    values = [v for line in lines for part in (line.y, line.low or (), line.high or ()) for v in finite(part)]
    if not values:
        return None
    low, high = min(values), max(values)
    if 0 <= low < 0.5 * high:
        low = 0.0
    if high - low < 1e-9 * max(abs(high), abs(low)) or high == low:
        margin = abs(high) * 0.1
        low, high = (low - margin, high + margin) if margin else (0.0, 1.0)
    return low, high


def decimate(line: Line, limit: int = MAX_POINTS) -> Line:
    """At most `limit` points: means of equal runs of steps; a band keeps its extremes."""
    if len(line.x) <= limit:
        return line
    cuts = [round(i * len(line.x) / limit) for i in range(limit + 1)]
    runs = list(pairwise(cuts))

    def reduce(values: Sequence[Value], how: Any) -> list[Value]:
        parts = [finite(values[a:b]) for a, b in runs]
        return [how(part) if part else None for part in parts]

    return Line(
        line.label,
        [line.x[b - 1] for _, b in runs],
        reduce(line.y, lambda part: sum(part) / len(part)),
        reduce(line.low, min) if line.low is not None else None,
        reduce(line.high, max) if line.high is not None else None,
    )


def smooth(values: Sequence[Value], window: int) -> list[Value]:
    """Exponential moving average over about `window` values, without the bias towards a start at 0."""
    keep = 1 - 2 / (window + 1)
    total = weight = 0.0
    smoothed: list[Value] = []
    for value in values:
        if value is not None and isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        smoothed.append(total / weight if weight and value is not None else None)
    return smoothed


def draw(title: str, note: str, lines: Sequence[Line], unit: str = "", smoothed: bool = True) -> Chart | None:
    """A chart of some curves over training steps; None if they hold no number. unit: "" or "bytes" (from 0)."""
    lines = [decimate(line) for line in lines if finite(line.y)]
    limits = bounds(lines)
    if limits is None:
        return None
    low, high = (0.0, limits[1]) if unit == "bytes" else limits
    y_values = nice_ticks(low, high)
    steps = [step for line in lines for step in line.x]
    frame = Frame(min(steps), max(steps), y_values[0], y_values[-1])
    form = size if unit == "bytes" else number
    return Chart(
        title,
        note,
        [(frame.x(step), f"{step:,}") for step in x_ticks(min(steps), max(steps))],
        [(frame.y(value), form(value)) for value in y_values],
        [frame.line(line, smoothed, form(finite(line.y)[-1])) for line in lines],
        hover_data(lines, frame, form),
    )


def x_ticks(first: int, last: int) -> list[int]:
    """Round steps within first to last; the only step of a one-step run."""
    if first == last:
        return [first]
    return sorted({int(t) for t in nice_ticks(first, last) if first <= t <= last and t == int(t)}) or [first, last]


def hover_data(lines: Sequence[Line], frame: "Frame", form: Any) -> dict[str, Any]:
    """{x: positions, steps, rows: [[text of each line] for each step]} over the union of the lines' steps."""
    steps = sorted({step for line in lines for step in line.x})
    tables = [dict(zip(line.x, line.y, strict=True)) for line in lines]
    rows = [["" if (v := table.get(step)) is None else form(v) for table in tables] for step in steps]
    return {"x": [round(frame.x(step), 1) for step in steps], "steps": steps, "rows": rows}


@dataclass(frozen=True)
class Frame:
    """The map from steps and values to the chart's coordinates."""

    first_step: int
    last_step: int
    low: float
    high: float

    def x(self, step: float) -> float:
        """Horizontal position; the middle for a run of one step."""
        span = self.last_step - self.first_step
        share = (step - self.first_step) / span if span else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Vertical position, downwards as in SVG."""
        return TOP + (self.high - value) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)

    def path(self, x: Sequence[int], y: Sequence[Value]) -> str:
        """A polyline with a gap at every missing value."""
        return " ".join(
            "M" + "L".join(f"{self.x(step):.1f},{self.y(value):.1f}" for step, value in piece) for piece in pieces(x, y)
        )

    def band(self, line: Line) -> str:
        """The area between low and high."""
        if line.low is None or line.high is None:
            return ""
        corners = [
            (s, lo, hi) for s, lo, hi in zip(line.x, line.low, line.high, strict=True) if finite([lo, hi]) == [lo, hi]
        ]
        there = [f"{self.x(s):.1f},{self.y(hi or 0):.1f}" for s, _, hi in corners]
        back = [f"{self.x(s):.1f},{self.y(lo or 0):.1f}" for s, lo, _ in reversed(corners)]
        return f"M{'L'.join(there + back)}Z" if len(corners) > 1 else ""

    def line(self, line: Line, smoothed: bool, last: str) -> DrawnLine:
        """A curve; few points are drawn as dots too, many are smoothed over their faint raw values."""
        few, many = len(line.x) <= 25, smoothed and len(line.x) > 40
        dots = [(self.x(s), self.y(v)) for s, v in zip(line.x, line.y, strict=True) if v is not None] if few else []
        raw = self.path(line.x, line.y)
        curve = self.path(line.x, smooth(line.y, max(5, len(line.x) // 20))) if many else raw
        return DrawnLine(line.label, curve, raw if many else "", self.band(line), dots, last)


def pieces(x: Sequence[int], y: Sequence[Value]) -> Iterator[list[tuple[int, float]]]:
    """Runs of neighbouring points whose value is a number."""
    piece: list[tuple[int, float]] = []
    for step, value in zip(x, y, strict=True):
        if value is not None and isfinite(value):
            piece.append((step, value))
        elif piece:
            yield piece
            piece = []
    if piece:
        yield piece


def column(history: Sequence[Mapping[str, Any]], name: str, label: str | None = None) -> Line:
    """One metric of the history, at the steps that have it."""
    rows = [row for row in history if name in row]
    return Line(label or name, [row["step"] for row in rows], [row[name] for row in rows])
