"""Fields of running a job: parallelism, checkpoints, output, policy, scheduling."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, StringConstraints

from qlora_api.base import Model, Rule, decimal
from qlora_api.spec.values import Destination, Label, Name, Quantity, check_no_boolean


class Offload(StrEnum):
    NONE = "None"
    OPTIMIZER = "Optimizer"


class ParallelismSpec(Model):
    """Data parallelism with DeepSpeed ZeRO. Rajbhandari et al. 2020.

    With zeroStage 0 to 2 every rank holds the whole quantized base.
    """

    workers: int = Field(1, ge=1, le=256)
    """Pods. 'qlora run' uses this machine instead: all its GPUs, or two CPU processes."""
    min_workers: int | None = Field(None, ge=1, le=256)
    """Minimum number of pods. If there are not enough nodes for all workers, the job continues with fewer, down to this
    number: the same global batch and the same order of rows, on fewer ranks. Each new attempt asks for all workers
    again. Default: wait until there is room."""
    gpus_per_worker: int = Field(1, ge=1, le=16)
    """GPUs of each pod. Each GPU has one rank."""
    zero_stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(check_no_boolean)] = 0
    """ZeRO stage, which says what is partitioned across ranks: 0 nothing; 1 optimizer state; 2 optimizer state and
    gradients; 3 optimizer
    state, gradients and parameters. LoRA's states are small: 0 is the fastest and fits nearly always. Even with 3 the
    whole quantized base must fit each GPU while it loads."""
    offload: Offload = Offload.NONE
    """Optimizer: hold the optimizer state in host memory (AdamW on the CPU replaces the paged optimizers)."""
    rules: ClassVar = (
        Rule(
            "self.offload == 'None' || self.zeroStage >= 1",
            "offload Optimizer needs zeroStage 1, 2 or 3",
            "offload",
            lambda p: p.offload is Offload.NONE or p.zero_stage >= 1,
        ),
        Rule(
            "!has(self.minWorkers) || self.minWorkers <= self.workers",
            "minWorkers must be at most workers",
            "minWorkers",
            lambda p: p.min_workers is None or p.min_workers <= p.workers,
        ),
        Rule(
            "!has(self.minWorkers) || self.zeroStage < 3",
            "a ZeRO-3 checkpoint can only be loaded on the same number of ranks: with minWorkers, zeroStage must be "
            "0, 1 or 2",
            "minWorkers",
            lambda p: p.min_workers is None or p.zero_stage < 3,
        ),
    )


class CheckpointSpec(Model):
    """Checkpoints hold adapter, optimizer, schedule, RNG and data position, but not the frozen base."""

    every_steps: int | None = Field(None, ge=1, le=1_000_000)
    """Steps between checkpoints. Default: once an epoch."""
    every_minutes: int = Field(15, ge=1, le=1440)
    """Longest time between checkpoints, so that a lost node costs no more than this."""
    keep: int = Field(3, ge=1, le=100)
    """Number of newest checkpoints to keep. The best one by eval loss is kept in addition."""


class Merge(StrEnum):
    NONE = "None"
    BFLOAT16 = "BFloat16"


class OutputSpec(Model):
    """Destination of the verified adapter."""

    destination: Destination
    """Folder in object storage (or a local one with 'qlora run'). It must not hold another run's adapter manifest."""
    credentials: Name | None = None
    """Secret in the job's namespace with the destination's credentials under their usual names (AWS_…, HF_TOKEN …). All
    Secrets of a job are merged into one environment, in the order model, dataset.train, output, tracking. If a key
    occurs twice, the later Secret wins."""
    merge: Merge = Merge.NONE
    """BFloat16: also publish a merged model. Its loss on a few evaluation rows, or training rows if there are none,
    must not be higher than that of the adapter on the 16-bit base."""
    allow_worse_eval: bool = False
    """Publish the best checkpoint even if its loss on the evaluation rows is above the base's. Otherwise the job ends
    without an adapter, because training increased the evaluation loss."""

    immutable: ClassVar = {"destination": "the run's checkpoints lie below it; create a new QLoRAJob instead"}


