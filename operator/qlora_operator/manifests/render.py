"""Render the children of a job. Pure: the same job and attempt give the same manifests, byte for byte.

Pods pass the Pod Security profile ``restricted``, and have no token: a trainer has no business with the API server.
"""

from __future__ import annotations

from typing import Any

from qlora_api.batch import BatchSplit, split_batch
from qlora_api.contract import JobRef, TrainerConfig
from qlora_api.job import API_VERSION, KIND, QLoRAJob
from qlora_api.lifecycle import restarts
from qlora_api.spec import Gang, GradientCheckpointing, QLoRAJobSpec
from qlora_api.status import Attempt, PrepareResult, QLoRAJobStatus
from qlora_operator.config import OperatorConfig
from qlora_operator.manifests.pod_template import KEY_FOLDER, pod_template
from qlora_operator.manifests.profiles import device_of, gpu_of, prepare_of
from qlora_operator.manifests.template_hash import with_template_hash
from qlora_operator.manifests.trial import shared_destination
from qlora_operator.names import (
    ATTEMPT_LABEL,
    COMPONENT_LABEL,
    CONTAINER,
    GENERATION_ANNOTATION,
    JOB_LABEL,
    KEY_ENTRY,
    KUEUE_PRIORITY_LABEL,
    KUEUE_QUEUE_LABEL,
    MANAGED_BY,
    METRICS_PORT,
    OPERATOR_ANNOTATION,
    PLAN_ANNOTATION,
    RENDEZVOUS_PORT,
    SERVICE,
    UID_LABEL,
    attempt_name,
    key_secret_name,
    prepare_name,
    workers_policy_name,
)
from qlora_operator.profile_types import CACHE_FOLDER

PREPARE_RETRIES = 3
USER_ERROR_CODE = 40
KEY_SECRET_TYPE = "qlora.dev/job-key"  # noqa: S105 a name
VOLCANO_API = "scheduling.volcano.sh/v1beta1"


def attempt(
    job: QLoRAJob,
    config: OperatorConfig,
    gang: Gang,
    attempt: Attempt,
    status: QLoRAJobStatus,
    memory_correction: float = 1.0,
) -> tuple[dict[str, Any], ...]:
    """Return all that one attempt needs: the job's key and the attempt's Job.

    Several workers need the shared Service and a NetworkPolicy besides, and with Volcano a PodGroup.
    """
    parallelism = job.spec.parallelism
    workers = attempt.world_size // parallelism.gpus_per_worker
    name = attempt_name(job.metadata.name, attempt.number)
    labels = _labels(job, "trainer") | {ATTEMPT_LABEL: str(attempt.number)}
    trainer = trainer_config(job, config, attempt, status, memory_correction)
    template = pod_template(job, config, labels, trainer, command="qlora_trainer", ranks=parallelism.gpus_per_worker)
    template["spec"]["terminationGracePeriodSeconds"] = attempt.grace_seconds or config.trainer.grace_seconds
    metadata = _metadata(job, name, labels)
    plan = attempt.model_dump_json(by_alias=True, exclude_none=True)
    metadata["annotations"] = _origin(job, config) | {PLAN_ANNOTATION: plan}
    spec: dict[str, Any] = {
        "completionMode": "Indexed",
        "completions": workers,
        "parallelism": workers,
        "backoffLimit": 0,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {
            # The rules change nothing in what happens (the first failed pod fails the Job) but put the cause into the
            # Job's condition, where it outlives the pod.
            "rules": [
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": CONTAINER, "operator": "NotIn", "values": [0]},
                },
            ]
        },
        "template": template,
    }
    children = [key_secret(job)]
    if workers > 1:
        template["spec"]["subdomain"] = SERVICE
        children.append(service(job.metadata.namespace))
        if config.network_policy.workers:
            children.append(workers_policy(job, config))
    if gang is Gang.KUEUE:
        metadata["labels"] = labels | _of_kueue(job, job.spec.scheduling.queue)
        spec["suspend"] = True
    if gang is Gang.VOLCANO:
        template["spec"]["schedulerName"] = "volcano"
        template["metadata"]["annotations"]["scheduling.k8s.io/group-name"] = name
        children.append(_pod_group(job, name, labels, workers))
    child = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}
    return (*children, with_template_hash(child))


