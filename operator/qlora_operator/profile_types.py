"""Types of pod profiles: what the platform team gives to the pods of jobs, under a name that a job may choose."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, StringConstraints, model_validator
from pydantic.alias_generators import to_camel

from qlora_api.base import Model
from qlora_api.errors import closest
from qlora_api.spec import Toleration
from qlora_api.spec.values import Name, Quantity
from qlora_memory.gpus import GPUS
from qlora_operator.quantities import to_bytes

ResourceName = Annotated[str, StringConstraints(pattern=r"^([a-z0-9.-]+/[A-Za-z0-9._-]+)?$", max_length=317)]
"""An extended resource, such as nvidia.com/gpu. Empty: none."""
ProfileName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
VolumeName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=50)]
MountPath = Annotated[str, StringConstraints(pattern=r"^/[^:]+$", max_length=1024)]
Object = dict[str, Any]
"""Passed to Kubernetes as it is."""

CACHE_FOLDER = "/cache"
OWN_FOLDERS = ("/dev/shm", "/etc/qlora", "/etc/qlora-key", "/mnt/pvc", "/opt", "/proc", "/sys", "/tmp")  # noqa: S108
"""Paths at which a profile may mount nothing: the trainer's own volumes, its code, and the kernel's."""
OWN_KEYS = ("app.kubernetes.io/", "batch.kubernetes.io/", "qlora.dev/")
"""Prefixes of labels and annotations by which the operator knows its pods."""
AFFINITIES = ("nodeAffinity", "podAffinity", "podAntiAffinity")


def known_gpu_name(name: str) -> str:
    if name not in GPUS:
        close = closest(name, GPUS, 1)
        hint = f'; did you mean "{close[0]}"? Known' if close else "; use one of"
        raise ValueError(f"is not known{hint}: {', '.join(GPUS)}")
    return name


def _of_others(values: dict[str, str]) -> dict[str, str]:
    for key in values:
        if key.startswith(OWN_KEYS):
            raise ValueError(f'"{key}" is the operator\'s own; other keys than {", ".join(OWN_KEYS)}… are allowed')
    return values


def _affinity(value: Object) -> Object:
    if unknown := value.keys() - set(AFFINITIES):
        raise ValueError(f'"{min(unknown)}" is not known; use {", ".join(AFFINITIES)}')
    return value


class EnvVar(Model):
    name: str
    value: str


class PodToleration(Toleration):
    """Toleration as in a PodSpec. Unlike a job's, it may tolerate every taint."""

    rules: ClassVar = ()  # type: ignore[assignment]


class TopologySpread(Model):
    """Constraint of how an attempt's pods are spread; the operator adds the selector of the attempt's pods."""

    topology_key: str
    max_skew: int = Field(1, ge=1)
    when_unsatisfiable: Literal["DoNotSchedule", "ScheduleAnyway"] = "DoNotSchedule"
    min_domains: int | None = Field(None, ge=1)
    node_affinity_policy: Literal["Honor", "Ignore"] | None = None
    node_taints_policy: Literal["Honor", "Ignore"] | None = None


class AmountRange(Model):
    """Amount for each GPU of a pod, and how far a job may change it."""

    default: Quantity
    min: Quantity | None = None
    """Not set: the default."""
    max: Quantity | None = None
    """Not set: the default."""

    @property
    def least(self) -> str:
        return self.min or self.default

    @property
    def most(self) -> str:
        return self.max or self.default

    @model_validator(mode="after")
    def _are_in_order(self) -> Self:
        if not to_bytes(self.least) <= to_bytes(self.default) <= to_bytes(self.most):
            raise ValueError(f"default: {self.default} must lie between min ({self.least}) and max ({self.most})")
        return self

    def allow(self, amount: str) -> bool:
        return to_bytes(self.least) <= to_bytes(amount) <= to_bytes(self.most)


