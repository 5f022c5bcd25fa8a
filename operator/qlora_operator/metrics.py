"""The operator's own metrics, and the final figures of jobs whose pods nobody scrapes any more."""

from __future__ import annotations

import json
from collections import Counter as Tally
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric

from qlora_operator.store import Store

RECONCILE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
QUEUE_BUCKETS = (0.001, 0.01, 0.1, 0.5, 1, 5, 10, 30, 60, 120)
FINAL = {
    "qlora_job_final_loss": ("Training loss of a finished job's last step, in nats", "loss"),
    "qlora_job_final_eval_loss": ("Best evaluation loss of a finished job, in nats", "bestEvalLoss"),
    "qlora_job_final_steps": ("Optimizer steps of a finished job", "step"),
    "qlora_job_final_tokens_per_second": ("Speed of a finished job, over all ranks", "tokensPerSecond"),
}
"""Name: what it says, and the field of status.progress it comes from."""


class Metrics:
    """What the reconciler tells, and what the store shows when it is scraped."""

    def __init__(self, store: Store) -> None:
        self.registry = CollectorRegistry()
        self._reconcile = Histogram(
            "qlora_operator_reconcile_seconds",
            "Time of one reconcile, calls to the API server included",
            buckets=RECONCILE_BUCKETS,
            registry=self.registry,
        )
        self._queue = Histogram(
            "qlora_operator_queue_wait_seconds",
            "Time between a job's waking and its reconcile",
            buckets=QUEUE_BUCKETS,
            registry=self.registry,
        )
        self._errors = Counter(
            "qlora_operator_reconcile_errors",
            "Reconciles that failed and are tried again, by kind of error",
            ("kind",),
            registry=self.registry,
        )
        self._attempts = Counter(
            "qlora_operator_attempts", "Attempts that ended, by reason", ("reason",), registry=self.registry
        )
        self._requests = Counter(
            "qlora_operator_api_requests",
            "Requests to the API server by verb and status code (0: no answer)",
            ("verb", "code"),
            registry=self.registry,
        )
        self._request_seconds = Histogram(
            "qlora_operator_api_request_seconds",
            "Time of a request to the API server",
            ("verb",),
            buckets=RECONCILE_BUCKETS,
            registry=self.registry,
        )
        self.registry.register(_StoreCollector(store))

    def reconciled(self, seconds: float) -> None:
        self._reconcile.observe(seconds)

    def waited(self, seconds: float) -> None:
        self._queue.observe(seconds)

    def reconcile_failed(self, kind: str) -> None:
        self._errors.labels(kind).inc()

    def attempt_ended(self, reason: str) -> None:
        self._attempts.labels(reason).inc()

    def request(self, verb: str, code: int, seconds: float) -> None:
        self._requests.labels(verb, str(code)).inc()
        self._request_seconds.labels(verb).observe(seconds)


class _StoreCollector:
    """Counts jobs when it is asked, so that the figures cannot drift from what is known."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def collect(self) -> Iterator[Metric]:
        jobs: Tally[tuple[str, str, str]] = Tally()
        families = {
            name: GaugeMetricFamily(name, text, labels=("job", "namespace")) for name, (text, _) in FINAL.items()
        }
        memory = GaugeMetricFamily(
            "qlora_job_final_memory_bytes",
            "Highest measured memory of a rank of a finished job, by component",
            labels=("job", "namespace", "component"),
        )
        for (namespace, name), known in self._store:
            if known.job is None:
                continue
            status = json.loads(known.job.body).get("status") or {}
            jobs[namespace, status.get("state", "Pending"), status.get("reason", "Pending")] += 1
            if "completionTime" not in status:
                continue
            progress = status.get("progress") or {}
            for metric, (_, field) in FINAL.items():
                if field in progress:
                    families[metric].add_metric((name, namespace), float(progress[field]))
            for component, size in ((status.get("memory") or {}).get("measured") or {}).items():
                memory.add_metric((name, namespace, component), size)
        counted = GaugeMetricFamily(
            "qlora_operator_jobs", "QLoRAJobs by state and reason", labels=("namespace", "state", "reason")
        )
        for labels, count in jobs.items():
            counted.add_metric(labels, count)
        yield counted
        yield from families.values()
        yield memory
