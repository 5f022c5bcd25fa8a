"""Alert rules: what somebody has to look at. Each has a page in docs/runbooks, and fires in a test.

Labels are summed away down to namespace, job and what the alert is about, so that a restart of the operator or a new
pod is no new alert. What ended is told by time stamps, not by counters: they survive restarts of whoever counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

SILENT_SECONDS = 600
"""A batch that takes longer than this is no batch."""
RECENT_SECONDS = 3600
"""Age up to which the end of an attempt raises an alert."""
STARVED = 0.2
"""Share of time that ranks wait for rows."""
NEAR = 0.9
"""Share of a budget."""
QUEUE_SECONDS = 60
TASK_FAILURES = 3
"""In a quarter of an hour. A task that always fails does so thirty times."""
RUNBOOKS = "docs/runbooks/"
"""The chart puts the address of the repository before it."""
_JOB = "by (namespace, job)"
_SWEEP = "by (namespace, sweep)"
_ENDED = "max by (namespace, job, reason) (qlora_job_attempt_end_timestamp_seconds{{reason=~{}}})"


@dataclass(frozen=True)
class Alert:
    """One rule."""

    name: str
    expr: str
    lasts: str
    """Time for which the expression must hold before the alert fires, as a Prometheus duration."""
    severity: Literal["critical", "warning"]
    summary: str
    """Sentence that names the job and the problem, with Prometheus' templates."""
    description: str
    """Meaning of the alert in one sentence, and the first thing to do."""

    def rule(self) -> dict[str, Any]:
        return {
            "alert": self.name,
            "expr": self.expr,
            "for": self.lasts,
            "labels": {"severity": self.severity},
            "annotations": {
                "summary": self.summary,
                "description": self.description,
                "runbook_url": f"{RUNBOOKS}{self.name}.md",
            },
        }


def _recently(reasons: str) -> str:
    """Ends for one of these reasons, as seconds since then."""
    return f"time() - {_ENDED.format(reasons)} < {RECENT_SECONDS}"


_WORKS = 'sum by (namespace, job, rank) (rate(qlora_section_seconds_total{section=~"Data|Train"}[5m])) > 0.5'
_MEMORY = '"OutOf(Device|Host)Memory"'
_BEST = f"max {_JOB} (max_over_time(qlora_step[30m]{{}}))"
_PLANNED = f"max {_JOB} (qlora_steps_planned)"
_STEP_RATE = 'rate(qlora_step_seconds_{}{{rank="0"}}[15m])'
_LEFT = (
    f"({_PLANNED} - max {_JOB} (qlora_step)) * max {_JOB} ({_STEP_RATE.format('sum')} / {_STEP_RATE.format('count')})"
)
_ERRORS = "sum(rate(qlora_operator_reconcile_errors_total[10m]))"
_RECONCILES = "sum(rate(qlora_operator_reconcile_seconds_count[10m]))"
_QUEUE = "histogram_quantile(0.99, sum by (le) (rate(qlora_operator_queue_wait_seconds_bucket[10m])))"
WHO = "{{ $labels.namespace }}/{{ $labels.job }}"

