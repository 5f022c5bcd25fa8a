"""Serve the time of a rank by what it does: Load, Data, Train, Evaluate, Checkpoint, Publish."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, Metric

from qlora_api import metrics_catalogue
from qlora_trainer.liveness.heartbeat import Heartbeat


class PhaseCollector:
    """Collector that counts the phase at work up to now, so that a rank that hangs shows where it hangs.

    Args:
        metric: of the catalogue; its last label is the phase.
        labels: values of the other labels.
        heartbeat: has the clock.

    """

    def __init__(self, metric: metrics_catalogue.Metric, labels: Sequence[str], heartbeat: Heartbeat) -> None:
        self._metric, self._labels, self._heartbeat = metric, labels, heartbeat

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._metric.name, self._metric.meaning, labels=self._metric.labels)
        for phase, seconds in self._heartbeat.phase_seconds().items():
            family.add_metric([*self._labels, phase], seconds)
        yield family
