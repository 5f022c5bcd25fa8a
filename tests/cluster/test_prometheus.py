"""The helpers' own promises about Prometheus: it scrapes, finds new targets, and evaluates rules."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING

import pytest

from cluster.processes import ComponentError
from fixtures import skip_unless_ci
from services.binaries import ToolMissingError
from services.http_server import serving
from services.prometheus import Prometheus, PromtoolError, promtool, scrape

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

METRICS = b"# HELP work_done_total Work.\n# TYPE work_done_total counter\nwork_done_total 7\n"
RULE = {"alert": "WorkIsDone", "expr": "work_done_total > 5", "annotations": {"summary": "done"}}


@pytest.fixture(autouse=True)
def _is_installed():
    try:
        promtool("--version")
    except ToolMissingError as error:
        skip_unless_ci(str(error))


@pytest.fixture
def exporter() -> Iterator[str]:
    """Address of a server whose every page is METRICS."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(METRICS)

        def log_message(self, *_):
            pass

    with serving(HTTPServer(("127.0.0.1", 0), Handler)) as url:
        yield url.removeprefix("http://")


def test_it_scrapes_and_alerts(tmp_path: Path, exporter: str):
    rules = tmp_path / "rules.yaml"
    rules.write_text(json.dumps({"groups": [{"name": "work", "rules": [RULE]}]}))
    assert "1 rules found" in promtool("check", "rules", rules)
    with Prometheus(tmp_path / "prometheus", [scrape("worker", exporter)], [rules]) as prometheus:
        (sample,) = prometheus.wait_for("work_done_total")
        assert (sample.value, sample.labels["job"]) == (7, "worker")
        prometheus.wait_for('ALERTS{alertname="WorkIsDone", alertstate="firing"}')
        (alert,) = prometheus.alerts()
        assert alert["annotations"] == {"summary": "done"}
        assert prometheus.query("absent_metric") == []
        with pytest.raises(ValueError, match="parse error"):
            prometheus.query("sum(")


def test_it_follows_targets_in_a_file(tmp_path: Path, exporter: str):
    targets = tmp_path / "targets.json"
    targets.write_text("[]")
    config = {"job_name": "pods", "file_sd_configs": [{"files": [str(targets)]}]}
    with Prometheus(tmp_path / "prometheus", [config]) as prometheus:
        assert prometheus.targets() == []
        targets.write_text(json.dumps([{"targets": [exporter], "labels": {"rank": "0"}}]))
        (sample,) = prometheus.wait_for('work_done_total{rank="0"}', seconds=30)
        assert sample.value == 7


def test_errors_are_told(tmp_path: Path):
    with (
        pytest.raises(ComponentError, match=r"prometheus ended with 2:(.|\n)*unknown_key"),
        Prometheus(tmp_path, [{"job_name": "x", "unknown_key": 1}]),
    ):
        pass
    with pytest.raises(PromtoolError, match="no help text"):
        promtool("check", "metrics", stdin="work_done_total 7\n")
