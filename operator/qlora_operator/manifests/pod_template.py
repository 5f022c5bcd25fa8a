"""Render the pod template of a job's trainers and of its Prepare, by the job's profile. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qlora_api.contract import TrainerConfig
from qlora_api.credentials import prefix_of, secrets_of
from qlora_api.environment import WORKLOAD_IDENTITY
from qlora_api.job import QLoRAJob
from qlora_api.spec import SchedulingSpec
from qlora_operator.config import OperatorConfig
from qlora_operator.manifests.profiles import cpu_of, memory_of, prepare_of, profile_of
from qlora_operator.names import (
    ATTEMPT_LABEL,
    CACHE_VOLUME,
    COMPONENT_LABEL,
    CONFIG_ANNOTATION,
    CONTAINER,
    METRICS_PORT,
    TMP_VOLUME,
    UID_LABEL,
    key_secret_name,
)
from qlora_operator.profile_types import CACHE_FOLDER, Placement, PodProfile, ProfileVolume
from qlora_operator.quantities import times

USER = 65532
"""The image's own; what it is matters only for volumes."""
CONFIG_FOLDER = "/etc/qlora"
KEY_FOLDER = "/etc/qlora-key"
KEY_FILE_MODE = 0o440
PVC_FOLDER = "/mnt/pvc"
DISK = "ephemeral-storage"
AZURE_IDENTITY_LABEL = "azure.workload.identity/use"
"""Without it Azure gives a pod no token of its service account."""


def pod_template(
    job: QLoRAJob, config: OperatorConfig, labels: dict[str, str], trainer: TrainerConfig, *, command: str, ranks: int
) -> dict[str, Any]:
    """Pod template of a trainer with ``ranks`` GPUs, or of Prepare with none.

    Raises:
        LookupError: there is no such profile as the job names; ``profile_problem`` says so before.

    """
    pod, scheduling, profile = config.trainer, job.spec.scheduling, profile_of(job.spec, config)
    if profile is None:
        raise LookupError(f"profile {scheduling.profile}")
    place: Placement = profile if ranks else prepare_of(job.spec, config)
    claims = dict(_claims(job, config))
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "serviceAccountName": pod.service_account_name,
        "terminationGracePeriodSeconds": pod.grace_seconds,
        "securityContext": _security_context(profile),
        "tolerations": [*_tolerations(job, config, place, profile.gpu_resource if ranks else None)],
        "containers": [_container(job, config, profile, claims, command=command, ranks=ranks)],
        "volumes": [*_volumes(job, config, profile, claims, ranks)],
        **_placement(place, scheduling.node_selector if ranks else {}),
    }
    if scheduling.priority_class_name:
        spec["priorityClassName"] = scheduling.priority_class_name
    if pod.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in pod.image_pull_secrets]
    if pod.workload_identity:
        labels = labels | {AZURE_IDENTITY_LABEL: "true"}
    if ranks:
        spec |= _of_trainers(profile, labels)
    text = trainer.model_dump_json(by_alias=True, exclude_none=True)
    return {
        "metadata": {
            "labels": pod.pod_labels | scheduling.pod_labels | profile.labels | labels,
            "annotations": (
                pod.pod_annotations | scheduling.pod_annotations | place.annotations | {CONFIG_ANNOTATION: text}
            ),
        },
        "spec": spec,
    }


def _security_context(profile: PodProfile) -> dict[str, Any]:
    user = {"runAsUser": USER, "runAsGroup": USER, "fsGroup": USER}
    return {
        "runAsNonRoot": True,
        **({} if profile.arbitrary_user else user),
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _placement(place: Placement, node_selector: dict[str, str]) -> dict[str, Any]:
    """Return the fields of a PodSpec that say where a pod runs, those that are set."""
    fields = {
        "nodeSelector": node_selector | place.node_selector,
        "affinity": place.affinity,
        "schedulerName": place.scheduler_name,
        "runtimeClassName": place.runtime_class_name,
    }
    return {name: value for name, value in fields.items() if value}


def _of_trainers(profile: PodProfile, labels: dict[str, str]) -> dict[str, Any]:
    """Return the fields of a PodSpec that Prepare has no use for, those that are set."""
    fields: dict[str, Any] = {}
    if profile.topology_spread_constraints:
        own = {key: labels[key] for key in (UID_LABEL, COMPONENT_LABEL, ATTEMPT_LABEL)}
        fields["topologySpreadConstraints"] = [
            spread.to_json_dict() | {"labelSelector": {"matchLabels": own}}
            for spread in profile.topology_spread_constraints
        ]
    if profile.host_network:
        fields |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    return fields


def _container(
    job: QLoRAJob,
    config: OperatorConfig,
    profile: PodProfile,
    claims: dict[str, bool],
    *,
    command: str,
    ranks: int,
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
        *(_mount(volume) for volume in profile.volumes if not volume.is_cache),
    ]
    added = {"add": [*profile.capabilities]} if profile.capabilities and ranks else {}
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
            *({"name": name, "value": value} for name, value in _environment(config, profile).items()),
        ],
        "envFrom": [
            {"prefix": prefix_of(number), "secretRef": {"name": name}}
            for number, (_, name) in enumerate(secrets_of(job.spec))
        ],
        "resources": _resources(job, config, profile, ranks),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]} | added,
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts,
    }
    if ranks:
        container["ports"] = [{"name": f"metrics-{r}", "containerPort": METRICS_PORT + r} for r in range(ranks)]
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})  # noqa: S108 where NCCL and gloo put shared memory
    return container


