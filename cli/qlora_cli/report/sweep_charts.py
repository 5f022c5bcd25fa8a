"""Charts of a sweep as inline SVG: parallel coordinates of its trials, and one slice for each parameter."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from qlora_api.sweep.parameters import Parameter, Scale
from qlora_cli.report.charts import BOTTOM, HEIGHT, TOP

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qlora_api.sweep.trials import Trial

WIDE = 1120
MARGIN = 90
SLICE_WIDTH = 560


def place(parameter: Parameter, text: str) -> float:
    """Return where a value is between 0 and 1 on a parameter's axis."""
    if parameter.choices is not None:
        texts = parameter.texts
        return texts.index(text) / (len(texts) - 1) if len(texts) > 1 else 0.5
    assert parameter.range is not None
    low, high, value = float(parameter.range.min), float(parameter.range.max), float(text)
    if parameter.range.scale is Scale.LOG:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return (value - low) / (high - low)


def _labels(parameter: Parameter) -> list[tuple[float, str]]:
    ends = parameter.range
    return [(place(parameter, text), text) for text in ([ends.min, ends.max] if ends else parameter.texts)]


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def parallel_coordinates(
    parameters: Sequence[Parameter], trials: Sequence[Trial], values: Mapping[str, float], metric: str, best: str | None
) -> str:
    """A line for each trial through its values to the objective; the best one stands out."""
    shown = [trial for trial in trials if trial.name in values]
    if not shown:
        return ""
    low, high = min(values.values()), max(values.values())
    span = (high - low) or 1.0
    apart = (WIDE - 2 * MARGIN) / len(parameters)
    xs = [MARGIN + index * apart for index in range(len(parameters) + 1)]
    drawn = []
    for x, name, labels in zip(
        xs,
        [*(p.path.rpartition(".")[2] for p in parameters), metric],
        [*(_labels(p) for p in parameters), [(0.0, f"{low:.4g}"), (1.0, f"{high:.4g}")]],
        strict=True,
    ):
        drawn.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        drawn.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(name)}</text>')
        drawn += [
            f'<text class="tick" x="{x + 6:.1f}" y="{_y(at) + 4:.1f}">{escape(text)}</text>' for at, text in labels
        ]
    for trial in sorted(shown, key=lambda t: t.name == best):  # the best one on top
        shares = [*(place(p, trial.parameters[p.path]) for p in parameters), (values[trial.name] - low) / span]
        points = " ".join(f"{x:.1f},{_y(share):.1f}" for x, share in zip(xs, shares, strict=True))
        style = "s1" if trial.name == best else "s0 faint"
        drawn.append(f'<polyline class="curve {style}" points="{points}"/>')
    title = "Trials: their settings, and the objective"
    return (
        f'<figure class="wide"><figcaption><b>{title}</b></figcaption><svg viewBox="0 0 {WIDE} {HEIGHT}" role="img" '
        f'aria-label="{title}">{"".join(drawn)}</svg></figure>'
    )


def parameter_slice(
    parameter: Parameter, trials: Sequence[Trial], values: Mapping[str, float], best: str | None
) -> str:
    """The objective of each trial over one parameter."""
    shown = [trial for trial in trials if trial.name in values]
    if not shown:
        return ""
    low, high = min(values.values()), max(values.values())
    span = (high - low) or 1.0
    room = SLICE_WIDTH - 2 * MARGIN
    drawn = [f'<line class="axis" x1="{MARGIN}" x2="{SLICE_WIDTH - MARGIN}" y1="{_y(0)}" y2="{_y(0)}"/>']
    drawn += [
        f'<text class="tick" x="{MARGIN + at * room:.1f}" y="{HEIGHT - 12}" text-anchor="middle">{escape(text)}</text>'
        for at, text in _labels(parameter)
    ]
    drawn += [
        f'<text class="tick" x="{MARGIN - 24}" y="{_y(share) + 4:.1f}" text-anchor="end">{value:.4g}</text>'
        for share, value in ((0.0, low), (1.0, high))
    ]
    for trial in sorted(shown, key=lambda t: t.name == best):
        x = MARGIN + place(parameter, trial.parameters[parameter.path]) * room
        y = _y((values[trial.name] - low) / span)
        style = "s1" if trial.name == best else "s0"
        drawn.append(
            f'<circle class="dot {style}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{escape(trial.name)}: '
            f"{values[trial.name]:.4g}</title></circle>"
        )
    return (
        f'<figure><figcaption><b>{escape(parameter.path)}</b></figcaption><svg viewBox="0 0 {SLICE_WIDTH} {HEIGHT}" '
        f'role="img" aria-label="{escape(parameter.path)}">{"".join(drawn)}</svg></figure>'
    )
