"""Summarize a job before it is created, with a plan for the GPU that the cluster's nodes have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_api.job import QLoRAJob
from qlora_cli.kube.errors import ClusterError
from qlora_cli.memory_plan import plan_view
from qlora_cli.memory_plan.plan_job import PlanOptions, plan_of
from qlora_memory import Plan
from qlora_memory.gpus import GPU_PRODUCT, known_gpu

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from qlora_cli.kube.api_client import Object
    from qlora_cli.kube.target import Cluster

    Labels = Mapping[str, str]

PLANNED = ("GPU", "Batch", "Sequences", "Memory", "Speed", "Time")
"""Rows of 'qlora plan' that belong to the summary."""
UNKNOWN_GPU = "not planned: the nodes do not say which GPU they have; name it with --gpu"
UNKNOWN_PROFILE = "not planned: the GPU of profile {} is not known here; name it with --gpu"


def node_labels(cluster: Cluster) -> list[Labels]:
    """Return the labels of each node; nothing for whoever may not list nodes."""
    try:
        nodes = cluster.api.list("/api/v1/nodes")[0]
    except ClusterError:
        return []
    return [node["metadata"].get("labels") or {} for node in nodes]


def gpu_of_nodes(labels: Iterable[Labels], job: QLoRAJob) -> str | None:
    """Return the smallest GPU of the nodes that a job may run on, by its name in ``qlora plan``; None: not known.

    The label is that of NVIDIA's GPU feature discovery. The nodes of a profile are not known here.
    """
    if job.spec.scheduling.profile is not None:
        return None
    wanted = job.spec.scheduling.node_selector
    fitting = [of for of in labels if all(of.get(name) == value for name, value in wanted.items())]
    products = {of[GPU_PRODUCT] for of in fitting if GPU_PRODUCT in of} or {*filter(None, [wanted.get(GPU_PRODUCT)])}
    known = [gpu for product in products if (gpu := known_gpu(product)) is not None]
    return min(known, key=lambda gpu: gpu.memory_bytes).name if known else None


def job_summary(body: Object, gpu: str | None, labels: Iterable[Labels]) -> list[tuple[str, str]]:
    """Return what will be created of a job's manifest, as labels and values."""
    job = QLoRAJob.from_manifest(body)
    return summary(job, gpu or gpu_of_nodes(labels, job))


def summary(job: QLoRAJob, gpu: str | None) -> list[tuple[str, str]]:
    """Return a job and its plan, as labels and values; without a plan it says why there is none."""
    spec = job.spec
    rows = [
        ("Job", job.metadata.name),
        ("Model", spec.model.source),
        ("Data", f"{spec.dataset.train.source}, {spec.dataset.format}, up to {spec.dataset.max_length} tokens a row"),
        ("Output", spec.output.destination),
    ]
    if gpu is None:
        workers, gpus = spec.parallelism.workers, spec.parallelism.gpus_per_worker
        profile = spec.scheduling.profile
        unknown = UNKNOWN_GPU if profile is None else UNKNOWN_PROFILE.format(profile)
        return [*rows, ("GPUs", str(workers * gpus)), ("Memory", unknown)]
    try:
        planned = plan_of(job, PlanOptions(gpu=gpu))
    except ValueError as error:  # the model cannot be read from here; the cluster may well read it
        return [*rows, ("Memory", f"not planned: {error}")]
    rows += [row for row in plan_view.facts_of(planned) if row[0] in PLANNED]
    return rows if isinstance(planned.outcome, Plan) else [*rows, ("Does not fit", plan_view.why_not(planned))]