def _environment(config: OperatorConfig, profile: PodProfile) -> dict[str, str]:
    """Return the operator's variables, and the profile's in their place."""
    # A user that the cluster chooses has no name in the image, and PyTorch asks for one.
    user = {"USER": "qlora"} if profile.arbitrary_user else {}
    return user | {v.name: v.value for v in (*config.trainer.env, *profile.env)}


def _resources(job: QLoRAJob, config: OperatorConfig, profile: PodProfile, ranks: int) -> dict[str, Any]:
    if ranks:
        cpu, limits = _for_ranks(job.spec.scheduling, config, profile, ranks)
    else:
        prepare = prepare_of(job.spec, config)
        cpu, limits = prepare.cpu, {"memory": prepare.memory}
    requests = {"cpu": cpu, **limits}
    if config.trainer.limit_cpu:
        limits["cpu"] = cpu
    if disk := profile.ephemeral_storage or config.trainer.ephemeral_storage:
        requests[DISK] = disk
        limits[DISK] = config.trainer.disk_limit
    return {"requests": requests, "limits": limits}


def _for_ranks(
    scheduling: SchedulingSpec, config: OperatorConfig, profile: PodProfile, ranks: int
) -> tuple[str, dict[str, str]]:
    """Return CPU and limits of a trainer. Extended resources are limited to what is requested."""
    cpu = scheduling.cpu or cpu_of(profile, config).default
    memory = scheduling.memory or memory_of(profile, config).default
    limits = {"memory": times(memory, ranks)}
    if profile.gpu_resource:
        limits[profile.gpu_resource] = str(ranks)
    limits |= {name: times(amount, ranks) for name, amount in profile.resources_per_gpu.items()}
    limits |= profile.resources_per_pod
    return times(cpu, ranks), limits


def _mount(volume: ProfileVolume) -> dict[str, Any]:
    sub_path = {"subPath": volume.sub_path} if volume.sub_path else {}
    return {"name": _volume_name(volume), "mountPath": volume.mount_path, "readOnly": volume.read_only, **sub_path}


def _volume_name(volume: ProfileVolume) -> str:
    """Return a name that none of the trainer's own volumes has."""
    return CACHE_VOLUME if volume.is_cache else f"profile-{volume.name}"


def _volumes(
    job: QLoRAJob, config: OperatorConfig, profile: PodProfile, claims: dict[str, bool], ranks: int
) -> Iterator[dict[str, Any]]:
    item = {"path": "config.json", "fieldRef": {"fieldPath": f"metadata.annotations['{CONFIG_ANNOTATION}']"}}
    yield {"name": "config", "downwardAPI": {"items": [item]}}
    name = key_secret_name(job.metadata.uid or "")
    yield {"name": "key", "secret": {"secretName": name, "defaultMode": KEY_FILE_MODE}}
    yield {"name": TMP_VOLUME, "emptyDir": {"sizeLimit": config.trainer.tmp_size_limit}}
    if not any(volume.is_cache for volume in profile.volumes):
        yield {"name": CACHE_VOLUME, "emptyDir": {"sizeLimit": config.trainer.cache_size_limit}}
    for volume in profile.volumes:
        yield {"name": _volume_name(volume), **volume.source}
    if ranks:
        size = times(profile.shared_memory or config.trainer.shared_memory, ranks)
        yield {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": size}}
    for number, (claim, read_only) in enumerate(claims.items()):  # a claim's name may be no name for a volume
        yield {"name": f"claim-{number}", "persistentVolumeClaim": {"claimName": claim, "readOnly": read_only}}


def _tolerations(
    job: QLoRAJob, config: OperatorConfig, place: Placement, gpu_resource: str | None
) -> Iterator[dict[str, Any]]:
    """The job's own; the GPU's taint; the profile's; and a node that goes away is waited for as long as configured."""
    if gpu_resource:
        yield {"key": gpu_resource, "operator": "Exists", "effect": "NoSchedule"}
    for key in ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"):
        seconds = config.trainer.node_lost_seconds
        yield {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": seconds}
    for toleration in (*place.tolerations, *job.spec.scheduling.tolerations):
        yield toleration.to_json_dict()


def _claims(job: QLoRAJob, config: OperatorConfig) -> Iterator[tuple[str, bool]]:
    """Claims that the job's URIs name, and whether they are only read."""
    spec = job.spec
    held_out = spec.dataset.eval.source if spec.dataset.eval else None
    definitions = spec.evaluate.folder if spec.evaluate else None
    for uri in (spec.model.source, spec.dataset.train.source, held_out, definitions):
        if claim := _claim(uri):
            yield claim, True
    # Last: a claim that is written is not read-only.
    for uri in (spec.output.destination, *(sink.folder for sink in spec.tracking), config.shared_cache_uri):
        if claim := _claim(uri):
            yield claim, False


def _claim(uri: str | None) -> str | None:
    return uri.removeprefix("pvc://").partition("/")[0] if uri and uri.startswith("pvc://") else None
