"""Every metric that trainers and operator export: one place for name, type, unit, labels and meaning.

Both take names, texts, labels and buckets from here; ``docs/reference/metrics.md`` is generated from it, and a test
holds what the processes serve against it. Names and units follow Prometheus' conventions: base units, the unit last in
the name. Labels are bounded by the jobs that exist, their ranks, and closed lists.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType


class MetricKind(StrEnum):
    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


class Exporter(StrEnum):
    TRAINER = "trainer"
    """Each rank, on a port of its own."""
    OPERATOR = "operator"


@dataclass(frozen=True)
class Metric:
    """One family of series."""

    name: str
    """Name of the family, as client libraries take it; the series of a counter end with ``_total``."""
    kind: MetricKind
    unit: str
    """In words; ``""`` for what has none."""
    meaning: str
    """One sentence; the HELP text."""
    labels: tuple[str, ...]
    exporter: Exporter
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets; empty for other types."""
    gpu: bool = False
    """Only where the rank has a GPU."""

    @property
    def series(self) -> tuple[str, ...]:
        """Names of the series in queries."""
        match self.kind:
            case MetricKind.COUNTER:
                return (f"{self.name}_total",)
            case MetricKind.HISTOGRAM:
                return tuple(f"{self.name}_{suffix}" for suffix in ("bucket", "sum", "count"))
            case MetricKind.GAUGE:
                return (self.name,)


RANK = ("job", "namespace", "rank")
"""Labels of every metric of a trainer. ``job`` and ``namespace`` are the QLoRAJob's; a scrape adds ``pod``."""
JOB = ("job", "namespace")
SWEEP = ("sweep", "namespace")
STEP_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
CALL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
QUEUE_BUCKETS = (0.001, 0.01, 0.1, 0.5, 1, 5, 10, 30, 60, 120)


def _trainer(
    name: str, kind: MetricKind, unit: str, meaning: str, *more: str, buckets: tuple[float, ...] = (), gpu: bool = False
) -> Metric:
    return Metric(name, kind, unit, meaning, (*RANK, *more), Exporter.TRAINER, buckets, gpu)


def _operator(
    name: str, kind: MetricKind, unit: str, meaning: str, *labels: str, buckets: tuple[float, ...] = ()
) -> Metric:
    return Metric(name, kind, unit, meaning, labels, Exporter.OPERATOR, buckets)


_G, _C, _H = MetricKind.GAUGE, MetricKind.COUNTER, MetricKind.HISTOGRAM