ALERTS: Sequence[Alert] = (
    Alert(
        "QLoRAJobStalled",
        f"max by (namespace, job, rank) (time() - qlora_heartbeat_timestamp_seconds) > {SILENT_SECONDS}"
        f" and on (namespace, job, rank) {_WORKS}"
        f" or {_recently(chr(34) + 'Stalled' + chr(34))}",
        "0m",
        "critical",
        f"{WHO}{{{{ with $labels.rank }}}}, rank {{{{ . }}}},{{{{ end }}}} makes no progress",
        "A rank sent no heartbeat for ten minutes, or an attempt was ended because of it. Its GPUs "
        "are idle: look for a node with a broken network or GPU.",
    ),
    Alert(
        "QLoRAJobOutOfMemoryLoop",
        f"sum {_JOB} (qlora_job_attempts{{reason=~{_MEMORY}}}) >= 2 and on (namespace, job) {_recently(_MEMORY)}",
        "0m",
        "warning",
        f"{WHO} ran out of memory {{{{ $value }}}} times",
        "Smaller micro-batches did not help, or the host runs out of memory. Find out which memory "
        "ran out, and compare it with the prediction.",
    ),
    Alert(
        "QLoRAJobLossNotFinite",
        f"{_recently(chr(34) + 'NonFiniteLoss' + chr(34))}"
        f' or max {_JOB} (abs(qlora_gradient_norm{{rank="0"}}) == Inf)'
        f' or max {_JOB} (qlora_gradient_norm{{rank="0"}} != qlora_gradient_norm{{rank="0"}})',
        "0m",
        "critical",
        f"The loss or gradient of {WHO} is not finite",
        "If the loss was the cause, the update was not applied. The usual remedy is a smaller "
        "learning rate, or Float32 as compute type.",
    ),
    Alert(
        "QLoRAJobNoProgress",
        f"({_BEST.format('')} <= {_BEST.format(' offset 30m')}) < {_PLANNED} and on (namespace, job) qlora_step",
        "10m",
        "warning",
        f"{WHO} is at step {{{{ $value }}}} as it was half an hour ago",
        "Attempts run without getting further than earlier ones: each ends before its first "
        "checkpoint, or evaluation takes all the time.",
    ),
    Alert(
        "QLoRAJobDataStarved",
        f"avg {_JOB} (rate(qlora_data_wait_seconds_total[10m])) > {STARVED}",
        "15m",
        "warning",
        f"Ranks of {WHO} wait for rows {{{{ $value | humanizePercentage }}}} of the time",
        "GPUs are idle while rows are read. Check the disk of the cache.",
    ),
    Alert(
        "QLoRAPublishFailing",
        _recently('"StorageFailed|AdapterRejected"'),
        "0m",
        "critical",
        f"{WHO} cannot publish its result: {{{{ $labels.reason }}}}",
        "Object storage cannot be reached or is full, or the publish gate rejects the adapter. The "
        "training is not lost: checkpoints are kept.",
    ),
    Alert(
        "QLoRAJobBudgetNear",
        f"max {_JOB} (qlora_job_gpu_seconds) / max {_JOB} (qlora_job_budget_gpu_seconds) > {NEAR}",
        "0m",
        "warning",
        f"{WHO} has used {{{{ $value | humanizePercentage }}}} of its GPU-hours",
        "When they are used up, the job saves a checkpoint and is suspended. Raise policy.budgetGpuHours to continue.",
    ),
    Alert(
        "QLoRAJobDeadlineNear",
        f"max {_JOB} (qlora_job_deadline_timestamp_seconds) - time() < on (namespace, job) {_LEFT}",
        "10m",
        "warning",
        f"{WHO} will not finish before its deadline in {{{{ $value | humanizeDuration }}}}",
        "At the current speed, the remaining steps take longer than policy.activeDeadlineSeconds "
        "allows. The job fails at the deadline.",
    ),
    Alert(
        "QLoRASweepBudgetNear",
        f"max {_SWEEP} (qlora_sweep_gpu_seconds) / max {_SWEEP} (qlora_sweep_budget_gpu_seconds) > {NEAR}",
        "0m",
        "warning",
        "{{ $labels.namespace }}/{{ $labels.sweep }} has used {{ $value | humanizePercentage }} of its GPU-hours",
        "When they are used up, running trials save checkpoints and the sweep is suspended. Raise spec.budgetGpuHours "
        "to continue.",
    ),
    Alert(
        "QLoRAOperatorDown",
        "absent(qlora_operator_leading == 1)",
        "5m",
        "critical",
        "No operator serves QLoRAJobs",
        "The operator does not run or is not scraped, or none of its replicas leads. Running "
        "trainings continue; no job starts or resumes, and status is not updated.",
    ),
    Alert(
        "QLoRAOperatorNotReconciling",
        f"{_ERRORS} > 0.5 * {_RECONCILES} or {_QUEUE} > {QUEUE_SECONDS}",
        "10m",
        "critical",
        "The operator falls behind",
        "Most reconciles fail, or jobs wait a minute in the work queue. Check the kinds of errors and the API server.",
    ),
    Alert(
        "QLoRAOperatorTaskFailing",
        f"sum by (task) (increase(qlora_operator_task_failures_total[15m])) > {TASK_FAILURES}",
        "0m",
        "critical",
        "The operator's task {{ $labels.task }} fails repeatedly",
        "It is restarted each time, and the other tasks continue. Its work for jobs is late or "
        "missing; the operator's log has the error.",
    ),
)


def rules() -> dict[str, Any]:
    """Return the content of a rule file."""
    return {"groups": [{"name": "qlora-operator", "rules": [alert.rule() for alert in ALERTS]}]}
