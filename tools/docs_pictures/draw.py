"""Dashboards as pictures, without a Grafana: the same panels from the same queries, as one SVG.

For looking at them while they are written, and for documents. Colours follow the reader's light or dark preference.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Protocol

from docs_pictures.grafana_units import in_words
from docs_pictures.plots import Area, Series, bars, curves, table

WIDTH, GAP = 24, 8
"""Columns; pixels between panels."""
WIDE, NARROW = (50, 30), (36, 26)
"""Pixels of a grid cell: as on a screen, and for a column of text, where the letters stay readable."""
BOLD = 0.58
"""Width of a bold letter, of its size."""
BIG, TITLE = 30, 13
"""Sizes of a figure and of a title where there is room for it."""
STYLE = """
svg{--back:#f4f5f7;--card:#fff;--text:#1f2430;--soft:#687083;--line:#e3e6eb;
--s0:#2a6fdb;--s1:#d9730d;--s2:#1a9c74;--s3:#b0468f;--s4:#8a6d00;--s5:#6b7280;--s6:#c0392b;--s7:#3a8fb7}
@media (prefers-color-scheme:dark){svg{--back:#111217;--card:#1a1d23;--text:#e2e5ec;--soft:#9aa3b2;--line:#2b2f38;
--s0:#6ea8ff;--s1:#ffa657;--s2:#4fd1a5;--s3:#e58ac9;--s4:#e3c04b;--s5:#9aa4b2;--s6:#ff8a80;--s7:#7fd0f0}}
text{font:12px system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;fill:var(--text)}
.soft{fill:var(--soft)}.title,.big{font-weight:600}.row{font-weight:600;font-size:15px}
.card{fill:var(--card);stroke:var(--line)}.back{fill:var(--back)}
.grid{stroke:var(--line)}.curve{fill:none;stroke-width:1.8;stroke-linejoin:round}.dash{stroke-dasharray:7 5}
.area{opacity:.28;stroke:none}.mark{stroke:var(--soft);stroke-dasharray:3 3}
""" + "".join(f".l{i}{{stroke:var(--s{i})}}.f{i}{{fill:var(--s{i})}}" for i in range(8))


COLOURS = {"blue": 0, "green": 2, "purple": 3, "yellow": 4, "red": 6}
"""Grafana's names for some of them."""


class Evaluate(Protocol):
    """Evaluates an expression of a dashboard, with its variables filled in."""

    def now(self, expression: str) -> list[dict[str, Any]]:
        """Elements of an instant vector, as Prometheus' API has them."""

    def over_time(self, expression: str) -> list[dict[str, Any]]:
        """Series of a range, as Prometheus' API has them."""


@dataclass(frozen=True)
class TargetSeries:
    """The series of one target."""

    target: Mapping[str, Any]
    series: list[dict[str, Any]]


def picture(board: Mapping[str, Any], ask: Evaluate, only: Sequence[str] = (), cell: tuple[int, int] = WIDE) -> str:
    """A dashboard, or the panels and rows with some titles alone; ``cell``: pixels of a cell of its grid."""
    panels = _flowing([p for p in board["panels"] if p["title"] in only]) if only else board["panels"]
    marks = _marks(board, ask)
    width = max(p["gridPos"]["x"] + p["gridPos"]["w"] for p in panels) * cell[0] + GAP
    height = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in panels) * cell[1] + GAP
    drawn = "".join(_placed(panel, ask, marks, cell) for panel in panels)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(board["title"])}"><style>{STYLE}</style>'
        f'<rect class="back" width="100%" height="100%"/>{drawn}</svg>\n'
    )


