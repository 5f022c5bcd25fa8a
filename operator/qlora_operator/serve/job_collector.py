"""Figures of all jobs, counted from the cache when they are asked for, so that they cannot drift from what is known.

One pass over the jobs' JSON for each scrape: types are not checked here, the API server has done that. What is no
number is left out, and its job is counted as such: no job takes the figures of the others away.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from qlora_api.metrics_catalogue import OPERATOR, MetricKind
from qlora_operator.serve.sweep_collector import COUNTED, OF_EACH
from qlora_operator.state.cache import Known, ObjectCache
from qlora_operator.state.observed import PodSnapshot

log = logging.getLogger(__name__)

FINAL = {
    "qlora_job_final_loss": "loss",
    "qlora_job_final_eval_loss": "bestEvalLoss",
    "qlora_job_final_steps": "step",
    "qlora_job_final_tokens_per_second": "tokensPerSecond",
}
"""Name, and the field of status.progress it comes from."""
SWEEPS = (COUNTED, *OF_EACH)
HOUR = 3600
SHOWN_SECONDS = 24 * HOUR
"""Time for which a finished job keeps its own series; by then Prometheus has scraped them."""
Json = dict[str, Any]


class JobsCollector:
    """Reads the cache.

    Args:
        cache: what is known.
        clock: seconds since 1970.
        corrections: of predicted memory, by GPU and quantization.
        operates: whether this process operates, and does not stand by.

    """

    def __init__(
        self,
        cache: ObjectCache,
        clock: Callable[[], float] = time.time,
        corrections: Callable[[], Mapping[tuple[str, str], float]] = dict,
        operates: Callable[[], bool] = lambda: True,
    ) -> None:
        self._cache, self._clock, self._corrections, self._operates = cache, clock, corrections, operates
        self._used: dict[str, float] = {}
        """GPU-seconds of each job, by UID, when they were last added up."""
        self._total: defaultdict[str, float] = defaultdict(float)
        """GPU-seconds by namespace, since this process began."""
        self._first = True
        """Until a scrape while this process operates: before, the cache does not hold all jobs yet."""

    def collect(self) -> Iterator[Metric]:
        families = _Families()
        now = self._clock()
        used: dict[str, float] = {}
        for (namespace, name), known in self._cache:
            if known.job is None:
                continue
            uid, figures = known.job.uid, _Figures()
            try:
                used[uid] = _add_job(figures, namespace, name, json.loads(known.job.body), known, now)
            except (ArithmeticError, KeyError, TypeError, ValueError) as error:
                log.debug("%s/%s cannot be counted: %r", namespace, name, error)
                used[uid], figures.complete = self._used.get(uid, 0.0), False
            families.add(namespace, figures)
            self._count(namespace, uid, used[uid])
        self._used, self._first = used, self._first and not self._operates()
        families.add_counted()
        for namespace, seconds in self._total.items():
            families["qlora_operator_gpu_seconds"].add_metric((namespace,), seconds)
        for labels, factor in self._corrections().items():
            families["qlora_operator_memory_correction"].add_metric(labels, factor)
        families["qlora_operator_leading"].add_metric((), float(self._operates()))
        yield from families.all()

    def _count(self, namespace: str, uid: str, used: float) -> None:
        """Add the GPU time of a job since the last call; time before this process began is not counted again."""
        before = self._used.get(uid, used if self._first else 0.0)
        self._total[namespace] += max(0.0, used - before)


class _Figures:
    """Samples of one job by family, and its part of what is counted over several jobs."""

    def __init__(self) -> None:
        self.samples: list[tuple[str, tuple[str, ...], float]] = []
        self.complete = True
        """True if nothing had to be left out."""
        self.jobs: Tally[tuple[str, str, str]] = Tally()
        self.gpus: Tally[tuple[str, str]] = Tally()
        self.waits: dict[tuple[str, str], float] = {}

    def add(self, name: str, labels: tuple[str, ...], value: object, scale: float = 1) -> None:
        """Add a sample; note where its value is no number, and leave it out."""
        try:
            number = float(str(value)) * scale
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            self.samples.append((name, labels, number))
        else:
            self.complete = False


class _Families:
    """One family for each gauge that is read from the cache, and what is counted over several jobs."""

    def __init__(self) -> None:
        self._families: dict[str, Any] = {
            name: (CounterMetricFamily if metric.kind is MetricKind.COUNTER else GaugeMetricFamily)(
                name, metric.meaning, labels=metric.labels
            )
            for name, metric in OPERATOR.items()
            if name not in SWEEPS and (metric.kind is MetricKind.GAUGE or name == "qlora_operator_gpu_seconds")
        }
        self._total = _Figures()
        self.uncounted: Tally[tuple[str, ...]] = Tally()

    def __getitem__(self, name: str) -> Any:
        return self._families[name]

    def add(self, namespace: str, figures: _Figures) -> None:
        """Add the figures of one job."""
        self.uncounted[(namespace,)] += not figures.complete
        for name, labels, value in figures.samples:
            self[name].add_metric(labels, value)
        self._total.jobs.update(figures.jobs)
        self._total.gpus.update(figures.gpus)
        for key, waited in figures.waits.items():
            self._total.waits[key] = max(waited, self._total.waits.get(key, 0.0))

    def add_counted(self) -> None:
        for name, counted in (
            ("qlora_operator_jobs", self._total.jobs),
            ("qlora_operator_gpus", self._total.gpus),
            ("qlora_operator_pending_seconds", self._total.waits),
            ("qlora_operator_uncounted_jobs", self.uncounted),
        ):
            for labels, value in counted.items():
                self[name].add_metric(labels, value)

    def all(self) -> Iterator[Metric]:
        yield from self._families.values()


def _add_job(figures: _Figures, namespace: str, name: str, job: Json, known: Known, now: float) -> float:
    """Add one job's figures; its GPU-seconds."""
    status = job.get("status") or {}
    state, reason = status.get("state", "Pending"), status.get("reason", "Pending")
    figures.jobs[namespace, state, reason] += 1
    attempts = status.get("attempts") or []
    used = float(status.get("earlierGpuSeconds", 0)) + sum(_gpu_seconds(attempt, now) for attempt in attempts)
    if "completionTime" in status and now - _seconds(status["completionTime"]) > SHOWN_SECONDS:
        return used
    figures.add("qlora_job_state", (name, namespace, state, reason), 1)
    _add_ends(figures, namespace, name, attempts)
    figures.add("qlora_job_gpu_seconds", (name, namespace), used)
    if hours := (status.get("prepared") or {}).get("expectedGpuHours"):
        figures.add("qlora_job_expected_gpu_seconds", (name, namespace), hours, HOUR)
    if "completionTime" in status:
        _add_final(figures, namespace, name, status)
        return used
    _add_limits(figures, namespace, name, job, now)
    _add_gpus(figures, namespace, job["spec"], attempts, known)
    if state == "Pending" and not job["spec"].get("suspend"):
        figures.waits[namespace, reason] = max(0.0, now - _waits_since(job, status))
    return used


