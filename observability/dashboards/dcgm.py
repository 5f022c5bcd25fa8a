"""Joining with DCGM's exporter, which knows GPUs by the pods that hold them.

Its own labels ``pod`` and ``namespace`` name the trainer's pod where a scrape honours them; where it does not,
Prometheus renames them to ``exported_pod`` and ``exported_namespace``, and ``pod`` is the exporter's own. One
expression reads both.
"""

from __future__ import annotations

from observability.dashboards.panels import JOB


def by_trainer_pod(metric: str) -> str:
    """Return a metric of DCGM's exporter, ``pod`` and ``namespace`` being the trainer's in either style."""
    found = metric
    for label in ("pod", "namespace"):
        found = f'label_replace({found}, "{label}", "$1", "exported_{label}", "(.+)")'
    return found


def of_job(metric: str, *more: str, selector: str = JOB) -> str:
    """Return a metric of DCGM's exporter for the GPUs of a job, by job, pod and ``more`` of DCGM's labels."""
    kept = ", ".join(("namespace", "job", "pod", *more))
    owner = f"max by (namespace, pod, job) (qlora_attempt{{{selector}}} ^ 0)"
    return f"max by ({kept}) ({by_trainer_pod(metric)} * on (namespace, pod) group_left (job) {owner})"
