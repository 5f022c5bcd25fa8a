"""Curves, bars and tables as parts of an SVG."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from docs_pictures.grafana_units import in_words

COLOURS = 8
MOST_LEGEND = 0.4
"""Largest share of a plot's height that its legend may take."""
AXIS, TIMES, LINE, LETTER = 56, 18, 16, 6.9
"""Pixels: the axis' texts, the times below, a line of the legend, one letter."""
TIME_APART = 84
"""Pixels that a time takes below the curves, with room around it."""
_TIMES = (15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 43200, 86400)


@dataclass(frozen=True)
class Area:
    """A rectangle in pixels."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Series:
    """A curve: (seconds since 1970, value)."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False
    colour: int | None = None
    """None: the next one."""


@dataclass(frozen=True)
class _Scale:
    area: Area
    since: float
    until: float
    low: float
    high: float
    step: float

    def x(self, at: float) -> float:
        return self.area.x + (at - self.since) / ((self.until - self.since) or 1) * self.area.width

    def y(self, value: float) -> float:
        share = (value - self.low) / ((self.high - self.low) or 1)
        return self.area.y + self.area.height - min(max(share, 0), 1) * self.area.height


def curves(
    series: Sequence[Series],
    area: Area,
    unit: str,
    *,
    stacked: bool,
    filled: bool,
    marks: Sequence[tuple[float, str]],
    limits: tuple[float | None, float | None],
) -> str:
    """Curves with axes and legend; empty where there are none."""
    if not series:
        return ""
    tops = _stack(series) if stacked else [list(s.points) for s in series]
    shades = [index % COLOURS if one.colour is None else one.colour for index, one in enumerate(series)]
    legend, tall = _legend([s.name for s in series], shades, area)
    plot = Area(area.x + AXIS, area.y, area.width - AXIS, area.height - tall - TIMES)
    scale = _scale(plot, tops, unit, limits)
    drawn = [_axes(scale, unit)]
    drawn += [_mark(scale, at, text) for at, text in marks if scale.since <= at <= scale.until]
    floor = [(at, scale.low) for at, _ in tops[0]]
    for index, (one, top, shade) in enumerate(zip(series, tops, shades, strict=True)):
        if (stacked or filled) and not one.dashed:
            drawn.append(_area(scale, top, tops[index - 1] if stacked and index else floor, shade))
        place = " ".join(f"{scale.x(at):.1f},{scale.y(value):.1f}" for at, value in top)
        dash = " dash" if one.dashed else ""
        drawn.append(f'<polyline class="curve l{shade}{dash}" points="{place}"/>')
    return "".join(drawn) + legend


def _stack(series: Sequence[Series]) -> list[list[tuple[float, float]]]:
    """Each series on those before it; dashed ones stand alone."""
    below: dict[float, float] = {}
    tops = []
    times = sorted({at for s in series if not s.dashed for at, _ in s.points})
    for one in series:
        if one.dashed:
            tops.append(list(one.points))
            continue
        own = dict(one.points)
        for at in times:
            below[at] = below.get(at, 0.0) + own.get(at, 0.0)
        tops.append([(at, below[at]) for at in times])
    return tops


def _scale(
    plot: Area, tops: Sequence[Sequence[tuple[float, float]]], unit: str, limits: tuple[float | None, float | None]
) -> _Scale:
    values = [value for top in tops for _, value in top]
    low = min(values) if limits[0] is None else limits[0]
    high = max(values) if limits[1] is None else limits[1]
    step = _round_step((high - low) or abs(high) or 1, unit)
    times = [at for top in tops for at, _ in top]
    low, high = math.floor(low / step) * step, math.ceil(high / step - 1e-9) * step
    return _Scale(plot, min(times), max(times), low, high if high > low else low + step, step)


def _round_step(span: float, unit: str) -> float:
    """Between lines of the grid: round in the unit's own sense."""
    raw = span / 4
    if unit == "s" and raw > 10:
        return float(next((step for step in _TIMES if step >= raw), math.ceil(raw / 86400) * 86400))
    if unit in ("bytes", "Bps") and raw > 1024:
        return float(2 ** math.ceil(math.log2(raw)))
    power = 10 ** math.floor(math.log10(raw))
    return float(next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= raw * 0.999))


