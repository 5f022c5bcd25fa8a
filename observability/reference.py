"""docs/reference/metrics.md: the catalogue as a document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from observability.dashboards.dcgm import by_trainer_pod, of_job
from qlora_api.metrics_catalogue import OPERATOR, TRAINER, Metric, MetricKind

_HEAD = """\
<!-- Written by 'make dashboards' from api/qlora_api/metrics_catalogue.py. Do not edit. -->

# Metrics

Trainers and the operator serve Prometheus metrics. This page lists all of them; a test compares it
with what they serve. Units are base units; counters end in `_total`, histograms have `_bucket`, `_sum` and `_count`.

**Labels.** `job` and `namespace` are those of the QLoRAJob, from trainers and operator alike, so that both can be
joined. A scrape must keep them (`honorLabels: true`), as the chart's PodMonitor and ServiceMonitor do. The
PodMonitor adds `pod`, `container`, `endpoint` and `node`; a retry is a new pod, so sum or take the maximum over `pod`:
`max by (namespace, job) (qlora_loss)`. No label holds free text: jobs that exist, their ranks, and closed lists
(`reason`, `state`, `component`, `section`, `direction`, `verb`, `code`, `kind`) bound their number.

The series of a job disappear a day after it has finished. `qlora_operator_jobs` counts the job as long as it exists,
and `last_over_time(qlora_job_final_loss[30d])` returns its last value.

An unknown value is absent, not zero: `qlora_eval_loss` appears with the first evaluation, and
`qlora_memory_predicted_bytes` only if there is a prediction.
"""
_DCGM = """\
## Together with DCGM

DCGM's exporter has metrics of GPUs (utilization, power, errors) with the pod that uses them, and trainers' metrics
have the job of the pod. Join them by `namespace` and `pod`. Depending on `honorLabels` of the scrape of DCGM's
exporter, the trainer's pod is in `pod` and `namespace`, or in `exported_pod` and `exported_namespace`. This query
handles both:

```promql
{either}
```

The GPUs of one job, with its name, for any metric of DCGM's (the right side is 1 for each trainer pod):

```promql
{joined}
```

Rank by rank: `qlora_device_info` has the GPU's `uuid`, which DCGM's exporter calls `UUID`.

```promql
{by_rank}
```

## Numbers made of several

| | |
| --- | --- |
| share of the cards' peak | `max by (namespace, job) (qlora_tokens_per_second) * max by (namespace, job) \
(qlora_flops_per_token) / sum by (namespace, job) (qlora_device_peak_flops_per_second)` |
| seconds left | `(max by (namespace, job) (qlora_steps_planned) - max by (namespace, job) (qlora_step)) * \
max by (namespace, job) (rate(qlora_step_seconds_sum{{rank="0"}}[5m]) / \
rate(qlora_step_seconds_count{{rank="0"}}[5m]))` |
| share of time by section | `avg by (namespace, job, section) (rate(qlora_section_seconds_total[5m]))` |
| effective share of GPU time | `sum by (namespace) (rate(qlora_section_seconds_total{{section="Train"}}[1h])) / \
sum by (namespace) (rate(qlora_operator_gpu_seconds_total[1h]))` |
| predicted over measured peak | `max by (namespace, job) (qlora_memory_predicted_bytes{{component="peak"}}) / \
max by (namespace, job) (qlora_memory_component_bytes{{component="peak"}})` |
"""


def reference() -> str:
    """Return the document."""
    return "\n".join([_HEAD, *_section("Trainers", _TRAINERS, TRAINER), *_section("Operator", _OF, OPERATOR), _dcgm()])


_TRAINERS = (
    "Each rank serves `/metrics` on a port of its own: 9400 + rank in a pod; with `qlora run` any free port, named in\n"
    "`runs/<job>/attempt-<n>/rank-<r>.port`. All have the labels `job`, `namespace` and `rank`."
)
_OF = "One process, on `metrics.port` (9090)."


def _section(title: str, text: str, metrics: Mapping[str, Metric]) -> Iterator[str]:
    yield from (
        f"## {title}",
        "",
        text,
        "",
        "| metric | type | unit | labels | meaning |",
        "| --- | --- | --- | --- | --- |",
    )
    for metric in metrics.values():
        yield _row(metric)
    yield ""


def _row(metric: Metric) -> str:
    own = [label for label in metric.labels if _says(metric, label)]
    name = metric.series[0] if metric.kind is MetricKind.COUNTER else metric.name
    where = " GPU only." if metric.gpu else ""
    labels = ", ".join(f"`{label}`" for label in own)
    return f"| `{name}` | {metric.kind} | {metric.unit} | {labels} | {metric.meaning}.{where} |"


def _says(metric: Metric, label: str) -> bool:
    """Return whether a label belongs in this row, and not once above the section."""
    return metric.name not in TRAINER or label not in ("job", "namespace", "rank")


def _dcgm() -> str:
    utilization = "DCGM_FI_DEV_GPU_UTIL"
    info = 'label_replace(qlora_device_info, "UUID", "$1", "uuid", "(.+)")'
    owner = f"max by (UUID, namespace, job, rank) ({info})"
    return _DCGM.format(
        either=by_trainer_pod(utilization),
        joined=of_job(utilization, "gpu", selector=""),
        by_rank=f"max by (UUID) ({utilization}) * on (UUID) group_right () {owner}",
    )
