"""The chart's monitoring objects: off by default, and when on exactly what was generated."""

from __future__ import annotations

import json

import pytest
import yaml

from charts.helm import CHART, Helm
from fixtures import skip_unless_ci
from services.binaries import ToolMissingError, find_or_build
from services.tools import HELM

ON = {"enabled": True, "labels": {"release": "prometheus"}}


@pytest.fixture(scope="module")
def helm(tmp_path_factory):
    try:
        return Helm(find_or_build(HELM), tmp_path_factory.mktemp("helm"))
    except ToolMissingError as error:
        skip_unless_ci(str(error))


def rendered(helm, **metrics):
    return [o for o in helm.render({"metrics": metrics}) if o]


def dashboards(objects):
    return {
        name: o for o in objects if o["kind"] == "ConfigMap" for name in o.get("data") or () if name.endswith(".json")
    }


def test_nothing_of_the_prometheus_operator_or_grafana_is_there_by_default(helm):
    objects = rendered(helm)
    assert "PrometheusRule" not in {o["kind"] for o in objects}
    assert dashboards(objects) == {}


def test_dashboards_are_what_was_generated_under_the_sidecars_label(helm):
    found = dashboards(rendered(helm, dashboards={"enabled": True, "annotations": {"grafana_folder": "ML"}}))
    files = {f"qlora-{path.name}": path.read_text() for path in (CHART / "dashboards").glob("*.json")}
    assert found.keys() == files.keys()
    for name, config in found.items():
        assert json.loads(config["data"][name]) == json.loads(files[name])
        assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert config["metadata"]["annotations"] == {"grafana_folder": "ML"}
        assert len(json.dumps(config)) < 1_000_000, "a ConfigMap holds no more"


def test_names_do_not_meet(helm):
    objects = rendered(helm, dashboards={"enabled": True}, prometheusRule=ON, serviceMonitor=ON, podMonitor=ON)
    names = [(o["kind"], o["metadata"].get("namespace"), o["metadata"]["name"]) for o in objects]
    assert len(names) == len(set(names))


def test_the_rule_has_all_alerts_and_links_that_lead_to_their_pages(helm):
    (rule,) = (o for o in rendered(helm, prometheusRule=ON) if o["kind"] == "PrometheusRule")
    assert rule["spec"] == yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())
    assert rule["metadata"]["labels"]["release"] == "prometheus"
    there = {**ON, "runbooks": "https://docs.example/runbooks/"}
    (rule,) = (o for o in rendered(helm, prometheusRule=there) if o["kind"] == "PrometheusRule")
    for one in rule["spec"]["groups"][0]["rules"]:
        assert one["annotations"]["runbook_url"] == f"https://docs.example/runbooks/{one['alert']}.md"
