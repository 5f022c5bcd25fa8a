"""Build the parts of dashboards: variables, panels in one look, annotations. Grafana's own SDK builds the JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import barchart, bargauge, common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import prometheus as prometheus_models
from grafana_foundation_sdk.models.dashboard import DataSourceRef, DynamicConfigValue, VariableOption

NO_GPU, NO_DCGM = "No GPU", "DCGM's exporter is not scraped"
"""Said in the place of figures that only they have."""
Panel = Any
"""A builder of a panel. The SDK's have no base with ``span`` and ``height``."""
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
JOB = 'namespace=~"$namespace",job=~"$job"'
"""Selector of the job that is looked at."""
NAMESPACE = 'namespace=~"$namespace"'
EACH_JOB = "by (namespace, job)"
WIDTH = 24
"""Columns of a dashboard."""
HEIGHT = 8
TAG = "qlora-operator"
PERCENT = "percentunit"


@dataclass(frozen=True)
class Query:
    """An expression and what its series are called."""

    expr: str
    legend: str = ""
    dashed: bool = False
    """True for a predicted or allowed value, which is drawn beside the measured one."""


def lines(
    title: str,
    text: str,
    unit: str,
    *queries: Query,
    stacked: bool = False,
    bars: bool = False,
    span: int = 12,
    colours: Mapping[str, str] | None = None,
    **limits: float,
) -> Panel:
    """Curves over time.

    ``colours``: shades of a colour for the names that a ``/pattern/`` matches; ``limits``: ``min``, ``max`` and
    ``decimals`` of the axis.
    """
    panel = (
        timeseries.Panel()
        .line_width(2)
        .line_interpolation(common_models.LineInterpolation.LINEAR)
        .fill_opacity(60 if bars else 25 if stacked else 4)
        .show_points(common_models.VisibilityMode.AUTO)
        .point_size(4)
        .draw_style(common_models.GraphDrawStyle.BARS if bars else common_models.GraphDrawStyle.LINE)
        .legend(
            common.VizLegendOptions()
            .display_mode(common_models.LegendDisplayMode.LIST)
            .placement(common_models.LegendPlacement.BOTTOM)
            .show_legend(show_legend=True)
        )
        .tooltip(
            common.VizTooltipOptions()
            .mode(common_models.TooltipDisplayMode.MULTI)
            .sort(common_models.SortOrder.DESCENDING)
        )
    )
    if stacked:
        panel.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL))
    for index, query in enumerate(queries):
        if query.dashed:
            style = DynamicConfigValue(id_val="custom.lineStyle", value={"fill": "dash", "dash": [8, 6]})
            plain = DynamicConfigValue(id_val="custom.fillOpacity", value=0)
            alone = DynamicConfigValue(id_val="custom.stacking", value={"mode": "none"})
            panel.override_by_query(_letter(index), [style, plain, alone])
    for pattern, colour in (colours or {}).items():
        shades = DynamicConfigValue(id_val="color", value={"mode": "shades", "fixedColor": colour})
        panel.override_by_regexp(pattern, [shades])
    return _filled(panel, title, text, unit, queries, span, limits)


