"""Time of a rank by what it does: Load, Data, Train, Evaluate, Checkpoint, Publish."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, Metric

from qlora_api import metrics_catalogue


class Sections:
    """A collector that counts the section at work up to now, so that a rank that hangs shows where it hangs.

    Args:
        metric: of the catalogue; its last label is the section.
        labels: values of the other labels.

    """

    def __init__(self, metric: metrics_catalogue.Metric, labels: Sequence[str]) -> None:
        self._metric, self._labels = metric, labels
        self._spent: dict[str, float] = {}
        self._open: list[str] = []
        self._since = time.monotonic()
        self._lock = threading.Lock()

    def enter(self, section: str) -> None:
        """Begin a section; the one around it stands still until :meth:`leave`."""
        with self._lock:
            self._settle()
            self._open.append(section)
            self._spent.setdefault(section, 0.0)

    def leave(self) -> None:
        """End the innermost section."""
        with self._lock:
            self._settle()
            self._open.pop()

    def seconds(self) -> dict[str, float]:
        """Time of each section up to now."""
        with self._lock:
            self._settle()
            return dict(self._spent)

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._metric.name, self._metric.meaning, labels=self._metric.labels)
        for section, seconds in self.seconds().items():
            family.add_metric([*self._labels, section], seconds)
        yield family

    def _settle(self) -> None:
        now = time.monotonic()
        if self._open:
            self._spent[self._open[-1]] += now - self._since
        self._since = now