def prepare(job: QLoRAJob, config: OperatorConfig, memory_correction: float = 1.0) -> dict[str, Any]:
    """The Job that looks at model and rows before a GPU is held. It repeats itself unless the user must mend things."""
    labels, queue = _labels(job, "prepare"), prepare_of(job.spec, config).queue
    status = QLoRAJobStatus()
    world = job.spec.parallelism.workers * job.spec.parallelism.gpus_per_worker
    split = split_batch(job.spec, world)
    first = Attempt.model_validate(
        {
            "number": 1,
            "worldSize": world,
            "startTime": "1970-01-01T00:00:00Z",
            "microBatchSize": split.micro_batch_size,
            "gradientAccumulationSteps": split.gradient_accumulation_steps,
            "gradientCheckpointing": checkpoints_gradients(job.spec, config, None),
        }
    )
    trainer = trainer_config(job, config, first, status, memory_correction)
    pod = pod_template(job, config, labels, trainer, command="qlora_trainer.prepare", ranks=0)
    # Of the pod, not of the Job: waiting for a node does not count.
    pod["spec"]["activeDeadlineSeconds"] = config.prepare.deadline_seconds
    metadata = _metadata(job, prepare_name(job.metadata.name), labels | _of_kueue(job, queue))
    child = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata | {"annotations": _origin(job, config)},
        "spec": {
            "backoffLimit": PREPARE_RETRIES,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {
                "rules": [
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    {
                        "action": "FailJob",
                        "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [USER_ERROR_CODE]},
                    },
                ]
            },
            "template": pod,
        },
    }
    return with_template_hash(child)


def key_secret(job: QLoRAJob) -> dict[str, Any]:
    """Return the Secret for the job's key, without it: whoever creates the Secret makes one, and nobody changes it."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": KEY_SECRET_TYPE,
        "metadata": _metadata(job, key_secret_name(job.metadata.uid or ""), _labels(job, "key")),
        "immutable": True,
    }


def workers_policy(job: QLoRAJob, config: OperatorConfig) -> dict[str, Any]:
    """Let none but the job's own pods reach its trainers, and all others no more than their metrics."""
    own = {"matchLabels": {UID_LABEL: job.metadata.uid or "", COMPONENT_LABEL: "trainer"}}
    ingress: list[dict[str, Any]] = [{"from": [{"podSelector": own}]}]
    if job.metadata.namespace not in config.network_policy.restricted_namespaces:
        last = METRICS_PORT + job.spec.parallelism.gpus_per_worker - 1
        ingress.append({"ports": [{"port": METRICS_PORT, "endPort": last, "protocol": "TCP"}]})
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(job, workers_policy_name(job.metadata.uid or ""), _labels(job, "network-policy")),
        "spec": {"podSelector": own, "policyTypes": ["Ingress"], "ingress": ingress},
    }