class ProfileVolume(Model):
    """Volume of all pods of a job, from exactly one source, written as in a PodSpec."""

    name: VolumeName
    mount_path: MountPath
    """Another than the trainer's own. /cache replaces the trainer's cache, from a source of the pod's own: emptyDir or
    ephemeral."""
    sub_path: str | None = None
    read_only: bool = True
    """Not of /cache, which is always written to."""
    config_map: Object | None = None
    csi: Object | None = None
    empty_dir: Object | None = None
    ephemeral: Object | None = None
    host_path: Object | None = None
    image: Object | None = None
    nfs: Object | None = None
    persistent_volume_claim: Object | None = None
    secret: Object | None = None

    sources: ClassVar = (
        "configMap",
        "csi",
        "emptyDir",
        "ephemeral",
        "hostPath",
        "image",
        "nfs",
        "persistentVolumeClaim",
        "secret",
    )

    @property
    def is_cache(self) -> bool:
        """Return whether the volume replaces the trainer's cache."""
        return self.mount_path.rstrip("/") == CACHE_FOLDER

    @property
    def source(self) -> Object:
        """Return the source as in a PodSpec."""
        return {to_camel(n): v for n, v in self if v is not None and to_camel(n) in self.sources}

    @model_validator(mode="after")
    def _is_one_volume_at_its_own_place(self) -> Self:
        given = ", ".join(self.source) or "none"
        if len(self.source) != 1:
            raise ValueError(f"volume {self.name} must have exactly one of {', '.join(self.sources)}; it has {given}")
        path = f"{self.mount_path.rstrip('/')}/"
        taken = [f for f in (*OWN_FOLDERS, CACHE_FOLDER) if f"{f}/".startswith(path) or path.startswith(f"{f}/")]
        if self.is_cache:
            if given not in ("emptyDir", "ephemeral"):
                raise ValueError(
                    f"mountPath: {CACHE_FOLDER} is written to by every pod, so its source must be the pod's own: "
                    f"emptyDir or ephemeral, not {given}"
                )
        elif taken:
            raise ValueError(f"mountPath: {self.mount_path} is at the trainer's own {taken[0]}; mount it elsewhere")
        return self


class Placement(Model):
    """Nodes for a pod, and what schedules and runs it there."""

    node_selector: dict[str, str] = {}
    affinity: Annotated[Object, AfterValidator(_affinity)] = {}
    tolerations: tuple[PodToleration, ...] = ()
    scheduler_name: str | None = None
    runtime_class_name: str | None = None
    """Runtime class of trainers. Not set: the operator's own."""
    annotations: Annotated[dict[str, str], AfterValidator(_of_others)] = {}
    """Annotations of the pods, such as Multus' networks."""


class PreparePod(Placement):
    """Pod of the stage that holds no GPU."""

    cpu: Quantity = "2"
    memory: Quantity = "8Gi"
    queue: Name | None = None
    """LocalQueue of Kueue in the jobs' namespaces. None: it waits for none, unless Kueue manages every Job."""


class PodProfile(Placement):
    """Everything that the pods of a job get by the name of a profile. What is not set is as the operator has it."""

    description: str = ""
    """For those who choose one."""
    gpu: Annotated[str, AfterValidator(known_gpu_name)] | None = None
    """Kind of its GPUs: a name of ``qlora plan``'s table."""
    gpu_resource: ResourceName | None = None
    """Requested once for each rank. Empty: its trainers run on the CPU."""
    topology_spread_constraints: tuple[TopologySpread, ...] = ()
    resources_per_gpu: dict[ResourceName, Quantity] = {}
    """Further resources for each GPU of a pod, such as vpc.amazonaws.com/efa."""
    resources_per_pod: dict[ResourceName, Quantity] = {}
    """Further resources of a pod, such as rdma/hca_shared."""
    ephemeral_storage: Quantity | None = None
    """Disk of the node that each pod requests."""
    cpu: AmountRange | None = None
    memory: AmountRange | None = None
    shared_memory: Quantity | None = None
    """For each GPU."""
    host_network: bool = False
    """Trainers use their node's network: one pod on a node, which no NetworkPolicy restricts."""
    labels: Annotated[dict[str, str], AfterValidator(_of_others)] = {}
    env: tuple[EnvVar, ...] = ()
    """Wins over the operator's own of the same name."""
    capabilities: tuple[Literal["IPC_LOCK", "NET_RAW", "SYS_NICE", "SYS_RESOURCE"], ...] = ()
    """Capabilities of the trainer's container; all others are dropped."""
    arbitrary_user: bool = False
    """The cluster chooses user and groups, as OpenShift does; else they are the image's."""
    volumes: tuple[ProfileVolume, ...] = ()
    prepare: PreparePod | None = None
    """None: as the operator's own settings say."""

    @model_validator(mode="after")
    def _names_each_volume_once(self) -> Self:
        for what in ("name", "mount_path"):
            values = [getattr(volume, what).rstrip("/") for volume in self.volumes]
            if twice := next((value for value in values if values.count(value) > 1), None):
                raise ValueError(f'volumes: "{twice}" is listed twice')
        return self