_TRAINER = (
    # Where the training stands. The same on all ranks, so that any of them may be asked.
    _trainer("qlora_attempt", _G, "", "Number of this attempt"),
    _trainer("qlora_restarts", _G, "attempts", "Attempts before this one that count against policy.maxRestarts"),
    _trainer("qlora_step", _G, "steps", "Optimizer steps done, over all attempts"),
    _trainer("qlora_steps_planned", _G, "steps", "Optimizer steps of the whole job"),
    _trainer("qlora_epoch", _G, "epochs", "Passes over the training rows, with a fraction"),
    _trainer("qlora_loss", _G, "nats", "Mean training loss of the last step's target tokens"),
    _trainer("qlora_eval_loss", _G, "nats", "Mean loss of the evaluation rows' target tokens; absent before the first"),
    _trainer("qlora_learning_rate", _G, "", "Learning rate of the last step"),
    _trainer("qlora_gradient_norm", _G, "", "Global L2 norm of the gradient before clipping"),
    _trainer("qlora_loss_scale", _G, "", "Loss scale in Float16; absent with other compute types"),
    _trainer("qlora_skipped_steps", _G, "steps", "Steps whose update was skipped because Float16 overflowed"),
    # Speed.
    _trainer("qlora_tokens", _C, "tokens", "Tokens that all ranks have trained on in this attempt, without padding"),
    _trainer(
        "qlora_tokens_per_second",
        _G,
        "tokens per second",
        "Tokens per second over all ranks, without padding, smoothed",
    ),
    _trainer("qlora_step_seconds", _H, "seconds", "Time of an optimizer step", buckets=STEP_BUCKETS),
    _trainer("qlora_data_wait_seconds", _C, "seconds", "Time the rank waited for its next batch"),
    _trainer(
        "qlora_section_seconds",
        _C,
        "seconds",
        "Time of this rank by section: Load, Data, Train, Evaluate, Checkpoint, Publish; nested ones count once",
        "section",
    ),
    _trainer(
        "qlora_heartbeat_timestamp_seconds",
        _G,
        "seconds since 1970",
        "Time of the rank's last heartbeat: it entered a section, or finished a step, a batch or a file",
    ),
    _trainer(
        "qlora_flops_per_token",
        _G,
        "floating-point operations",
        "Floating-point operations per token on a frozen base, forward and backward, without recomputation",
    ),
    # Memory.
    _trainer(
        "qlora_memory_component_bytes",
        _G,
        "bytes",
        "Measured memory of this rank by component, as in status.memory",
        "component",
    ),
    _trainer(
        "qlora_memory_predicted_bytes",
        _G,
        "bytes",
        "Predicted memory of a rank by component; absent without a prediction",
        "component",
    ),
    _trainer("qlora_host_memory_resident_bytes", _G, "bytes", "Resident memory of the rank's process"),
    _trainer("qlora_host_memory_available_bytes", _G, "bytes", "Available memory of the host"),
    _trainer("qlora_device_info", _G, "", "Always 1; the labels identify the device of the rank", "device", "uuid"),
    _trainer(
        "qlora_device_peak_flops_per_second",
        _G,
        "floating-point operations per second",
        "Peak dense BF16 performance of the GPU, from its data sheet; absent for an unknown GPU",
        gpu=True,
    ),
    _trainer("qlora_gpu_memory_allocated_bytes", _G, "bytes", "GPU memory held by tensors", gpu=True),
    _trainer("qlora_gpu_memory_reserved_bytes", _G, "bytes", "GPU memory held by PyTorch's allocator", gpu=True),
    _trainer(
        "qlora_gpu_memory_peak_bytes",
        _G,
        "bytes",
        "Highest qlora_gpu_memory_allocated_bytes of this attempt",
        gpu=True,
    ),
    _trainer("qlora_gpu_memory_free_bytes", _G, "bytes", "Free memory of the device, by NVML", gpu=True),
    _trainer("qlora_gpu_memory_total_bytes", _G, "bytes", "Memory of the device, by NVML", gpu=True),
    _trainer(
        "qlora_gpu_pcie_bytes_per_second",
        _G,
        "bytes per second",
        "PCIe traffic of the device just before the scrape, by NVML, including that of a paging optimizer",
        "direction",
        gpu=True,
    ),
)

