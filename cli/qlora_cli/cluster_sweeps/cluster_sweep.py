"""Cut what a command shows of a sweep out of the API object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_cli.jobs.job_view import OVER, is_seen, time
from qlora_cli.text import figures

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from qlora_cli.kube.api_client import Object

NEEDS_ATTENTION = frozenset({"Refused", "BudgetReached", "NotUnderstood"})
"""Reasons of a sweep that do not go away by waiting."""
UNSEEN = "no operator has processed the sweep yet"


@dataclass(frozen=True, slots=True)
class ClusterSweep:
    """One sweep of a cluster."""

    name: str
    namespace: str
    uid: str
    state: str
    reason: str
    message: str
    counts: Mapping[str, int]
    """Trials by state, and their total."""
    metric: str
    best: str
    """Name of the best trial that has succeeded; empty: none has."""
    best_value: str
    best_parameters: Mapping[str, str]
    adapter: Mapping[str, str]
    """uri, manifestUri, manifestSha256 of the best trial."""
    gpu_hours: str
    budget: str
    """spec.budgetGpuHours; empty: none."""
    created: datetime | None
    started: datetime | None
    ended: datetime | None
    suspend: bool
    deleting: bool

    @property
    def is_finished(self) -> bool:
        return self.state in OVER

    @property
    def needs_attention(self) -> bool:
        return not self.is_finished and self.reason in NEEDS_ATTENTION

    @property
    def trials(self) -> str:
        """Return how many trials have ended, of all: ``3/18``."""
        total = self.counts.get("total", 0)
        return f"{self.counts.get('succeeded', 0) + self.counts.get('failed', 0)}/{total}" if total else ""

    @property
    def used(self) -> str:
        """Return the GPU-hours that were used, and those of the budget: ``12.4/40``."""
        hours = figures.rate(self.gpu_hours)
        return f"{hours}/{self.budget}" if self.budget else hours

    @property
    def best_figure(self) -> str:
        """Return the best value of the objective, as tables show it."""
        return objective_figure(self.metric, self.best_value) if self.best else ""


def cluster_sweep(body: Object) -> ClusterSweep:
    """Return a sweep of an API object, of this version or a later one."""
    meta, spec, status = body["metadata"], body.get("spec") or {}, body.get("status") or {}
    best = status.get("best") or {}
    return ClusterSweep(
        name=meta["name"],
        namespace=meta.get("namespace", ""),
        uid=meta.get("uid", ""),
        state=status.get("state") or "Pending",
        reason=status.get("reason") or "Pending",
        message=_message(body) if is_seen(body) else UNSEEN,
        counts=status.get("trials") or {},
        metric=(spec.get("objective") or {}).get("metric") or "EvalLoss",
        best=best.get("name") or "",
        best_value=best.get("value") or "",
        best_parameters=best.get("parameters") or {},
        adapter=best.get("adapter") or {},
        gpu_hours=status.get("gpuHours") or "0",
        budget=spec.get("budgetGpuHours") or "",
        created=time(meta.get("creationTimestamp")),
        started=time(status.get("startTime")),
        ended=time(status.get("completionTime")),
        suspend=bool(spec.get("suspend")),
        deleting="deletionTimestamp" in meta,
    )


def _message(body: Object) -> str:
    """Return the message of Ready, which is that of the state; of Degraded where the operator does not understand."""
    found = {c.get("type"): c for c in body["status"]["conditions"]}
    degraded = found.get("Degraded") or {}
    spoken = degraded if degraded.get("status") == "True" and "Ready" not in found else found.get("Ready") or {}
    return str(spoken.get("message") or "")


def objective_figure(metric: str, value: str) -> str:
    """Return a value of an objective's metric in few characters."""
    if metric == "TokensPerSecond":
        return figures.rate(value)
    if metric == "PeakMemory":
        return figures.memory(int(value)) if value.isdecimal() else value
    return figures.loss(value)
