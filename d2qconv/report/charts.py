"""Charts as inline SVG, drawn for a phone's width: text keeps its size there and grows with the chart elsewhere.

Colours are classes of the page's style sheet, so that they follow the reader's light or dark scheme.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from d2qconv.report.html import exact, tag, text

#: Units of a chart's width; about the pixels of a phone's column.
WIDTH = 340.0
#: Steps of a heat map's scale.
LEVELS = 8


@dataclass(frozen=True)
class Bar:
    """One bar. shown: its value for a person; tip: said when pointed at; kind: 0 or 1, the colour."""

    name: str
    value: float
    shown: str
    tip: str = ""
    kind: int = 0


def _svg(key: str, height: float, label: str, *content: str) -> str:
    attributes: dict[str, str | float | None] = {
        "id": key,
        "viewBox": f"0 0 {WIDTH:g} {_round(height)}",
        "role": "img",
        "aria-label": label,
    }
    return tag("svg", attributes, *content)


def _round(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _text(x: float, y: float, shown: str, kind: str = "", anchor: str = "start") -> str:
    anchored = None if anchor == "start" else anchor
    return tag(
        "text", {"x": _round(x), "y": _round(y), "class": kind or None, "text-anchor": anchored}, text(shown)
    )


def _rect(
    at: tuple[float, float], extent: tuple[float, float], kind: str, value: float, name: str, tip: str
) -> str:
    attributes: dict[str, str | float | None] = {
        "x": _round(at[0]),
        "y": _round(at[1]),
        "width": _round(max(extent[0], 0.0)),
        "height": _round(max(extent[1], 0.0)),
        "class": kind,
        "data-name": name,
        "data-value": exact(value),
    }
    return tag("rect", attributes, tag("title", {}, text(tip)))


def _line(points: Sequence[tuple[float, float]], kind: str) -> str:
    listed = " ".join(f"{_round(x)},{_round(y)}" for x, y in points)
    return tag("polyline", {"points": listed, "class": kind})


def heat_map(
    key: str,
    label: str,
    columns: Sequence[str],
    rows: Sequence[tuple[str, Mapping[str, tuple[float, str]]]],
    ramp: str,
    n_scaled: int,
) -> str:
    """rows: name, and by column the value, which is positive, and how it is shown. ramp: class of the colours.

    The scale is logarithmic from the least to the largest value of the first `n_scaled` rows; others may lie outside.
    """
    values = [value for _, cells in rows[:n_scaled] for value, _ in cells.values() if value > 0]
    low, high = min(values, default=1.0), max(values, default=1.0)
    left, top, pitch = 44.0, 18.0, 17.0
    step = (WIDTH - left) / max(len(columns), 1)
    parts = [_text(left + (k + 0.5) * step, 11, name, "axis", "middle") for k, name in enumerate(columns)]
    for number, (row, cells) in enumerate(rows):
        y = top + number * pitch
        parts.append(_text(left - 5, y + 11.5, row, "axis", "end"))
        for k, column in enumerate(columns):
            if column not in cells:
                continue
            value, shown = cells[column]
            level = _level(value, low, high)
            at, extent = (left + k * step + 0.75, y + 0.75), (step - 1.5, pitch - 1.5)
            tip = f"{row} {column}: {shown}"
            parts.append(_rect(at, extent, f"{ramp} l{level}", value, f"{row} {column}", tip))
            parts.append(_text(left + (k + 0.5) * step, y + 11.5, shown, f"cell c{level}", "middle"))
    return _svg(key, top + len(rows) * pitch + 2, label, *parts)


def _level(value: float, low: float, high: float) -> int:
    if value <= low:
        return 0
    if value >= high:
        return LEVELS - 1
    return min(int((math.log(value) - math.log(low)) / (math.log(high) - math.log(low)) * LEVELS), LEVELS - 1)


def bars(key: str, label: str, listed: Sequence[Bar]) -> str:
    """Horizontal bars from a common zero, which values below it cross to the left."""
    left, right, pitch = 92.0, 62.0, 18.0
    low = min(0.0, *(b.value for b in listed)) if listed else 0.0
    high = max(0.0, *(b.value for b in listed)) if listed else 1.0
    scale = (WIDTH - left - right) / max(high - low, 1e-30)
    zero = left - low * scale
    parts = []
    for number, bar in enumerate(listed):
        y = number * pitch
        reach = abs(bar.value) * scale
        at = (zero if bar.value >= 0 else zero - reach, y + 3)
        kind = f"bar b{bar.kind}" + (" below" if bar.value < 0 else "")
        tip = bar.tip or f"{bar.name}: {bar.shown}"
        parts.append(_rect(at, (max(reach, 0.75), pitch - 6), kind, bar.value, bar.name, tip))
        parts.append(_text(left - 6, y + 12.5, bar.name, "axis", "end"))
        parts.append(_text(zero + max(bar.value, 0.0) * scale + 5, y + 12.5, bar.shown, "value"))
    height = len(listed) * pitch + 2
    parts.append(_line([(zero, 0), (zero, height - 2)], "base"))
    return _svg(key, height, label, *parts)


def histogram(
    key: str, label: str, edges: Sequence[float], counts: Sequence[int], marks: Mapping[str, float]
) -> str:
    """Columns over a logarithmic axis, whole decades around those that are not empty. marks: vertical lines by name."""
    left, top, height = 14.0, 38.0, 130.0
    seen = [k for k, count in enumerate(counts) if count] or [0]
    first = max(math.floor(math.log10(edges[seen[0]]) + 1e-9), math.log10(edges[0]))
    last = min(math.ceil(math.log10(edges[seen[-1] + 1]) - 1e-9), math.log10(edges[-1]))
    scale = (WIDTH - 2 * left) / max(last - first, 1e-9)
    most = max(counts, default=0) or 1

    def place(value: float) -> float:
        return left + (min(max(math.log10(max(value, edges[0])), first), last) - first) * scale

    parts = []
    for k, count in enumerate(counts):
        if not seen[0] <= k <= seen[-1]:
            continue
        x, end, reach = place(edges[k]), place(edges[k + 1]), count / most * height
        tip = f"{edges[k]:.2g} to {edges[k + 1]:.2g} nats: {count:,} tokens"
        at = (x + 0.5, top + height - reach)
        parts.append(_rect(at, (end - x - 1, reach), "bar b0", count, f"bin {k}", tip))
    floor = top + height
    parts.append(_line([(left, floor), (WIDTH - left, floor)], "base"))
    for power in range(math.ceil(first), math.floor(last) + 1):
        parts.append(_text(place(10.0**power), floor + 14, f"1e{power}" if power else "1", "axis", "middle"))
    for number, (name, value) in enumerate(sorted(marks.items(), key=lambda mark: mark[1])):
        x, y = place(value), 9.0 + 11 * number
        parts.append(_line([(x, y + 3), (x, floor)], "mark"))
        is_right = x > WIDTH * 0.86
        parts.append(_text(x - 3 if is_right else x + 3, y + 2, name, "axis", "end" if is_right else "start"))
    return _svg(key, floor + 20, label, *parts)


@dataclass(frozen=True)
class Point:
    """A point of a curve or a cloud."""

    name: str
    x: float
    y: float
    tip: str


def curve(key: str, label: str, points: Sequence[Point], below: str) -> str:
    """Values along whole numbers from 0, some of which may be missing. below: what the x axis counts."""
    left, top, height, right = 40.0, 10.0, 150.0, 8.0
    most = max((p.y for p in points), default=0.0)
    most = most if most > 1e-12 else 1.0
    ticks = _ticks(most)
    scale_x = (WIDTH - left - right) / max(1.0, *(p.x for p in points), 1.0)

    def place(p: Point) -> tuple[float, float]:
        return left + p.x * scale_x, top + height * (1 - p.y / ticks[-1])

    parts = []
    for tick in ticks:
        y = top + height * (1 - tick / ticks[-1])
        parts.append(_line([(left, y), (WIDTH - right, y)], "grid"))
        parts.append(_text(left - 5, y + 3.5, f"{tick:g}", "axis", "end"))
    parts.append(_line([place(p) for p in points], "curve"))
    for p in points:
        x, y = place(p)
        parts.append(_dot(p, x, y, "dot"))
    every = max(math.ceil(len(points) / 9), 1)
    floor = top + height + 14
    parts += [_text(place(p)[0], floor, p.name, "axis", "middle") for p in points[::every]]
    parts.append(_text(WIDTH - right, floor + 13, below, "axis", "end"))
    return _svg(key, floor + 18, label, *parts)


def _dot(p: Point, x: float, y: float, kind: str) -> str:
    attributes: dict[str, str | float | None] = {
        "cx": _round(x),
        "cy": _round(y),
        "r": 3,
        "class": kind,
        "data-name": p.name,
        "data-x": exact(p.x),
        "data-value": exact(p.y),
    }
    return tag("circle", attributes, tag("title", {}, text(p.tip)))


def _ticks(most: float) -> list[float]:
    """From 0 to the first round number that is not below."""
    power = 10 ** math.floor(math.log10(most))
    step = next(s * power / 10 for s in (1, 2, 5, 10, 20, 50) if s * power / 10 * 5 >= most)
    return [k * step for k in range(math.ceil(most / step) + 1)]


def cloud(
    key: str, label: str, points: Sequence[Point], front: Sequence[Point], axes: tuple[str, str]
) -> str:
    """Points on two logarithmic axes of positive numbers. front: joined, whether among them or not. axes: names."""
    left, top, height, right = 46.0, 22.0, 190.0, 14.0
    every = [*points, *front]
    xs, ys = [math.log10(p.x) for p in every], [math.log10(p.y) for p in every]
    (x0, x1), (y0, y1) = _widened(xs), _widened(ys)

    def place(p: Point) -> tuple[float, float]:
        x = left + (math.log10(p.x) - x0) / (x1 - x0) * (WIDTH - left - right)
        return x, top + height * (1 - (math.log10(p.y) - y0) / (y1 - y0))

    floor = top + height
    parts = [
        _line([(left, top), (left, floor), (WIDTH - right, floor)], "base"),
        _text(4, 11, axes[1], "axis"),
        _text(WIDTH - right, floor + 27, axes[0], "axis", "end"),
    ]
    for value in _round_numbers(y0, y1):
        y = top + height * (1 - (math.log10(value) - y0) / (y1 - y0))
        parts.append(_line([(left, y), (WIDTH - right, y)], "grid"))
        parts.append(_text(left - 5, y + 3.5, f"{value:g}", "axis", "end"))
    for value in _round_numbers(x0, x1):
        x = left + (math.log10(value) - x0) / (x1 - x0) * (WIDTH - left - right)
        parts.append(_text(x, floor + 14, f"{value:g}", "axis", "middle"))
    parts.append(_line([place(p) for p in front], "curve"))
    names: list[tuple[float, float]] = []
    for p in points:
        x, y = place(p)
        parts.append(_dot(p, x, y, "dot"))
        is_right = x > WIDTH * 0.7
        # Names of the front above the curve, all others below their points.
        at = _beside((x - 6 if is_right else x + 6, y - 5 if p in front else y + 13), names)
        names.append(at)
        parts.append(_text(*at, p.name, "value", "end" if is_right else "start"))
    return _svg(key, floor + 34, label, *parts)


def _beside(at: tuple[float, float], names: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """A place for a name that does not cover the last ones: there, or some lines lower."""
    for line in range(8):
        x, y = at[0], at[1] + 11 * line
        if not any(abs(x - a) < 60 and abs(y - b) < 11 for a, b in names[-8:]):
            return x, y
    return at


def _widened(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=0.0)
    more = max((high - low) * 0.12, 0.03)
    return low - more, high + more


def _round_numbers(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten between two logarithms; more of them where these are fewer than three."""
    for digits in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8), tuple(k / 10 for k in range(10, 100))):
        powers = range(math.floor(low), math.ceil(high) + 1)
        found = [d * 10.0**p for p in powers for d in digits if low <= math.log10(d * 10.0**p) <= high]
        if len(found) >= 3:
            break
    every = math.ceil(len(found) / 7) or 1
    return found[::every]