def _flowing(panels: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Panels from left to right, then from top to bottom, without gaps; those beside each other are equally tall."""
    lines: list[list[Mapping[str, Any]]] = [[]]
    for panel in panels:
        if sum(p["gridPos"]["w"] for p in lines[-1]) + panel["gridPos"]["w"] > WIDTH:
            lines.append([])
        lines[-1].append(panel)
    y, placed = 0, []
    for line in lines:
        x, tallest = 0, max(panel["gridPos"]["h"] for panel in line)
        for panel in line:
            wide = panel["gridPos"]["w"]
            placed.append({**panel, "gridPos": {"x": x, "y": y, "w": wide, "h": tallest}})
            x += wide
        y += tallest
    return placed


def _placed(panel: Mapping[str, Any], ask: Evaluate, marks: Sequence[tuple[float, str]], cell: tuple[int, int]) -> str:
    at = panel["gridPos"]
    x, y = at["x"] * cell[0] + GAP, at["y"] * cell[1] + GAP
    width, height = at["w"] * cell[0] - GAP, at["h"] * cell[1] - GAP
    if panel["type"] == "row":
        return f'<text class="row" x="{x}" y="{y + 16}">{escape(panel["title"])}</text>'
    inside = Area(12, 34, width - 24, height - 44)
    body = _body(panel, ask, inside, marks)
    if not body:
        body = f'<text class="soft" x="{width / 2}" y="{height / 2 + 8}" text-anchor="middle">{_empty(panel)}</text>'
    title = f'style="font-size:{fitting(panel["title"], inside.width + GAP, TITLE)}px"'
    return (
        f'<g transform="translate({x},{y})"><title>{escape(panel["description"])}</title>'
        f'<rect class="card" width="{width}" height="{height}" rx="4"/>'
        f'<text class="title" x="12" y="21" {title}>{escape(panel["title"])}</text>{body}</g>'
    )


def fitting(text: str, width: float, most: int) -> int:
    """The size of bold letters with which a text is no wider than it may be."""
    return min(most, int(width / (BOLD * len(text))))


def _empty(panel: Mapping[str, Any]) -> str:
    value = panel["fieldConfig"]["defaults"].get("noValue")
    return escape(value) if value else "No data"


def _body(panel: Mapping[str, Any], ask: Evaluate, area: Area, marks: Sequence[tuple[float, str]]) -> str:
    if panel["type"] == "timeseries":
        return _timeseries(panel, [TargetSeries(t, ask.over_time(t["expr"])) for t in panel["targets"]], area, marks)
    found = [TargetSeries(t, ask.now(t["expr"])) for t in panel["targets"]]
    unit = panel["fieldConfig"]["defaults"]["unit"]
    match panel["type"]:
        case "stat":
            return _stat(panel, found[0].series, area)
        case "bargauge":
            named = [(_name(f.target, s), float(s["value"][1])) for f in found for s in f.series]
            return bars([(name, [value]) for name, value in sorted(named)], area, unit, ())
        case "barchart":
            return _side_by_side(panel, found, area, unit)
        case _:
            return _table(panel, found, area)


def _stat(panel: Mapping[str, Any], series: list[dict[str, Any]], area: Area) -> str:
    if not series:
        return ""
    defaults = panel["fieldConfig"]["defaults"]
    text = in_words(float(series[0]["value"][1]), defaults["unit"], defaults.get("decimals"))
    size = f'style="font-size:{fitting(text, area.width, BIG)}px"'
    middle = f'x="{area.x + area.width / 2}" y="{area.y + area.height * 0.55 + 6:.0f}" text-anchor="middle"'
    return f'<text class="big" {middle} {size}>{escape(text)}</text>'


def _timeseries(
    panel: Mapping[str, Any], found: Sequence[TargetSeries], area: Area, marks: Sequence[tuple[float, str]]
) -> str:
    overrides = panel["fieldConfig"].get("overrides", ())
    dashed = {o["matcher"]["options"] for o in overrides if o["matcher"]["id"] == "byFrameRefID"}
    colours = {
        o["matcher"]["options"].strip("/"): COLOURS[property_["value"]["fixedColor"]]
        for o in overrides
        for property_ in o["properties"]
        if property_["id"] == "color"
    }
    custom = panel["fieldConfig"]["defaults"].get("custom", {})
    drawn = [
        Series(
            _name(f.target, one),
            [(float(t), float(v)) for t, v in one["values"] if v not in ("NaN", "+Inf", "-Inf")],
            dashed=f.target["refId"] in dashed,
            colour=next((c for pattern, c in colours.items() if re.search(pattern, _name(f.target, one))), None),
        )
        for f in found
        for one in f.series
    ]
    stacked = custom.get("stacking", {}).get("mode") == "normal"
    defaults = panel["fieldConfig"]["defaults"]
    filled = custom.get("drawStyle") == "bars"
    shown = sorted((s for s in drawn if s.points), key=lambda s: s.dashed)
    limits = (defaults.get("min"), defaults.get("max"))
    return curves(shown, area, defaults["unit"], stacked=stacked, filled=filled, marks=marks, limits=limits)


def _side_by_side(panel: Mapping[str, Any], found: Sequence[TargetSeries], area: Area, unit: str) -> str:
    label = panel["options"]["xField"]
    values: dict[str, dict[str, float]] = {}
    for one in found:
        for series in one.series:
            name = series["metric"].get(label, "")
            values.setdefault(name, {})[one.target["legendFormat"]] = float(series["value"][1])
    keys = [one.target["legendFormat"] for one in found]
    return bars([(name, [by.get(key) for key in keys]) for name, by in values.items()], area, unit, keys)


def _table(panel: Mapping[str, Any], found: Sequence[TargetSeries], area: Area) -> str:
    options = panel["transformations"][-1]["options"]
    names = dict(sorted(options["renameByName"].items(), key=lambda item: options["indexByName"][item[0]]))
    units = {
        o["matcher"]["options"]: next(p["value"] for p in o["properties"] if p["id"] == "unit")
        for o in panel["fieldConfig"].get("overrides", ())
    }
    labels = [key for key in names if not key.startswith("Value")]
    figures = zip(found[1:], [shown for key, shown in names.items() if key.startswith("Value")], strict=True)
    known = [(one, shown) for one, shown in figures if one.series]
    rows = []
    for first in sorted(found[0].series, key=lambda s: [s["metric"].get(label, "") for label in labels]):
        row = [first["metric"].get(label, "") for label in labels]
        for one, shown in known:
            match = next((s for s in one.series if s["metric"].items() <= first["metric"].items()), None)
            row.append(in_words(float(match["value"][1]), units[shown]) if match else "")
        rows.append(row)
    head = [*(names[label] for label in labels), *(shown for _, shown in known)]
    return table(head, rows, area, numbers=len(labels)) if rows else ""


def _name(target: Mapping[str, Any], series: Mapping[str, Any]) -> str:
    """Grafana's legend: the labels' values in place of their names."""
    text = str(target.get("legendFormat", ""))
    for label, value in series["metric"].items():
        text = text.replace("{{" + label + "}}", value)
    return text


def _marks(board: Mapping[str, Any], ask: Evaluate) -> list[tuple[float, str]]:
    """Annotations: where each series of their expressions has its first point."""
    found = []
    for annotation in board["annotations"].get("list", []):
        for series in ask.over_time(annotation["expr"]):
            text = str(annotation["titleFormat"])
            for label, value in series["metric"].items():
                text = text.replace("{{" + label + "}}", value)
            found.append((float(series["values"][0][0]), text))
    return found