class OnOutOfMemory(StrEnum):
    RECOVER = "Recover"
    FAIL = "Fail"


class PolicySpec(Model):
    """Limits and reactions to failures. May be changed while the job runs."""

    max_restarts: int = Field(3, ge=0, le=50)
    """Maximum number of restarts after failures. Preemption, node or peer loss, suspension, unschedulable pods and
    running out of memory do not count. Three attempts in a row that end as Stalled or PeerLost without a new step end
    the job."""
    on_out_of_memory: OnOutOfMemory = OnOutOfMemory.RECOVER
    """Recover: resume from the last checkpoint with half the micro-batch, and finally with recomputed activations; the
    global batch stays the same. Fail: end the job."""
    stall_timeout_seconds: int = Field(1800, ge=30, le=86400)
    """If a rank sends no heartbeat for this long, the attempt is ended, the message names the rank, and the job resumes
    from its last checkpoint. Must be longer than a forward or backward pass; loading, saving and publishing may take
    more. Pods also wait this long for each other."""
    shrink_after_seconds: int = Field(120, ge=10, le=86400)
    """With parallelism.minWorkers: how long to wait for unschedulable pods before trying with fewer."""
    active_deadline_seconds: int | None = Field(None, ge=60, le=31536000)
    """Time limit for training, summed over all attempts. An attempt counts from when all its pods are ready until it
    ends. Time spent preparing, queued, waiting for nodes or between attempts, or suspended does not count. Unlike in a
    batch/v1 Job, resuming does not reset the clock. When the limit is reached, the pods are stopped, and the job fails
    unless the adapter has been published by then. Checkpoints are kept."""
    budget_gpu_hours: decimal(0, 1e9, low_included=False) | None = None  # type: ignore[valid-type]
    """GPU-hours of all attempts together; waiting does not count. Before they are used up, the job saves a checkpoint
    and is suspended. Raise the value to resume it."""
    pause_at_step: int | None = Field(None, ge=1, le=1_000_000)
    """Optimizer step after which the job evaluates if an evaluation is due, saves a checkpoint and is suspended, unless
    it is the last step. Raise it, or remove it, to resume. A running attempt keeps the value that it started with."""
    ttl_seconds_after_finished: int | None = Field(None, ge=0, le=31536000)
    """Delete the finished job after this time. Default: never."""


class Gang(StrEnum):
    AUTO = "Auto"
    NATIVE = "Native"
    KUEUE = "Kueue"
    VOLCANO = "Volcano"
    NONE = "None"


class Toleration(Model):
    """Toleration of the trainer pods, as in a PodSpec."""

    key: Label | None = None
    """Key of the taint; required. An administrator may allow only some."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """Equal: the taint must have this value. Exists: any value matches."""
    value: Label | None = None
    """Value of the taint, with operator Equal."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint. Default: any."""
    toleration_seconds: int | None = Field(None, ge=0, le=31536000)
    """With effect NoExecute: how long pods stay on a node that gets the taint. Default: no limit."""
    rules: ClassVar = (
        Rule(
            "has(self.key) && self.key != ''",
            "key is required: a job must not tolerate all taints",
            "key",
            lambda t: bool(t.key),
        ),
    )


