"""Charts as inline SVG. Colours are classes, so that the page's style decides them: light, dark, paper."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

WIDTH, HEIGHT = 560, 240
COLUMNS_HEIGHT = 170
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 34
MOST_POINTS = 400
"""Most points of one curve; longer ones are drawn as means of neighbouring points."""
TICKS = 5
SERIES = 6
"""Colours that the style has."""


@dataclass(frozen=True)
class Curve:
    """One series: (x, y) in order of x."""

    name: str
    points: Sequence[tuple[float, float]]
    faint: bool = False
    """Behind the others, such as what another curve smooths."""
    dots: bool = False
    """With a dot for each point, for a few."""


@dataclass(frozen=True)
class Mark:
    """A vertical line."""

    x: float
    text: str


def lines(
    title: str,
    curves: Sequence[Curve],
    *,
    y_text: Callable[[float], str],
    x_title: str = "step",
    marks: Sequence[Mark] = (),
    from_zero: bool = False,
) -> str:
    """Curves over steps, with a legend; empty where there is nothing to draw."""
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return ""
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    low, high = (min(0.0, *ys) if from_zero else min(ys)), max(ys)
    step = _round_step((high - low) or abs(high) or 1.0)
    plot = _Plot(0.0, max(xs), math.floor(low / step) * step, math.ceil(high / step - 1e-9) * step or step, step)
    shown = [
        *_grid(plot, y_text, x_title),
        *(_mark(plot, mark) for mark in marks if plot.low_x < mark.x <= plot.high_x),
        *(_curve(plot, curve, index) for index, curve in enumerate(curves)),
    ]
    legend = "".join(
        f'<span class="key k{index % SERIES}{" faint" if curve.faint else ""}">{escape(curve.name)}</span>'
        for index, curve in enumerate(curves)
    )
    return (
        f'<figure><figcaption><b>{escape(title)}</b><span class="keys">{legend}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(shown)}</svg></figure>'
    )


@dataclass(frozen=True)
class _Plot:
    """From values to places in the picture."""

    low_x: float
    high_x: float
    low_y: float
    high_y: float
    step_y: float
    """Between two lines of the grid."""

    def x(self, value: float) -> float:
        share = (value - self.low_x) / ((self.high_x - self.low_x) or 1)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.low_y) / ((self.high_y - self.low_y) or 1)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _round_step(span: float) -> float:
    raw = span / TICKS
    power = 10 ** math.floor(math.log10(raw))
    return float(next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999))


def ticks(low: float, high: float, step: float = 0.0) -> list[float]:
    """Round numbers from ``low`` to ``high``."""
    step = step or _round_step((high - low) or 1.0)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _grid(plot: _Plot, y_text: Callable[[float], str], x_title: str) -> Iterator[str]:
    for value in ticks(plot.low_y, plot.high_y, plot.step_y):
        y = plot.y(value)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(y_text(value))}</text>'
    base = HEIGHT - BOTTOM
    for value in ticks(plot.low_x, plot.high_x):
        if value == int(value):
            x = plot.x(value)
            yield f'<text class="tick" x="{x:.1f}" y="{base + 16}" text-anchor="middle">{value:,.0f}</text>'
    yield f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{escape(x_title)}</text>'
    yield f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>'


def _mark(plot: _Plot, mark: Mark) -> str:
    x = plot.x(mark.x)
    return (
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text class="tick" x="{x - 4:.1f}" y="{TOP + 9}" text-anchor="end">{escape(mark.text)}</text>'
    )


def _curve(plot: _Plot, curve: Curve, index: int) -> str:
    points = [(plot.x(x), plot.y(y)) for x, y in thinned(curve.points)]
    place = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    style = f"s{index % SERIES}{' faint' if curve.faint else ''}"
    drawn = f'<polyline class="curve {style}" points="{place}"/>'
    if curve.dots or len(points) == 1:
        drawn += "".join(
            f'<circle class="dot {style}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{value[0]:g}: {value[1]:.4g}</title>'
            "</circle>"
            for (x, y), value in zip(points, thinned(curve.points), strict=True)
        )
    return drawn


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most ``MOST_POINTS``, each the mean of its neighbours."""
    size = math.ceil(len(points) / MOST_POINTS)
    groups = (points[start : start + size] for start in range(0, len(points), size or 1))
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def smoothed(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Means over a window around each point, shorter at the ends."""
    half, found = window // 2, []
    for index, (x, _) in enumerate(points):
        near = points[max(0, index - half) : index + half + 1]
        found.append((x, sum(y for _, y in near) / len(near)))
    return found


def columns(title: str, parts: Sequence[tuple[str, float]], *, x_title: str, y_text: Callable[[float], str]) -> str:
    """Return a column for each of a few parts, its size above it."""
    most = max((size for _, size in parts), default=0)
    if not most:
        return ""
    base, room = COLUMNS_HEIGHT - BOTTOM, COLUMNS_HEIGHT - BOTTOM - TOP - 14
    apart = min(WIDTH / len(parts), 110.0)
    wide, drawn = apart * 0.72, []
    for index, (name, size) in enumerate(parts):
        x, height = index * apart, max(size / most * room, 1.0)
        drawn.append(
            f'<rect class="f0" x="{x:.1f}" y="{base - height:.1f}" width="{wide:.1f}" height="{height:.1f}" rx="2"/>'
            f'<text class="tick" x="{x + wide / 2:.1f}" y="{base - height - 5:.1f}" text-anchor="middle">'
            f'{escape(y_text(size))}</text><text class="tick" x="{x + wide / 2:.1f}" y="{base + 16}" '
            f'text-anchor="middle">{escape(name)}</text>'
        )
    edge = (len(parts) - 1) * apart + wide
    drawn.append(f'<line class="axis" x1="0" x2="{edge:.1f}" y1="{base}" y2="{base}"/>')
    drawn.append(f'<text class="tick" x="0" y="{COLUMNS_HEIGHT - 3}">{escape(x_title)}</text>')
    return (
        f'<figure><figcaption><b>{escape(title)}</b></figcaption><svg viewBox="0 0 {WIDTH} {COLUMNS_HEIGHT}" '
        f'role="img" aria-label="{escape(title)}">{"".join(drawn)}</svg></figure>'
    )


def _share(part: float) -> str:
    return f"{part:.0%}" if part >= 0.01 else "under 1%"


def shares(title: str, parts: Sequence[tuple[str, float, str]]) -> str:
    """Return one bar cut into parts: (name, size, size in words)."""
    total = sum(size for _, size, _ in parts)
    if not total:
        return ""
    cut, x = [], 0.0
    for index, (name, size, words) in enumerate(parts):
        width = size / total * 1000
        cut.append(
            f'<rect class="f{index % SERIES}" x="{x:.1f}" y="0" width="{max(width - 2, 0.5):.1f}" height="26" rx="2">'
            f"<title>{escape(name)}: {escape(words)}</title></rect>"
        )
        x += width
    keys = "".join(
        f'<span class="key k{index % SERIES}">{escape(name)} <i>{escape(words)}, {_share(size / total)}</i></span>'
        for index, (name, size, words) in enumerate(parts)
    )
    return (
        f'<figure class="wide"><figcaption><b>{escape(title)}</b></figcaption><svg viewBox="0 0 1000 26" '
        f'preserveAspectRatio="none" class="shares" role="img" aria-label="{escape(title)}">{"".join(cut)}</svg>'
        f'<div class="keys">{keys}</div></figure>'
    )