def _add_ends(figures: _Figures, namespace: str, name: str, attempts: list[Json]) -> None:
    counts: Tally[str] = Tally()
    newest: dict[str, float] = {}
    for attempt in attempts:
        if "endTime" in attempt and "reason" in attempt:
            reason = attempt["reason"]
            counts[reason] += 1
            newest[reason] = max(_seconds(attempt["endTime"]), newest.get(reason, 0.0))
    for reason, count in counts.items():
        figures.add("qlora_job_attempts", (name, namespace, reason), count)
        figures.add("qlora_job_attempt_end_timestamp_seconds", (name, namespace, reason), newest[reason])


def _add_final(figures: _Figures, namespace: str, name: str, status: Json) -> None:
    progress = status.get("progress") or {}
    for metric, field in FINAL.items():
        if field in progress:
            figures.add(metric, (name, namespace), progress[field])
    for component, size in ((status.get("memory") or {}).get("measured") or {}).items():
        figures.add("qlora_job_final_memory_bytes", (name, namespace, component), size)


def _add_limits(figures: _Figures, namespace: str, name: str, job: Json, now: float) -> None:
    policy, parallelism = job["spec"].get("policy") or {}, job["spec"].get("parallelism") or {}
    status = job.get("status") or {}
    attempts = status.get("attempts") or []
    runs = bool(attempts) and "runningTime" in attempts[-1] and "endTime" not in attempts[-1]
    if runs and "activeDeadlineSeconds" in policy:
        earlier = status.get("earlierGpuSeconds", 0) / (
            parallelism.get("workers", 1) * parallelism.get("gpusPerWorker", 1)
        )
        left = policy["activeDeadlineSeconds"] - earlier - sum(_running_seconds(a, now) for a in attempts)
        figures.add("qlora_job_deadline_timestamp_seconds", (name, namespace), now + left)
    if "budgetGpuHours" in policy:
        budget = float(policy["budgetGpuHours"]) * HOUR
        figures.add("qlora_job_budget_gpu_seconds", (name, namespace), budget)


def _add_gpus(figures: _Figures, namespace: str, spec: Json, attempts: list[Json], known: Known) -> None:
    """GPUs of the open attempt: those of pods on nodes are held, the others waited for."""
    if not attempts or "endTime" in attempts[-1]:
        return
    world_size = attempts[-1]["worldSize"]
    each = min(world_size, (spec.get("parallelism") or {}).get("gpusPerWorker", 1))
    pods = sum(_holds(pod, attempts[-1]["number"]) for pod in known.own_pods())
    held = min(world_size, pods * each)
    figures.gpus[namespace, "Held"] += held
    figures.gpus[namespace, "Waiting"] += world_size - held


def _holds(pod: PodSnapshot, attempt: int) -> bool:
    return pod.attempt == attempt and bool(pod.node) and not pod.ended


def _gpu_seconds(attempt: Json, now: float) -> float:
    """As ``history.gpu_seconds``, by which budgets go."""
    return float(attempt["worldSize"]) * _running_seconds(attempt, now)


def _running_seconds(attempt: Json, now: float) -> float:
    """As ``deadline.active_seconds``."""
    if "runningTime" not in attempt:
        return 0.0
    ended = _seconds(attempt["endTime"]) if "endTime" in attempt else now
    return max(0.0, ended - _seconds(attempt["runningTime"]))


def _waits_since(job: Json, status: Json) -> float:
    """Return when a job last ran, or was created."""
    ended = [attempt["endTime"] for attempt in status.get("attempts") or () if "endTime" in attempt]
    return _seconds(max(ended, default=job["metadata"]["creationTimestamp"]))


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
