"""Names in documents, dashboards and alerts exist: metrics, fields of a job, values of the chart, panels."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qlora_api.metrics_catalogue import CATALOGUE, OPERATOR, RANK, TRAINER, MetricKind
from qlora_api.status import Reason
from qlora_cli.manifest import crd_schema

REPOSITORY = Path(__file__).parents[2]
CHART = REPOSITORY / "charts" / "qlora-operator"
DASHBOARDS = sorted((CHART / "dashboards").glob("*.json"))
RULES = CHART / "files" / "alerts.yaml"
RUNBOOKS = sorted((REPOSITORY / "docs" / "runbooks").glob("*.md"))
SERIES = {name: metric for metric in CATALOGUE for name in metric.series}
LABELS = {label for metric in CATALOGUE for label in metric.labels} | {"le", "pod", "node", "uuid", "UUID", "gpu"}
UNITS = {
    "_bytes": "bytes",
    "_seconds": "seconds",
    "_per_second": "per second",
    "_timestamp_seconds": "seconds since 1970",
}


def panels(path):
    found = json.loads(path.read_text())["panels"]
    return [panel for panel in found if panel["type"] != "row"]


def expressions(path):
    """Every expression of a dashboard: panels, annotations, variables."""
    board = json.loads(path.read_text())
    found = [target["expr"] for panel in panels(path) for target in panel["targets"]]
    found += [one["expr"] for one in board["annotations"].get("list", [])]
    return found + [v["query"] for v in board["templating"]["list"] if v["type"] == "query"]


def test_generated_files_are_fresh():
    command = [sys.executable, "-m", "observability.generate", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


# ----------------------------------------------------------------------------------------------------------- catalogue


@pytest.mark.parametrize("metric", CATALOGUE, ids=lambda m: m.name)
def test_names_end_in_their_base_unit(metric):
    assert re.fullmatch(r"qlora_[a-z0-9_]+", metric.name)
    assert not metric.name.endswith(("_total", "_count", "_sum", "_bucket"))
    for ending, unit in UNITS.items():
        if metric.unit == unit and "gpu_seconds" not in metric.name:
            assert metric.name.endswith(ending), metric
    assert not re.search(r"_(ms|millis|minutes|hours|mb|gb|kib|mib|gib|percent)(_|$)", metric.name)
    assert metric.meaning
    assert not metric.meaning.endswith(".")
    assert (metric.kind is MetricKind.HISTOGRAM) == bool(metric.buckets)


def test_trainers_name_job_namespace_and_rank_and_nobody_names_free_text():
    assert all(metric.labels[:3] == RANK for metric in TRAINER.values())
    closed = {
        "state",
        "reason",
        "component",
        "section",
        "direction",
        "verb",
        "code",
        "kind",
        "device",
        "uuid",
        "gpu",
        "quantization",
        "sweep",
        "task",
    }
    assert {label for metric in CATALOGUE for label in metric.labels} <= {*RANK, *closed}


def test_names_are_exported_once():
    assert len(SERIES) == sum(len(metric.series) for metric in CATALOGUE)
    assert not TRAINER.keys() & OPERATOR.keys()


# ---------------------------------------------------------------------------------------------- dashboards and alerts


def names_in(expression):
    return set(re.findall(r"qlora_[a-z0-9_]+", expression))


@pytest.mark.parametrize("path", [*DASHBOARDS, RULES], ids=lambda p: p.stem)
def test_every_metric_in_an_expression_is_in_the_catalogue(path):
    rules = yaml.safe_load(RULES.read_text())["groups"][0]["rules"]
    found = expressions(path) if path.suffix == ".json" else [rule["expr"] for rule in rules]
    assert found
    for expression in found:
        assert names_in(expression) <= SERIES.keys(), expression
        grouped = re.findall(r"(?:by|on|group_left|group_right) \(([^)]*)\)", expression)
        assert {label.strip() for group in grouped for label in group.split(",")} - {""} <= LABELS, expression
        for reasons in re.findall(r'reason=~?"([^"]+)"', expression):
            pattern = re.compile(reasons)
            assert any(pattern.fullmatch(reason.value) for reason in Reason), expression


def test_every_metric_is_on_a_dashboard_or_in_an_alert_or_said_to_be_for_joins():
    used = {name for path in DASHBOARDS for e in expressions(path) for name in names_in(e)} | names_in(
        RULES.read_text()
    )
    unused = {metric.name for metric in CATALOGUE if not used & set(metric.series)}
    assert unused <= {
        "qlora_epoch",
        "qlora_restarts",
        "qlora_device_info",
        "qlora_operator_api_request_seconds",
        *(name for name in OPERATOR if name.startswith("qlora_job_final_")),
    }


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda p: p.stem)
def test_panels_have_units_descriptions_and_the_chosen_data_source(path):
    board = json.loads(path.read_text())
    assert {v["name"] for v in board["templating"]["list"]} >= {"datasource", "namespace"}
    titles = [panel["title"] for panel in panels(path)]
    assert len(titles) >= 10
    for panel in panels(path):
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
        refs = [target["refId"] for target in panel["targets"]]
        assert len(refs) == len(set(refs))


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda p: p.stem)
def test_panels_lie_side_by_side_and_not_on_each_other(path):
    cells = set()
    for panel in json.loads(path.read_text())["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not own & cells, panel["title"]
        cells |= own


# ----------------------------------------------------------------------------------------------------------- documents


def test_the_reference_has_every_metric():
    text = (REPOSITORY / "docs" / "reference" / "metrics.md").read_text()
    for metric in CATALOGUE:
        name = metric.series[0] if metric.kind is MetricKind.COUNTER else metric.name
        assert f"| `{name}` | {metric.kind} | {metric.unit} |" in text


@pytest.mark.parametrize("path", RUNBOOKS, ids=lambda p: p.stem)
def test_a_page_speaks_of_what_is_there(path):
    text = path.read_text()
    schema = crd_schema.sweep_root() if path.stem.startswith("QLoRASweep") else crd_schema.root()
    assert names_in(text) <= SERIES.keys() | {metric.name for metric in CATALOGUE}
    for field in set(re.findall(r"`(spec\.[A-Za-z.]+)", text)):
        assert crd_schema.way_to(field.rstrip("."), schema), field
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    for value in set(re.findall(r"`((?:trainer|metrics|networkPolicy|resources|rbac)\.[A-Za-z.]+)", text)):
        here = values
        for key in value.split("."):
            assert key in here, value
            here = here[key]
    titles = {panel["title"] for board in DASHBOARDS for panel in panels(board)}
    titles |= {json.loads(board.read_text())["title"] for board in DASHBOARDS}
    titles |= {row["title"] for board in DASHBOARDS for row in json.loads(board.read_text())["panels"]}
    for named in re.findall(r"\*([A-Z][^*\n]+?)\*", re.sub(r"\s+", " ", text)):
        assert named in titles | {"Targets"}, named
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (path.parent / link).exists(), link
