"""Render the children of a job. Pure: the same job and attempt give the same manifests, byte for byte.

Pods pass the Pod Security profile ``restricted``, and have no token: a trainer has no business with the API server.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from qlora_api.batch import BatchSplit, split_batch
from qlora_api.contract import JobRef, TrainerConfig
from qlora_api.credentials import prefix_of, secrets_of
from qlora_api.environment import WORKLOAD_IDENTITY
from qlora_api.job import API_VERSION, KIND, QLoRAJob
from qlora_api.lifecycle import restarts
from qlora_api.spec import Gang, GradientCheckpointing, QLoRAJobSpec
from qlora_api.status import Attempt, PrepareResult, QLoRAJobStatus
from qlora_memory.gpus import known_gpu
from qlora_operator.config import OperatorConfig
from qlora_operator.names import (
    ATTEMPT_LABEL,
    CACHE_VOLUME,
    COMPONENT_LABEL,
    CONFIG_ANNOTATION,
    CONTAINER,
    JOB_LABEL,
    KEY_ENTRY,
    MANAGED_BY,
    METRICS_PORT,
    PLAN_ANNOTATION,
    RENDEZVOUS_PORT,
    SERVICE,
    TMP_VOLUME,
    UID_LABEL,
    attempt_name,
    key_secret_name,
    prepare_name,
    workers_policy_name,
)
from qlora_operator.quantities import times

USER = 65532
"""The image's own; what it is matters only for volumes."""
PREPARE_RETRIES = 3
USER_ERROR_CODE = 40
CONFIG_FOLDER = "/etc/qlora"
KEY_FOLDER = "/etc/qlora-key"
KEY_FILE_MODE = 0o440
KEY_SECRET_TYPE = "qlora.dev/job-key"  # noqa: S105 a name
CACHE_FOLDER = "/cache"
PVC_FOLDER = "/mnt/pvc"
KUEUE_QUEUE = "kueue.x-k8s.io/queue-name"
DISK = "ephemeral-storage"
GPU_PRODUCT = "nvidia.com/gpu.product"
VOLCANO_API = "scheduling.volcano.sh/v1beta1"


def attempt(
    job: QLoRAJob,
    config: OperatorConfig,
    gang: Gang,
    attempt: Attempt,
    status: QLoRAJobStatus,
    memory_correction: float = 1.0,
) -> tuple[dict[str, Any], ...]:
    """All that one attempt needs: the job's key and the attempt's Job.

    Several workers need the shared Service and a NetworkPolicy besides, and with Volcano a PodGroup.
    """
    parallelism = job.spec.parallelism
    workers = attempt.world_size // parallelism.gpus_per_worker
    name = attempt_name(job.metadata.name, attempt.number)
    labels = _labels(job, "trainer") | {ATTEMPT_LABEL: str(attempt.number)}
    trainer = trainer_config(job, config, attempt, status, memory_correction)
    template = _pod(job, config, labels, trainer, command="qlora_trainer", ranks=parallelism.gpus_per_worker)
    template["spec"]["terminationGracePeriodSeconds"] = attempt.grace_seconds or config.trainer.grace_seconds
    metadata = _metadata(job, name, labels)
    metadata["annotations"] = {PLAN_ANNOTATION: attempt.model_dump_json(by_alias=True, exclude_none=True)}
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
        metadata["labels"] = labels | {KUEUE_QUEUE: job.spec.scheduling.queue or ""}
        spec["suspend"] = True
    if gang is Gang.VOLCANO:
        template["spec"]["schedulerName"] = "volcano"
        template["metadata"]["annotations"]["scheduling.k8s.io/group-name"] = name
        children.append(_pod_group(job, name, labels, workers))
    child = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}
    return (*children, child)


AZURE_IDENTITY_LABEL = "azure.workload.identity/use"
"""Without it Azure gives a pod no token of its service account."""


def prepare(job: QLoRAJob, config: OperatorConfig, memory_correction: float = 1.0) -> dict[str, Any]:
    """The Job that looks at model and rows before a GPU is held. It repeats itself unless the user must mend things."""
    labels = _labels(job, "prepare")
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
    pod = _pod(job, config, labels, trainer, command="qlora_trainer.prepare", ranks=0)
    # Of the pod, not of the Job: waiting for a node does not count.
    pod["spec"]["activeDeadlineSeconds"] = config.prepare.deadline_seconds
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(job, prepare_name(job.metadata.name), labels),
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


