"""Curves by step as inline SVG: axes with round numbers, lines that differ by colour and by dashes, one marked point.

Law: a point that is no finite number is left out, and an outlier of a faint line does not flatten the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 420, 240, 50, 24, 14, 42
_MOST_POINTS, _OUTLIERS = 400, 0.02
# Of a file of its own; a page that holds a figure brings its own.
_STYLE = """text { font: 12px sans-serif; fill: #5c5c57 } .title { font-size: 15px; fill: #1c1c1a }
.grid { stroke: #d9d9d3; fill: none } .now { visibility: hidden } .line { fill: none; stroke-width: 2 }
.line-0 { stroke: #0b5cc7 } .line-1 { stroke: #b04a00; stroke-dasharray: 7 5 }
.line-2 { stroke: #14713a; stroke-dasharray: 2 4; stroke-width: 3 }"""


@dataclass(frozen=True, kw_only=True)
class Line:
    """points: (step, value) in the order of steps; faint: the ground on which the other lines are read."""

    name: str
    points: Sequence[Point]
    faint: bool = False


def figure(title: str, note: str, lines: Sequence[Line], mark: Point | None = None, mark_name: str = "") -> str:
    """A chart with its title, what it means and a legend with first and last values; "" without points."""
    drawn = [Line(name=line.name, points=list(filter(_is_finite, line.points)), faint=line.faint) for line in lines]
    drawn = [line for line in drawn if line.points]
    if not drawn:
        return ""
    said = "; ".join(_spoken(line) for line in drawn)
    items = "".join(
        f'<li><svg class="key" viewBox="0 0 26 8" aria-hidden="true"><path class="{_style(drawn, line)}" d="M0 4H26"/>'
        f"</svg>{escape(_spoken(line))}</li>"
        for line in drawn
    )
    return (
        f'<figure class="chart"><figcaption><h3>{escape(title)}</h3><p>{escape(note)}</p></figcaption>'
        f"{_plot(f'{title}: {said}', drawn, mark, mark_name)}"
        f'<ul class="legend">{items}</ul></figure>'
    )


def drawing(charts: Sequence[tuple[str, Sequence[Line]]]) -> str:
    """Charts beside each other, each with its title and a legend below it, as an SVG file of its own."""
    legend = 20 * max(len(lines) for _, lines in charts)
    width, height = _WIDTH * len(charts), 30 + _HEIGHT + legend + 10
    parts = []
    for index, (title, lines) in enumerate(charts):
        left = index * _WIDTH
        plot = _plot(title, lines, None, "").replace(
            "<svg ", f'<svg x="{left}" y="30" width="{_WIDTH}" height="{_HEIGHT}" ', 1
        )
        parts.append(f'<text class="title" x="{left + _LEFT}" y="20">{escape(title)}</text>{plot}')
        for row, line in enumerate(lines):
            y = 30 + _HEIGHT + 20 * row + 12
            parts.append(f'<path class="{_style(lines, line)}" d="M{left + _LEFT} {y - 4}h26"/>')
            parts.append(f'<text x="{left + _LEFT + 34}" y="{y}">{escape(_spoken(line))}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'<style>{_STYLE}</style><rect width="{width}" height="{height}" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The mean of the values around each point, over a tenth of the steps; shorter at the ends."""
    points = list(filter(_is_finite, points))
    reach = max(len(points) // 20, 1)
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    result = []
    for index, (step, _) in enumerate(points):
        low, high = max(index - reach, 0), min(index + reach + 1, len(points))
        result.append((step, (sums[high] - sums[low]) / (high - low)))
    return result


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high], about that many."""
    raw = (high - low) / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _plot(said: str, lines: Sequence[Line], mark: Point | None, mark_name: str) -> str:
    last = max(1, *(line.points[-1][0] for line in lines))
    low, high = _range(lines, 0.18 if mark is not None else 0.08)
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def x(step: float) -> float:
        return _LEFT + (right - _LEFT) * step / last

    def y(value: float) -> float:
        return bottom - (bottom - _TOP) * (min(max(value, low), high) - low) / (high - low)

    parts = []
    levels = ticks(low, high, 4)
    for level in levels:
        parts.append(f'<path class="grid" d="M{_LEFT} {y(level):.1f}H{right}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{y(level) + 4:.1f}" text-anchor="end">{_number(level, levels)}</text>')
    for step in (tick for tick in ticks(0, last, 5) if tick == int(tick)):
        parts.append(f'<path class="grid" d="M{x(step):.1f} {bottom}v4"/>')
        parts.append(f'<text x="{x(step):.1f}" y="{bottom + 18}" text-anchor="middle">{step:.0f}</text>')
    parts.append(f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">step</text>')
    parts.append(
        f'<path class="now" data-left="{_LEFT}" data-right="{right}" data-last="{last:g}" d="M0 {_TOP}V{bottom}"/>'
    )
    for line in lines:
        places = [f"{x(step):.1f} {y(value):.1f}" for step, value in _thinned(line.points)]
        path = "M" + "L".join(places) if len(places) > 1 else f"M{places[0]}h0.01"
        parts.append(f'<path class="{_style(lines, line)}" d="{path}"/>')
    if mark is not None and _is_finite(mark):
        # Under the point: the lowest one has nothing there.
        at, up, anchor = x(mark[0]), y(mark[1]), "end" if mark[0] > last / 2 else "start"
        parts.append(f'<circle class="mark" cx="{at:.1f}" cy="{up:.1f}" r="5"/>')
        parts.append(
            f'<text class="said" x="{at:.1f}" y="{up + 20:.1f}" text-anchor="{anchor}">{escape(mark_name)}</text>'
        )
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(said)}">{"".join(parts)}</svg>'


def _range(lines: Sequence[Line], below: float) -> Point:
    """Lowest and highest value shown, with a little air; `below`: how much under the lowest, as a part of the range."""
    values: list[float] = []
    for line in lines:
        ordered = sorted(value for _, value in line.points)
        cut = int(len(ordered) * _OUTLIERS) if line.faint else 0
        values += (ordered[cut], ordered[-1 - cut])
    low, high = min(values), max(values)
    span = high - low or abs(high) or 1.0
    return low - span * below, high + span * 0.08


def _style(lines: Sequence[Line], line: Line) -> str:
    if line.faint:
        return "line faint"
    return f"line line-{[one.name for one in lines if not one.faint].index(line.name) % 3}"


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Few enough to draw; the last stays."""
    stride = math.ceil(len(points) / _MOST_POINTS)
    return [*points[: len(points) - 1 : stride], points[-1]]


def _spoken(line: Line) -> str:
    if line.faint:
        return line.name
    (first, begin), (last, end) = line.points[0], line.points[-1]
    if first == last:
        return f"{line.name} {begin:.3f}"
    return f"{line.name} {begin:.3f} → {end:.3f}"


def _number(value: float, among: Sequence[float]) -> str:
    """With as many digits as tell neighbours apart."""
    apart = among[1] - among[0] if len(among) > 1 else abs(value) or 1.0
    return f"{value:.{max(-math.floor(math.log10(apart) + 1e-9), 0)}f}"


def _is_finite(point: Point) -> bool:
    return point[1] is not None and math.isfinite(point[1])
