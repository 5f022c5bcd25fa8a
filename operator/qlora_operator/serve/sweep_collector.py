"""Metrics of QLoRASweeps, read from the cache when they are scraped."""

from __future__ import annotations

import json
import logging
from collections import Counter as Tally
from collections.abc import Iterator
from typing import Any

from prometheus_client.core import GaugeMetricFamily, Metric

from qlora_api.metrics_catalogue import OPERATOR
from qlora_operator.state.sweep_cache import SweepCache

log = logging.getLogger(__name__)

COUNTED = "qlora_operator_sweeps"
OF_EACH = ("qlora_sweep_trials", "qlora_sweep_gpu_seconds", "qlora_sweep_budget_gpu_seconds", "qlora_sweep_best_value")
HOUR = 3600
STATES = ("running", "suspended", "succeeded", "failed")
Json = dict[str, Any]


class SweepsCollector:
    """Reads the sweeps; those that are over are counted, and have no series of their own."""

    def __init__(self, sweeps: SweepCache) -> None:
        self._sweeps = sweeps

    def collect(self) -> Iterator[Metric]:
        families = {
            name: GaugeMetricFamily(name, OPERATOR[name].meaning, labels=OPERATOR[name].labels)
            for name in (COUNTED, *OF_EACH)
        }
        counts: Tally[tuple[str, str, str]] = Tally()
        for (namespace, name), stored in self._sweeps:
            try:
                sweep = json.loads(stored.body)
                status = sweep.get("status") or {}
                counts[namespace, status.get("state", "Pending"), status.get("reason", "Pending")] += 1
                for family, labels, value in _samples(sweep, status):
                    families[family].add_metric((name, namespace, *labels), value)
            except (ArithmeticError, KeyError, TypeError, ValueError) as error:
                log.debug("%s/%s cannot be counted: %r", namespace, name, error)
        for labels, count in counts.items():
            families[COUNTED].add_metric(labels, count)
        yield from families.values()


def _samples(sweep: Json, status: Json) -> Iterator[tuple[str, tuple[str, ...], float]]:
    """Give family, further labels and value of each sample of a sweep that is not over."""
    if "completionTime" in status:
        return
    trials = status.get("trials") or {}
    for state in STATES:
        yield "qlora_sweep_trials", (state.capitalize(),), float(trials.get(state, 0))
    yield "qlora_sweep_gpu_seconds", (), float(status.get("gpuSeconds", 0))
    if budget := sweep["spec"].get("budgetGpuHours"):
        yield "qlora_sweep_budget_gpu_seconds", (), float(budget) * HOUR
    if best := status.get("best"):
        yield "qlora_sweep_best_value", (), float(best["value"])