def _axes(scale: _Scale, unit: str) -> str:
    plot, drawn = scale.area, []
    for number in range(round((scale.high - scale.low) / scale.step) + 1):
        value = scale.low + number * scale.step
        y = scale.y(value)
        drawn.append(f'<line class="grid" x1="{plot.x:.0f}" x2="{plot.x + plot.width:.0f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        text = escape(in_words(value, unit))
        drawn.append(f'<text class="soft" x="{plot.x - 7:.0f}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for share in (0.0, 0.25, 0.5, 0.75, 1.0) if plot.width > 5 * TIME_APART else (0.0, 0.5, 1.0):
        at = time.strftime("%H:%M:%S", time.gmtime(scale.since + share * (scale.until - scale.since)))
        x, anchor = plot.x + share * plot.width, "start" if not share else "end" if share == 1 else "middle"
        y = plot.y + plot.height + 15
        drawn.append(f'<text class="soft" x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{at}</text>')
    return "".join(drawn)


def _mark(scale: _Scale, at: float, text: str) -> str:
    x, plot = scale.x(at), scale.area
    return (
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{plot.y:.0f}" y2="{plot.y + plot.height:.0f}">'
        f"<title>{escape(text)}</title></line>"
    )


def _area(scale: _Scale, top: Sequence[tuple[float, float]], below: Sequence[tuple[float, float]], shade: int) -> str:
    floor = below if len(below) == len(top) else [(at, scale.low) for at, _ in top]
    path = [*top, *reversed(floor)]
    place = " ".join(f"{scale.x(at):.1f},{scale.y(value):.1f}" for at, value in path)
    return f'<polygon class="area f{shade}" points="{place}"/>'


def _legend(names: Sequence[str], shades: Sequence[int], area: Area) -> tuple[str, float]:
    """Names at the bottom of an area, in as many lines as they need and there is room for, and how tall that is."""
    places, x, line = [], 0.0, 0
    for name in names:
        width = 30 + LETTER * len(name)
        if x and x + width > area.width:
            if (line + 2) * LINE > area.height * MOST_LEGEND:
                break
            x, line = 0.0, line + 1
        places.append((x, line))
        x += width
    drawn = []
    for name, shade, (left, number) in zip(names, shades, places, strict=False):
        at, y = area.x + left, area.y + area.height - (line - number) * LINE
        drawn.append(f'<rect class="f{shade}" x="{at:.0f}" y="{y - 9:.0f}" width="11" height="11" rx="2"/>')
        drawn.append(f'<text class="soft" x="{at + 16:.0f}" y="{y:.0f}">{escape(name)}</text>')
    return "".join(drawn), (line + 1) * LINE


def bars(rows: Sequence[tuple[str, Sequence[float | None]]], area: Area, unit: str, keys: Sequence[str]) -> str:
    """For each name one bar or several, side by side, with their values; ``keys`` name the bars."""
    values = [value for _, own in rows for value in own if value is not None]
    if not values:
        return ""
    left = min(area.width * 0.4, max(len(name) for name, _ in rows) * LETTER + 12)
    legend, tall = _legend(keys, range(len(keys)), area) if keys else ("", 0.0)
    room = area.height - tall - (8 if keys else 0)
    apart = min(46.0, room / len(rows))
    height = min(30.0, apart - 4)
    widest = area.width - left - 84
    drawn = []
    for index, (name, own) in enumerate(rows):
        y = area.y + index * apart
        drawn.append(
            f'<text x="{area.x + left - 8:.0f}" y="{y + height / 2 + 4:.1f}" text-anchor="end">{escape(name)}</text>'
        )
        thick = height / len(own)
        for number, value in enumerate(own):
            if value is None:
                continue
            top, width = y + number * thick, max(value / (max(values) or 1) * widest, 1)
            colour = number if keys else index % COLOURS
            drawn.append(
                f'<rect class="f{colour}" x="{area.x + left:.0f}" y="{top:.1f}" width="{width:.1f}" '
                f'height="{thick - 1:.1f}" rx="1"/><text class="soft" x="{area.x + left + width + 6:.0f}" '
                f'y="{top + thick / 2 + 4:.1f}">{escape(in_words(value, unit))}</text>'
            )
    return "".join(drawn) + legend


def table(head: Sequence[str], rows: Sequence[Sequence[str]], area: Area, numbers: int) -> str:
    """A table as wide as the area, columns by what is in them; those from ``numbers`` on stand to the right."""
    longest = [max(len(row[column]) for row in (head, *rows)) + 2 for column in range(len(head))]
    edges = [area.x + area.width * sum(longest[:column]) / sum(longest) for column in range(len(head) + 1)]
    drawn = []
    for index, row in enumerate([head, *rows]):
        y = area.y + 14 + index * 22
        if y > area.y + area.height:
            break
        for column, cell in enumerate(row):
            right = column >= numbers
            x = edges[column + right] - (4 if right else 0)
            anchor, soft = ("end" if right else "start"), "" if index else ' class="soft"'
            drawn.append(f'<text{soft} x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{escape(cell)}</text>')
        drawn.append(f'<line class="grid" x1="{area.x}" x2="{area.x + area.width}" y1="{y + 7:.0f}" y2="{y + 7:.0f}"/>')
    return "".join(drawn)