def service(namespace: str) -> dict[str, Any]:
    """The headless Service shared by all trainers of a namespace: it gives each pod a host name, and nothing else."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": SERVICE, "namespace": namespace, "labels": dict(MANAGED_BY)},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": MANAGED_BY | {COMPONENT_LABEL: "trainer"},
            "ports": [{"name": "rendezvous", "port": RENDEZVOUS_PORT, "protocol": "TCP"}],
        },
    }


def trainer_config(
    job: QLoRAJob, config: OperatorConfig, attempt: Attempt, status: QLoRAJobStatus, memory_correction: float = 1.0
) -> TrainerConfig:
    """Return the configuration of an attempt's trainer."""
    spec, meta = job.spec, job.metadata
    split = BatchSplit(
        world_size=attempt.world_size,
        micro_batch_size=attempt.micro_batch_size,
        gradient_accumulation_steps=attempt.gradient_accumulation_steps,
    )
    workers = attempt.world_size // spec.parallelism.gpus_per_worker
    shared = shared_destination(meta.name, meta.labels, spec.output.destination)
    host = f"{attempt_name(meta.name, attempt.number)}-0.{SERVICE}.{meta.namespace}.svc:{RENDEZVOUS_PORT}"
    return TrainerConfig(
        job=JobRef(name=meta.name, namespace=meta.namespace, uid=meta.uid or "", cluster=config.cluster),
        spec=spec,
        attempt=attempt.number,
        restarts=restarts(status.attempts),
        batch=split,
        device=device_of(spec, config),
        ranks_per_worker=spec.parallelism.gpus_per_worker,
        workers=workers,
        rendezvous=host if workers > 1 else None,
        key_file=f"{KEY_FOLDER}/{KEY_ENTRY}",
        accepts_unsigned=any(not earlier.key_secret for earlier in status.attempts),
        gradient_checkpointing=attempt.gradient_checkpointing,
        pause_at_step=spec.policy.pause_at_step,
        checkpoint_uri=f"{spec.output.destination.rstrip('/')}/.checkpoints/{meta.uid}",
        cache_dir=CACHE_FOLDER,
        shared_cache_uri=config.shared_cache_uri or f"{shared}/.prepared",
        termination_message_path="/dev/termination-log",
        metrics_port=METRICS_PORT,
        gpu=gpu_of(spec, config),
        memory_correction=memory_correction,
    )


def checkpoints_gradients(spec: QLoRAJobSpec, config: OperatorConfig, prepared: PrepareResult | None) -> bool:
    """Return whether a first attempt recomputes activations; Auto: as Prepare planned, else on a GPU."""
    choice = spec.training.gradient_checkpointing
    if choice is GradientCheckpointing.AUTO:
        return prepared.gradient_checkpointing if prepared else device_of(spec, config) == "CUDA"
    return choice is GradientCheckpointing.FULL


# ------------------------------------------------------------------------------------------------------------- smaller


def _labels(job: QLoRAJob, component: str) -> dict[str, str]:
    return MANAGED_BY | {
        "app.kubernetes.io/name": "qlora-trainer",
        COMPONENT_LABEL: component,
        JOB_LABEL: job.metadata.name,
        UID_LABEL: job.metadata.uid or "",
    }


def _of_kueue(job: QLoRAJob, queue: str | None) -> dict[str, str]:
    """Return the labels by which Kueue queues a Job: its queue, and the priority class of the QLoRAJob's own label."""
    priority = job.metadata.labels.get(KUEUE_PRIORITY_LABEL)
    return ({KUEUE_QUEUE_LABEL: queue} if queue else {}) | (
        {KUEUE_PRIORITY_LABEL: priority} if queue and priority else {}
    )


def _metadata(job: QLoRAJob, name: str, labels: dict[str, str]) -> dict[str, Any]:
    owner = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": job.metadata.name,
        "uid": job.metadata.uid,
        "controller": True,
        "blockOwnerDeletion": False,
    }
    return {"name": name, "namespace": job.metadata.namespace, "labels": labels, "ownerReferences": [owner]}


def _origin(job: QLoRAJob, config: OperatorConfig) -> dict[str, str]:
    """Return the annotations that say which release of the operator made a Job, and for which spec."""
    return {OPERATOR_ANNOTATION: config.release, GENERATION_ANNOTATION: str(job.metadata.generation or 0)}


def _pod_group(job: QLoRAJob, name: str, labels: dict[str, str], workers: int) -> dict[str, Any]:
    spec: dict[str, Any] = {"minMember": workers}
    if job.spec.scheduling.queue:
        spec["queue"] = job.spec.scheduling.queue
    if job.spec.scheduling.priority_class_name:
        spec["priorityClassName"] = job.spec.scheduling.priority_class_name
    return {"apiVersion": VOLCANO_API, "kind": "PodGroup", "metadata": _metadata(job, name, labels), "spec": spec}
