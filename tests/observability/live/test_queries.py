"""Every query of dashboards and alerts finds series in a real Prometheus, and every series is in the catalogue."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from demo.live_metrics import GPU_SERIES, NAME, OTHERS, RULES, TEAM, LiveMetrics
from fixtures import skip_unless_ci
from qlora_api.metrics_catalogue import CATALOGUE, OPERATOR, TRAINER
from services.binaries import ToolMissingError

DASHBOARDS = sorted((Path(__file__).parents[3] / "charts" / "qlora-operator" / "dashboards").glob("*.json"))
VARIABLES = {
    "$__rate_interval": "1m",
    "$__interval": "2s",
    "$__range": "5m",
    "$namespace": f"{TEAM}|{OTHERS}",
    "$job": NAME,
    "$price": "2.50",
}
NOT_HERE = {
    "qlora_operator_reconcile_errors_total": "nothing failed",
    "qlora_operator_objects_skipped_total": "every object could be read, and what is zero is not shown",
    "qlora_loss_scale": "nothing computes in Float16",
    "qlora_skipped_steps": "nothing computes in Float16",
}
"""Series that a healthy operator, and trainers on a CPU, have not."""
SELECTOR = re.compile(r"(qlora_[a-z0-9_]+)(\{[^}]*\})?")


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    try:
        started = LiveMetrics(tmp_path_factory.mktemp("live"))
        with started:
            started.play()
            yield started
    except ToolMissingError as error:
        skip_unless_ci(str(error))


def filled(expression):
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


def test_every_panel_and_annotation_finds_series(live):
    asked = [
        (path.stem, panel["title"], filled(target["expr"]))
        for path in DASHBOARDS
        for panel in json.loads(path.read_text())["panels"]
        for target in panel.get("targets", ())
        if not any(name in target["expr"] for name in NOT_HERE)
    ]
    assert len(asked) > 50
    assert [query for query in asked if not finds(live, query[-1])] == []


def finds(live, expression):
    found = live.at_the_end(expression)
    return [s for s in found if s["value"][1] != "NaN"]


def test_annotations_mark_where_attempts_begin_and_end(live):
    board = json.loads(next(p for p in DASHBOARDS if p.stem == "job").read_text())
    texts = {a["name"]: filled(a["expr"]) for a in board["annotations"]["list"]}
    ends = texts["Ends"].replace(f'job=~"{NAME}"', 'job=~"large"')
    for expression, label in ((texts["Attempts"], "attempt"), (ends, "reason")):
        found = live.prometheus._get(
            "query_range", query=expression, start=str(live.ended_at - 240), end=str(live.ended_at), step="2"
        )["result"]
        assert found, expression
        assert all(label in series["metric"] for series in found)
        assert max(len(series["values"]) for series in found) <= 4, "one point each, not a line"


def test_every_variable_has_values(live):
    for path in DASHBOARDS:
        for variable in json.loads(path.read_text())["templating"]["list"]:
            if variable["type"] == "query":
                series, label = re.fullmatch(r"label_values\((.+), (\w+)\)", filled(variable["query"])).groups()
                assert {s["metric"][label] for s in live.at_the_end(series)} & {TEAM, NAME}


def test_alerts_read_series_that_exist(live):
    for rule in yaml.safe_load(RULES.read_text())["groups"][0]["rules"]:
        for name, selector in SELECTOR.findall(rule["expr"]):
            if name not in NOT_HERE:
                assert live.at_the_end(f"last_over_time({name}{selector}[5m])"), (rule["alert"], name, selector)


def test_what_went_wrong_raised_its_alert(live):
    firing = {
        (a["labels"]["alertname"], a["labels"].get("job")) for a in live.prometheus.alerts() if a["state"] == "firing"
    }
    assert firing >= {
        ("QLoRAJobStalled", "stalls"),
        ("QLoRAJobOutOfMemoryLoop", "large"),
        ("QLoRAJobLossNotFinite", "diverges"),
        ("QLoRAPublishFailing", "rejected"),
    }
    assert not {name for name, _ in firing} & {"QLoRAOperatorDown", "QLoRAOperatorNotReconciling"}


def test_trainers_and_operator_export_what_the_catalogue_has_and_nothing_else(live):
    known = {name: metric for metric in CATALOGUE for name in metric.series}
    scraped = {"instance", "job", "pod", "node", "le", "__name__"}
    found = {}
    names = live.prometheus._get("label/__name__/values")
    exported = {name for name in names if name.startswith("qlora_")}
    assert exported - known.keys() == set()
    missing = known.keys() - exported - NOT_HERE.keys()
    assert missing == set()
    for name in sorted(exported):
        for labels in live.prometheus._get("series", **{"match[]": name}):
            found.setdefault(name, set()).update(labels.keys() - scraped)
        # A label without a value is none to Prometheus: a CPU has no UUID.
        assert found[name] | ({"uuid"} & set(known[name].labels)) == set(known[name].labels) - scraped, name
    assert {name.partition("{")[0] for name in GPU_SERIES} <= set(TRAINER)
    assert set(OPERATOR)
