"""Metrics of sweeps."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from qlora_api.metrics_catalogue import OPERATOR
from qlora_operator.serve.sweep_collector import SweepsCollector
from qlora_operator.state.sweep_cache import SweepCache

STATUS = {
    "state": "Running",
    "reason": "Searching",
    "trials": {"running": 2, "succeeded": 1},
    "gpuSeconds": 90,
    "best": {"name": "search-1", "value": "1.25"},
}


@pytest.fixture
def scraped():
    cache, registry = SweepCache(), CollectorRegistry()
    registry.register(SweepsCollector(cache))

    def take(name="search", **status):
        meta = {"name": name, "namespace": "team", "uid": name, "resourceVersion": "1"}
        cache.take({"metadata": meta, "spec": {"budgetGpuHours": "2"}, "status": {**STATUS, **status}})

    return take, registry


def test_a_sweep_that_is_not_over_has_series_of_its_own(scraped):
    take, registry = scraped
    take()
    of_it = {"sweep": "search", "namespace": "team"}
    assert registry.get_sample_value("qlora_sweep_trials", of_it | {"state": "Running"}) == 2
    assert registry.get_sample_value("qlora_sweep_trials", of_it | {"state": "Failed"}) == 0
    assert registry.get_sample_value("qlora_sweep_gpu_seconds", of_it) == 90
    assert registry.get_sample_value("qlora_sweep_budget_gpu_seconds", of_it) == 7200
    assert registry.get_sample_value("qlora_sweep_best_value", of_it) == 1.25
    for family in registry.collect():
        for sample in family.samples:
            assert tuple(sample.labels) == OPERATOR[family.name].labels


def test_a_sweep_that_is_over_is_only_counted(scraped):
    take, registry = scraped
    take(state="Succeeded", reason="Completed", completionTime="2026-01-01T12:00:00Z")
    assert {s.name for family in registry.collect() for s in family.samples} == {"qlora_operator_sweeps"}


def test_a_figure_that_is_none_takes_no_series_of_other_sweeps_away(scraped):
    take, registry = scraped
    take("odd", gpuSeconds="many")
    take()
    assert registry.get_sample_value("qlora_sweep_gpu_seconds", {"sweep": "search", "namespace": "team"}) == 90