_OPERATOR = (
    # All jobs together.
    _operator("qlora_operator_jobs", _G, "jobs", "QLoRAJobs by state and reason", "namespace", "state", "reason"),
    _operator(
        "qlora_operator_gpus",
        _G,
        "GPUs",
        "GPUs of unfinished jobs: Held by pods on nodes, or Waiting. Ranks, if trainers have no GPUs",
        "namespace",
        "state",
    ),
    _operator(
        "qlora_operator_gpu_seconds",
        _C,
        "GPU-seconds",
        "GPU time of attempts, counted from when all their pods are ready, added up at each scrape",
        "namespace",
    ),
    _operator(
        "qlora_operator_pending_seconds",
        _G,
        "seconds",
        "Longest time that a job has been waiting, by reason",
        "namespace",
        "reason",
    ),
    _operator(
        "qlora_operator_memory_correction",
        _G,
        "",
        "Measured over predicted peak memory, learned from successful jobs and applied to plans",
        "gpu",
        "quantization",
    ),
    _operator("qlora_operator_attempts", _C, "attempts", "Attempts that ended, by reason", "reason"),
    # Each job. Also what its ranks said last, since nobody scrapes finished pods.
    _operator("qlora_job_state", _G, "", "Always 1; the labels have the state of the job", *JOB, "state", "reason"),
    _operator("qlora_job_attempts", _G, "attempts", "Attempts of a job that ended, by reason", *JOB, "reason"),
    _operator(
        "qlora_job_attempt_end_timestamp_seconds",
        _G,
        "seconds since 1970",
        "End of the newest attempt of a job with this reason",
        *JOB,
        "reason",
    ),
    _operator(
        "qlora_job_deadline_timestamp_seconds",
        _G,
        "seconds since 1970",
        "Time at which policy.activeDeadlineSeconds will end a running job; absent without one, and while it waits",
        *JOB,
    ),
    _operator(
        "qlora_job_gpu_seconds",
        _G,
        "GPU-seconds",
        "GPU time of a job's attempts so far, counted from when all their pods are ready",
        *JOB,
    ),
    _operator(
        "qlora_job_expected_gpu_seconds",
        _G,
        "GPU-seconds",
        "GPU time that Prepare estimates for the training, within a factor of 1.5; absent if the GPU is unknown",
        *JOB,
    ),
    _operator(
        "qlora_job_budget_gpu_seconds",
        _G,
        "GPU-seconds",
        "policy.budgetGpuHours of a job; absent without a budget, and for finished jobs",
        *JOB,
    ),
    _operator("qlora_job_final_loss", _G, "nats", "Training loss of a finished job's last step", *JOB),
    _operator("qlora_job_final_eval_loss", _G, "nats", "Best evaluation loss of a finished job", *JOB),
    _operator("qlora_job_final_steps", _G, "steps", "Optimizer steps of a finished job", *JOB),
    _operator(
        "qlora_job_final_tokens_per_second", _G, "tokens per second", "Speed of a finished job, over all ranks", *JOB
    ),
    _operator(
        "qlora_job_final_memory_bytes",
        _G,
        "bytes",
        "Highest measured memory of a rank of a finished job, by component",
        *JOB,
        "component",
    ),
    # Sweeps.
    _operator("qlora_operator_sweeps", _G, "sweeps", "Sweeps by state and reason", "namespace", "state", "reason"),
    _operator("qlora_sweep_trials", _G, "trials", "Trials of a sweep that is not over, by state", *SWEEP, "state"),
    _operator(
        "qlora_sweep_gpu_seconds", _G, "GPU-seconds", "GPU time of all trials of a sweep that is not over", *SWEEP
    ),
    _operator(
        "qlora_sweep_budget_gpu_seconds",
        _G,
        "GPU-seconds",
        "budgetGpuHours of a sweep that is not over; absent without a budget",
        *SWEEP,
    ),
    _operator(
        "qlora_sweep_best_value",
        _G,
        "as the objective's metric",
        "Best value of the objective's metric so far, of trials that have succeeded; absent before the first",
        *SWEEP,
    ),
    # The operator itself.
    _operator("qlora_operator_leading", _G, "", "1 while this replica is active, 0 while it is on standby"),
    _operator(
        "qlora_operator_reconcile_seconds",
        _H,
        "seconds",
        "Time of one reconcile, calls to the API server included",
        buckets=CALL_BUCKETS,
    ),
    _operator(
        "qlora_operator_queue_wait_seconds",
        _H,
        "seconds",
        "Time that a job waits in the work queue before its reconcile",
        buckets=QUEUE_BUCKETS,
    ),
    _operator(
        "qlora_operator_reconcile_errors",
        _C,
        "reconciles",
        "Reconciles that failed and will be retried, by kind of error",
        "kind",
    ),
    _operator(
        "qlora_operator_task_failures",
        _C,
        "failures",
        "Failures of background tasks of the operator, which are restarted, by task",
        "task",
    ),
    _operator(
        "qlora_operator_objects_skipped",
        _C,
        "objects",
        "Objects of watches and lists that were skipped: NotOwned (labels without the controller), or Unreadable",
        "kind",
        "reason",
    ),
    _operator(
        "qlora_operator_contested_jobs",
        _C,
        "Jobs",
        "Waiting Jobs left unchanged because another release of the operator created them with other settings",
    ),
    _operator(
        "qlora_operator_reports_rejected",
        _C,
        "answers",
        "Responses of pods to GET /progress that are not progress reports",
    ),
    _operator(
        "qlora_operator_uncounted_jobs",
        _G,
        "jobs",
        "Jobs with an invalid number in status, which is omitted here",
        "namespace",
    ),
    _operator(
        "qlora_operator_api_requests",
        _C,
        "requests",
        "Requests to the API server by verb and status code (0: no answer)",
        "verb",
        "code",
    ),
    _operator(
        "qlora_operator_api_request_seconds",
        _H,
        "seconds",
        "Time of a request to the API server",
        "verb",
        buckets=CALL_BUCKETS,
    ),
)

TRAINER: Mapping[str, Metric] = MappingProxyType({m.name: m for m in _TRAINER})
"""By name, in the order of the documentation."""
OPERATOR: Mapping[str, Metric] = MappingProxyType({m.name: m for m in _OPERATOR})
CATALOGUE: tuple[Metric, ...] = (*_TRAINER, *_OPERATOR)