def figure(
    title: str,
    text: str,
    unit: str,
    query: Query,
    *,
    span: int = 4,
    steps: Sequence[tuple[float, str]] = (),
    **limits: float,
) -> Panel:
    """Return one number, coloured from each of ``steps`` on: (value, colour)."""
    panel = (
        stat.Panel()
        .graph_mode(common_models.BigValueGraphMode.AREA)
        .color_mode(common_models.BigValueColorMode.VALUE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )
    marks = [models.Threshold(value=None, color="text" if not steps else "green")]
    marks += [models.Threshold(value=value, color=colour) for value, colour in steps]
    panel.thresholds(dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(marks))
    return _filled(panel, title, text, unit, (query,), span, limits).height(4)


def totals(title: str, text: str, unit: str, *queries: Query, span: int = 12, **limits: float) -> Panel:
    """Sums over the time that is shown, one bar each."""
    panel = (
        bargauge.Panel()
        .orientation(common_models.VizOrientation.HORIZONTAL)
        .display_mode(common_models.BarGaugeDisplayMode.BASIC)
        .color_scheme(dashboard.FieldColor().mode(models.FieldColorModeId.PALETTE_CLASSIC))
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )
    return _filled(panel, title, text, unit, queries, span, limits, instant=True)


def side_by_side(title: str, text: str, unit: str, label: str, *queries: Query, span: int = 12) -> Panel:
    """For each value of a label one bar for each query, beside each other."""
    panel = (
        barchart.Panel()
        .orientation(common_models.VizOrientation.HORIZONTAL)
        .show_value(common_models.VisibilityMode.ALWAYS)
        .x_field(label)
        .fill_opacity(75)
        .legend(
            common.VizLegendOptions()
            .display_mode(common_models.LegendDisplayMode.LIST)
            .placement(common_models.LegendPlacement.BOTTOM)
            .show_legend(show_legend=True)
        )
    )
    _joined(panel, {_value(i): query.legend for i, query in enumerate(queries)}, drop=("Time",))
    return _filled(panel, title, text, unit, queries, span, {}, as_table=True)


@dataclass(frozen=True)
class Column:
    """One column of a table that comes from a query of its own."""

    name: str
    expr: str
    unit: str
    gauge: bool = False
    """A bar from 0 to 1 in the cell."""


def rows(title: str, text: str, keys: Sequence[tuple[str, str]], first: str, columns: Sequence[Column]) -> Panel:
    """A table. ``keys``: labels of ``first``, a query whose value is not shown, and what their columns are called."""
    panel = table.Panel().show_header(show_header=True)
    names = dict(keys) | {_value(i + 1): column.name for i, column in enumerate(columns)}
    _joined(panel, names, drop=("Time", "Value #A"))
    for column in columns:
        look = [DynamicConfigValue(id_val="unit", value=column.unit)]
        if column.gauge:
            look += [
                DynamicConfigValue(id_val="custom.cellOptions", value={"type": "gauge", "mode": "basic"}),
                DynamicConfigValue(id_val="min", value=0),
                DynamicConfigValue(id_val="max", value=1),
            ]
        panel.override_by_name(column.name, look)
    queries = [Query(first), *(Query(column.expr) for column in columns)]
    return _filled(panel, title, text, "short", queries, WIDTH, {}, as_table=True)


def _joined(panel: Panel, names: dict[str, str], drop: Sequence[str]) -> None:
    """One row for each set of labels, the queries' values beside each other under ``names``."""
    panel.with_transformation(models.DataTransformerConfig(id_val="merge", options={}))
    order = {name: index for index, name in enumerate(names)}
    options = {"renameByName": names, "indexByName": order, "excludeByName": dict.fromkeys(drop, True)}
    panel.with_transformation(models.DataTransformerConfig(id_val="organize", options=options))


def _filled(
    panel: Panel,
    title: str,
    text: str,
    unit: str,
    queries: Sequence[Query],
    span: int,
    limits: Mapping[str, float],
    *,
    instant: bool = False,
    as_table: bool = False,
) -> Panel:
    panel.title(title).description(text).unit(unit).datasource(SOURCE).span(span).height(HEIGHT)
    for index, query in enumerate(queries):
        target = prometheus.Dataquery().expr(query.expr).ref_id(_letter(index)).datasource(SOURCE)
        target.legend_format(query.legend or "__auto")
        if instant or as_table:
            target.instant()
        else:
            target.range()
        if as_table:
            target.format(prometheus_models.PromQueryFormat.TABLE)
        panel.with_target(target)
    for name, value in limits.items():
        getattr(panel, name)(value)
    return panel


def _letter(index: int) -> str:
    return chr(ord("A") + index)


def _value(index: int) -> str:
    return f"Value #{_letter(index)}"


# ----------------------------------------------------------------------------------------------------------- dashboards


def board(uid: str, title: str, text: str, *, since: str = "now-3h") -> dashboard.Dashboard:
    """Return an empty dashboard that knows its data source and the way to the others."""
    return (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(text)
        .tags([TAG])
        .time(since, "now")
        .refresh("30s")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .link(
            dashboard.DashboardLink("QLoRA")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .include_vars(include_vars=True)
            .keep_time(keep_time=True)
        )
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    )


def choice(name: str, label: str, query: str, *, several: bool) -> dashboard.QueryVariable:
    """Return a variable with the values of a label; ``several``: any number of them, at first all."""
    variable = (
        dashboard.QueryVariable(name)
        .label(label)
        .query(query)
        .datasource(SOURCE)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
    )
    if several:
        everything = VariableOption(text="All", value="$__all", selected=True)
        variable.multi(multi=True).include_all(include_all=True).all_value(".*").current(everything)
    return variable


class AnnotationQuery(Builder[models.AnnotationQuery]):
    """Annotations where a series begins: with ``unless … offset`` in the expression one point each."""

    def __init__(self, name: str, expr: str, title: str, colour: str) -> None:
        query = dashboard.AnnotationQuery().name(name).datasource(SOURCE).enable(enable=True).icon_color(colour)
        self._query = query.expr(expr)
        self._title = title

    def build(self) -> models.AnnotationQuery:
        found = _Annotation(**vars(self._query.build()))
        found.more = {"titleFormat": self._title, "textFormat": "{{namespace}}/{{job}}", "step": "15s"}
        return found


class _Annotation(models.AnnotationQuery):
    """With what the Prometheus data source reads beside the schema's fields."""

    more: dict[str, object]

    def to_json(self) -> dict[str, object]:
        return {**super().to_json(), **self.more}
