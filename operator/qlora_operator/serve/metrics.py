"""The operator's own metrics: what it does, and what it knows of jobs. Names and texts are the catalogue's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics

from qlora_api.metrics_catalogue import OPERATOR, MetricKind
from qlora_api.status import Reason
from qlora_operator.serve.job_collector import JobsCollector
from qlora_operator.serve.sweep_collector import SweepsCollector
from qlora_operator.state.cache import ObjectCache
from qlora_operator.state.skip_reasons import NOT_OWNED, UNREADABLE
from qlora_operator.state.sweep_cache import SweepCache

_KINDS: dict[MetricKind, Any] = {MetricKind.COUNTER: Counter, MetricKind.HISTOGRAM: Histogram}


class Metrics:
    """Metrics that the reconciler records, and those that are read from the cache when it is scraped."""

    def __init__(self, cache: ObjectCache, sweeps: SweepCache | None = None) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # series of the library, which nobody reads
        self.registry = CollectorRegistry()
        self._reconcile = self._made("qlora_operator_reconcile_seconds")
        self._queue = self._made("qlora_operator_queue_wait_seconds")
        self._errors = self._made("qlora_operator_reconcile_errors")
        self._attempts = self._made("qlora_operator_attempts")
        self._requests = self._made("qlora_operator_api_requests")
        self._request_seconds = self._made("qlora_operator_api_request_seconds")
        self._tasks = self._made("qlora_operator_task_failures")
        self._skipped = self._made("qlora_operator_objects_skipped")
        self._rejected = self._made("qlora_operator_reports_rejected")
        self._contested = self._made("qlora_operator_contested_jobs")
        for reason in Reason:
            self._attempts.labels(reason.value)  # from 0 on: a rate sees no series that begins at 1
        self._corrections: Mapping[tuple[str, str], float] = {}
        self.operates = False
        """True if this process is the leader, and not a standby."""
        collector = JobsCollector(cache, corrections=lambda: self._corrections, operates=lambda: self.operates)
        self.registry.register(collector)
        self.registry.register(SweepsCollector(sweeps or SweepCache()))

    def _made(self, name: str) -> Any:
        metric = OPERATOR[name]
        more = {"buckets": metric.buckets} if metric.kind is MetricKind.HISTOGRAM else {}
        return _KINDS[metric.kind](metric.name, metric.meaning, metric.labels, registry=self.registry, **more)

    def reconciled(self, seconds: float) -> None:
        self._reconcile.observe(seconds)

    def waited(self, seconds: float) -> None:
        self._queue.observe(seconds)

    def reconcile_failed(self, kind: str) -> None:
        self._errors.labels(kind).inc()

    def show_task(self, task: str) -> None:
        """Count a task's failures from 0 on."""
        self._tasks.labels(task)

    def show_kind(self, kind: str) -> None:
        """Count the objects of a kind that are left out from 0 on."""
        for reason in (NOT_OWNED, UNREADABLE):
            self._skipped.labels(kind, reason)

    def task_failed(self, task: str) -> None:
        self._tasks.labels(task).inc()

    def skipped(self, kind: str, reason: str) -> None:
        """An object of a watch was left out."""
        self._skipped.labels(kind, reason).inc()

    def report_rejected(self) -> None:
        self._rejected.inc()

    def job_contested(self) -> None:
        """A waiting Job was left to another release of the operator."""
        self._contested.inc()

    def attempt_ended(self, reason: str) -> None:
        self._attempts.labels(reason).inc()

    def corrected(self, corrections: Mapping[tuple[str, str], float]) -> None:
        """By GPU and quantization."""
        self._corrections = corrections

    def request(self, verb: str, code: int, seconds: float) -> None:
        self._requests.labels(verb, str(code)).inc()
        self._request_seconds.labels(verb).observe(seconds)