RESERVED_DOMAINS = ("azure.workload.identity", "k8s.io", "kubernetes.io", "qlora.dev")
"""Domains of labels and annotations that mean something to Kubernetes, a cloud provider or the operator."""
_RESERVED = rf"^([^/]*\.)?({'|'.join(map(re.escape, RESERVED_DOMAINS))})/"
LabelValue = Annotated[str, StringConstraints(max_length=63, pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$")]
AnnotationValue = Annotated[str, StringConstraints(max_length=1024)]


def _keys_rule(field: str) -> Rule:
    pattern = _RESERVED.replace("\\", "\\\\")
    return Rule(
        f"!has(self.{field}) || self.{field}.all(key, key.size() <= 317 && !key.matches('{pattern}'))",
        f"{field} must have keys of at most 317 characters, none of {', '.join(RESERVED_DOMAINS)} or a domain below",
        field,
        lambda s: all(len(key) <= 317 and not re.match(_RESERVED, key) for key in s.at(field)),
    )


class SchedulingSpec(Model):
    """Nodes, queue and resources of the pods. Not used by 'qlora run'."""

    gang: Gang = Gang.AUTO
    """Start all pods or none: by Kubernetes itself (Native), Kueue, Volcano, or not at all (None). Auto uses the first
    available of: Kueue (if queue is set), Native, Volcano, None."""
    queue: Name | None = None
    """Queue of Volcano, or LocalQueue of Kueue in the job's namespace. Required for Kueue: if it manages
    all jobs, a job without a queue stays suspended."""
    priority_class_name: Name | None = None
    """PriorityClass of the trainers' pods. system-* classes are not allowed; an administrator can restrict which
    classes may be used."""
    node_selector: dict[str, Label] = Field({}, max_length=32)
    """Labels that the trainers' nodes must have; an administrator can restrict the keys. Prepare plans for the GPU that
    nvidia.com/gpu.product names."""
    tolerations: list[Toleration] = Field([], max_length=32)
    """Tolerations of the trainer pods, in addition to that of the GPU taint."""
    pod_labels: dict[str, LabelValue] = Field({}, max_length=32)
    """Labels of the job's pods, such as sidecar.istio.io/inject; an administrator may allow only some keys."""
    pod_annotations: dict[str, AnnotationValue] = Field({}, max_length=32)
    """Annotations of the job's pods; an administrator may allow only some keys."""
    profile: Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)] | None = None
    """Profile of the pods, by its name in the operator's chart: kind of GPU, nodes, network, volumes. An administrator
    defines profiles; 'qlora doctor' lists them. Default: the one named default."""
    cpu: Quantity | None = None
    """CPUs for each GPU of a trainer pod, such as "8", within the profile's bounds. Default: the profile's."""
    memory: Quantity | None = None
    """Memory for each GPU of a trainer pod, such as 64Gi, within the profile's bounds. Default: the profile's."""
    rules: ClassVar = (
        Rule(
            "!has(self.profile) || !has(self.nodeSelector) || self.nodeSelector.size() == 0",
            "nodeSelector must not be set together with profile, which selects the nodes",
            "nodeSelector",
            lambda s: s.profile is None or not s.node_selector,
        ),
        Rule(
            "!has(self.profile) || !has(self.tolerations) || self.tolerations.size() == 0",
            "tolerations must not be set together with profile, which has its own",
            "tolerations",
            lambda s: s.profile is None or not s.tolerations,
        ),
        Rule(
            "self.gang != 'Kueue' || has(self.queue)",
            "gang Kueue needs queue, the name of a LocalQueue in the job's namespace; or choose Auto, Native, Volcano "
            "or None",
            "queue",
            lambda s: s.gang is not Gang.KUEUE or s.queue is not None,
        ),
        Rule(
            "!has(self.priorityClassName) || !self.priorityClassName.startsWith('system-')",
            "priorityClassName must not be a system class (system-…): choose one for workloads",
            "priorityClassName",
            lambda s: not (s.priority_class_name or "").startswith("system-"),
        ),
        Rule(
            "!has(self.nodeSelector) || self.nodeSelector.all(key, key.size() <= 317)",
            "nodeSelector must have keys of at most 317 characters",
            "nodeSelector",
            lambda s: all(len(key) <= 317 for key in s.node_selector),
        ),
        _keys_rule("podLabels"),
        _keys_rule("podAnnotations"),
    )