def key_secret(job: QLoRAJob) -> dict[str, Any]:
    """The Secret for the job's key, without it: whoever creates the Secret makes one, and nobody changes it."""
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
    host = f"{attempt_name(meta.name, attempt.number)}-0.{SERVICE}.{meta.namespace}.svc:{RENDEZVOUS_PORT}"
    return TrainerConfig(
        job=JobRef(name=meta.name, namespace=meta.namespace, uid=meta.uid or ""),
        spec=spec,
        attempt=attempt.number,
        restarts=restarts(status.attempts),
        batch=split,
        device=device_of(config),
        ranks_per_worker=spec.parallelism.gpus_per_worker,
        workers=workers,
        rendezvous=host if workers > 1 else None,
        key_file=f"{KEY_FOLDER}/{KEY_ENTRY}",
        accepts_unsigned=any(not earlier.key_secret for earlier in status.attempts),
        gradient_checkpointing=attempt.gradient_checkpointing,
        checkpoint_uri=f"{spec.output.destination.rstrip('/')}/.checkpoints/{meta.uid}",
        cache_dir=CACHE_FOLDER,
        shared_cache_uri=config.shared_cache_uri or f"{spec.output.destination.rstrip('/')}/.prepared",
        termination_message_path="/dev/termination-log",
        metrics_port=METRICS_PORT,
        gpu=gpu_of(spec, config),
        memory_correction=memory_correction,
    )


def device_of(config: OperatorConfig) -> Literal["CUDA", "CPU"]:
    return config.trainer.device or ("CUDA" if config.gpu_resource else "CPU")


def gpu_of(spec: QLoRAJobSpec, config: OperatorConfig) -> str | None:
    """Which GPU a rank gets: the product the job's nodes must have, by NVIDIA's feature discovery, else the operator's.

    A product that is not known, or a part of a card (MIG), is not taken for the operator's.
    """
    if device_of(config) == "CPU":
        return None
    product = spec.scheduling.node_selector.get(GPU_PRODUCT)
    if product is None:
        return config.trainer.gpu
    known = known_gpu(product)
    return known.name if known else None


def checkpoints_gradients(spec: QLoRAJobSpec, config: OperatorConfig, prepared: PrepareResult | None) -> bool:
    """Return whether a first attempt recomputes activations; Auto: as Prepare planned, else on a GPU."""
    choice = spec.training.gradient_checkpointing
    if choice is GradientCheckpointing.AUTO:
        return prepared.gradient_checkpointing if prepared else device_of(config) == "CUDA"
    return choice is GradientCheckpointing.FULL


# ----------------------------------------------------------------------------------------------------------------- pods


def _pod(
    job: QLoRAJob, config: OperatorConfig, labels: dict[str, str], trainer: TrainerConfig, *, command: str, ranks: int
) -> dict[str, Any]:
    """Pod template of a trainer with ``ranks`` GPUs, or of Prepare with none."""
    pod, scheduling = config.trainer, job.spec.scheduling
    claims = dict(_claims(job, config))
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "serviceAccountName": pod.service_account_name,
        "terminationGracePeriodSeconds": pod.grace_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "tolerations": [*_tolerations(job, config, gpu=ranks > 0)],
        "containers": [_container(job, config, claims, command=command, ranks=ranks)],
        "volumes": [*_volumes(job, config, claims, ranks)],
    }
    if scheduling.node_selector and ranks:
        spec["nodeSelector"] = dict(scheduling.node_selector)
    if scheduling.priority_class_name:
        spec["priorityClassName"] = scheduling.priority_class_name
    if pod.runtime_class_name and ranks and config.gpu_resource:
        spec["runtimeClassName"] = pod.runtime_class_name
    if pod.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in pod.image_pull_secrets]
    if pod.workload_identity:
        labels = labels | {AZURE_IDENTITY_LABEL: "true"}
    text = trainer.model_dump_json(by_alias=True, exclude_none=True)
    metadata = {
        "labels": pod.pod_labels | scheduling.pod_labels | labels,
        "annotations": pod.pod_annotations | scheduling.pod_annotations | {CONFIG_ANNOTATION: text},
    }
    return {"metadata": metadata, "spec": spec}


def _container(
    job: QLoRAJob, config: OperatorConfig, claims: dict[str, bool], *, command: str, ranks: int
) -> dict[str, Any]:
    pod = config.trainer
    fields = {"NODE_NAME": "spec.nodeName", "POD_NAME": "metadata.name"}
    mounts = [
        {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True},
        {"name": "key", "mountPath": KEY_FOLDER, "readOnly": True},
        {"name": TMP_VOLUME, "mountPath": "/tmp"},  # noqa: S108 a volume of the pod's own
        {"name": CACHE_VOLUME, "mountPath": CACHE_FOLDER},
        *(
            {"name": f"claim-{number}", "mountPath": f"{PVC_FOLDER}/{claim}", "readOnly": ro}
            for number, (claim, ro) in enumerate(claims.items())
        ),
    ]
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": pod.image,
        "imagePullPolicy": pod.image_pull_policy,
        # Isolated: nothing in the environment decides what code it runs.
        "command": ["python", "-I", "-u", "-m", command, f"{CONFIG_FOLDER}/config.json"],
        "env": [
            *({"name": n, "valueFrom": {"fieldRef": {"fieldPath": path}}} for n, path in fields.items()),
            # Secrets come under prefixes ('envFrom'), and the trainer lets them replace no variable of these.
            {"name": WORKLOAD_IDENTITY, "value": str(pod.workload_identity).lower()},
            *(v.model_dump() for v in pod.env),
        ],
        "envFrom": [
            {"prefix": prefix_of(number), "secretRef": {"name": name}}
            for number, (_, name) in enumerate(secrets_of(job.spec))
        ],
        "resources": _resources(config, ranks),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts,
    }
    if ranks:
        container["ports"] = [{"name": f"metrics-{r}", "containerPort": METRICS_PORT + r} for r in range(ranks)]
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})  # noqa: S108 where NCCL and gloo put shared memory
    return container


def _resources(config: OperatorConfig, ranks: int) -> dict[str, Any]:
    pod = config.trainer
    cpu = times(pod.cpu, ranks) if ranks else config.prepare.cpu
    limits = {"memory": times(pod.memory, ranks) if ranks else config.prepare.memory}
    if ranks and config.gpu_resource:
        limits[config.gpu_resource] = str(ranks)
    requests = {"cpu": cpu, **limits}
    if pod.ephemeral_storage:
        requests[DISK] = pod.ephemeral_storage
        limits[DISK] = pod.disk_limit
    return {"requests": requests, "limits": limits}


def _volumes(job: QLoRAJob, config: OperatorConfig, claims: dict[str, bool], ranks: int) -> Iterator[dict[str, Any]]:
    item = {"path": "config.json", "fieldRef": {"fieldPath": f"metadata.annotations['{CONFIG_ANNOTATION}']"}}
    yield {"name": "config", "downwardAPI": {"items": [item]}}
    name = key_secret_name(job.metadata.uid or "")
    yield {"name": "key", "secret": {"secretName": name, "defaultMode": KEY_FILE_MODE}}
    yield {"name": TMP_VOLUME, "emptyDir": {"sizeLimit": config.trainer.tmp_size_limit}}
    yield {"name": CACHE_VOLUME, "emptyDir": {"sizeLimit": config.trainer.cache_size_limit}}
    if ranks:
        size = times(config.trainer.shared_memory, ranks)
        yield {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": size}}
    for number, (claim, read_only) in enumerate(claims.items()):  # a claim's name may be no name for a volume
        yield {"name": f"claim-{number}", "persistentVolumeClaim": {"claimName": claim, "readOnly": read_only}}


def _tolerations(job: QLoRAJob, config: OperatorConfig, *, gpu: bool) -> Iterator[dict[str, Any]]:
    """The job's own; the GPU's taint; and a node that goes away is waited for no longer than configured."""
    if gpu and config.gpu_resource:
        yield {"key": config.gpu_resource, "operator": "Exists", "effect": "NoSchedule"}
    for key in ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"):
        seconds = config.trainer.node_lost_seconds
        yield {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": seconds}
    for toleration in job.spec.scheduling.tolerations:
        yield toleration.to_json_dict()


def _claims(job: QLoRAJob, config: OperatorConfig) -> Iterator[tuple[str, bool]]:
    """Claims that the job's URIs name, and whether they are only read."""
    spec = job.spec
    held_out = spec.dataset.eval.source if spec.dataset.eval else None
    for uri in (spec.model.source, spec.dataset.train.source, held_out):
        if claim := _claim(uri):
            yield claim, True
    for uri in (spec.output.destination, config.shared_cache_uri):  # last: a claim that is written is not read-only
        if claim := _claim(uri):
            yield claim, False


def _claim(uri: str | None) -> str | None:
    return uri.removeprefix("pvc://").partition("/")[0] if uri and uri.startswith("pvc://") else None


# ------------------------------------------------------------------------------------------------------------- smaller


def _labels(job: QLoRAJob, component: str) -> dict[str, str]:
    return MANAGED_BY | {
        "app.kubernetes.io/name": "qlora-trainer",
        COMPONENT_LABEL: component,
        JOB_LABEL: job.metadata.name,
        UID_LABEL: job.metadata.uid or "",
    }


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


def _pod_group(job: QLoRAJob, name: str, labels: dict[str, str], workers: int) -> dict[str, Any]:
    spec: dict[str, Any] = {"minMember": workers}
    if job.spec.scheduling.queue:
        spec["queue"] = job.spec.scheduling.queue
    if job.spec.scheduling.priority_class_name:
        spec["priorityClassName"] = job.spec.scheduling.priority_class_name
    return {"apiVersion": VOLCANO_API, "kind": "PodGroup", "metadata": _metadata(job, name, labels), "spec": spec}
