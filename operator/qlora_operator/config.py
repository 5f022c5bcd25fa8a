"""The operator's settings: one file, read once, frozen. The chart renders it and documents its keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import AfterValidator, Field, StringConstraints, model_validator

from qlora_api.base import Model
from qlora_api.errors import validate
from qlora_api.spec import Gang
from qlora_api.spec.values import Quantity
from qlora_memory.gpus import GPUS
from qlora_operator.profile_types import EnvVar, PodProfile, PreparePod, ProfileName
from qlora_operator.quantities import add, to_bytes

Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]
LOGS = "1Gi"
"""Disk for the logs of one container until the kubelet rotates them, with room to spare."""
DEFAULT = "default"
"""Key of the price of GPUs that have none of their own."""


def _known_gpus(prices: dict[str, float]) -> dict[str, float]:
    for name in prices:
        if name != DEFAULT and name not in GPUS:
            raise ValueError(f'"{name}" is not known; use {DEFAULT} or one of {", ".join(sorted(GPUS))}')
    return prices


class PrepareConfig(PreparePod):
    """The stage that holds no GPU; a profile may have another pod for it."""

    enabled: bool = True
    deadline_seconds: int = Field(14_400, ge=60)
    """On its node. What takes longer hangs: a file system that does not answer, a source without an end."""


class TrainerPodConfig(Model):
    """Settings that all trainer pods share; a job cannot change them."""

    image: str
    image_pull_policy: str = "IfNotPresent"
    image_pull_secrets: tuple[str, ...] = ()
    service_account_name: str = "default"
    runtime_class_name: str | None = None
    device: Literal["CUDA", "CPU"] | None = None
    """Device to train on. Default: CUDA where a GPU resource is requested, else the CPU."""
    gpu: str | None = None
    """GPU of each rank if a job's nodes do not say it, by its name in the table of ``qlora plan``."""
    cpu: Quantity = "4"
    """For each rank; so are memory and shared_memory."""
    memory: Quantity = "32Gi"
    limit_cpu: bool = False
    """Limit pods of jobs, Prepare's too, to the CPUs that they request, as a quota on limits.cpu asks."""
    shared_memory: Quantity = "1Gi"
    cache_size_limit: Quantity = "200Gi"
    tmp_size_limit: Quantity = "20Gi"
    """The publish gate holds the adapter twice: 3.3 GB each at rank 64 for 70 billion parameters. The rest: kernels."""
    ephemeral_storage: Quantity | None = "10Gi"
    """Disk of the node that Prepare and trainers request. None: neither requested nor limited."""
    node_lost_seconds: int = Field(60, ge=1)
    grace_seconds: int = Field(120, ge=30, le=900)
    """Between SIGTERM and SIGKILL, until a job's own steps and saves are known to need more."""
    workload_identity: bool = False
    """Sign with the cloud identity of the pod or its node where a job names no credentials."""
    env: tuple[EnvVar, ...] = ()
    pod_labels: dict[str, str] = {}
    """Labels of all pods, beside pod_annotations. A job's own labels override these, and the operator's override
    both."""
    pod_annotations: dict[str, str] = {}

    @property
    def disk_limit(self) -> str:
        """Return what a pod may write to its node's disk: both volumes, and logs."""
        return add(self.cache_size_limit, self.tmp_size_limit, LOGS)

    @model_validator(mode="after")
    def _requests_no_more_than_the_limit(self) -> Self:
        if self.ephemeral_storage and to_bytes(self.ephemeral_storage) > to_bytes(self.disk_limit):
            raise ValueError(
                f"ephemeralStorage: {self.ephemeral_storage} must not exceed {self.disk_limit}, which cacheSizeLimit,"
                f" tmpSizeLimit and {LOGS} of logs allow"
            )
        return self


class NetworkPolicyConfig(Model):
    """Access to trainer pods over the network."""

    workers: bool = True
    """Make a NetworkPolicy for each job of several workers: none but its own pods reach their ports."""
    restricted_namespaces: tuple[str, ...] = ()
    """Namespaces in which the chart's own NetworkPolicy says who may read metrics. In others all may, as without a
    policy."""


class OperatorConfig(Model):
    """Everything the operator is told."""

    namespaces: tuple[str, ...] = ()
    """Empty: all."""
    release: Annotated[str, StringConstraints(min_length=1, max_length=253)] = "qlora-operator"
    """Tells this operator from others that serve the same namespaces; the chart has ``namespace/name``."""
    cluster: Annotated[str, StringConstraints(max_length=253)] = ""
    """Identity of the cluster, in the claims of destinations. Empty: a hash of its API server's CA certificate."""
    lease: Annotated[str, StringConstraints(pattern=r"^([-a-z0-9]+/[-a-z0-9.]+)?$")] = ""
    """``namespace/name`` of the Lease whose holder operates. Empty: there is one replica, which needs none."""
    gang: Gang = Gang.AUTO
    gpu_resource: str | None = "nvidia.com/gpu"
    """None: trainers run on the CPU."""
    shared_cache_uri: str | None = None
    progress_seconds: float = Field(15, gt=0)
    metrics_port: int = Field(9090, ge=0, le=65535)
    log_format: str = "text"
    price_per_gpu_hour: Annotated[dict[str, Price], AfterValidator(_known_gpus)] = {}
    """Price of a GPU-hour in any currency, by GPU name or ``default``. Empty: costs are not shown."""
    memory_config_map: Annotated[str, StringConstraints(pattern=r"^([-a-z0-9]+/[-a-z0-9.]+)?$")] = ""
    """``namespace/name`` of the ConfigMap with what was learned of memory. Empty: nothing is learned."""
    network_policy: NetworkPolicyConfig = NetworkPolicyConfig()
    prepare: PrepareConfig = PrepareConfig()
    trainer: TrainerPodConfig
    profiles: dict[ProfileName, PodProfile] = {}
    """By the name that jobs choose; ``default`` is for those that choose none."""

    @model_validator(mode="after")
    def _profiles_ask_for_no_more_disk_than_pods_may_fill(self) -> Self:
        for name, profile in self.profiles.items():
            limit = self.trainer.disk_limit
            if profile.ephemeral_storage and to_bytes(profile.ephemeral_storage) > to_bytes(limit):
                raise ValueError(
                    f"profiles.{name}.ephemeralStorage: {profile.ephemeral_storage} must not exceed {limit}, which"
                    f" trainer.cacheSizeLimit, trainer.tmpSizeLimit and {LOGS} of logs allow"
                )
        return self

    def price_of(self, gpu: str | None) -> float | None:
        """Return the price of one hour of a GPU; None: not known."""
        return self.price_per_gpu_hour.get(gpu or DEFAULT, self.price_per_gpu_hour.get(DEFAULT))

    @classmethod
    def read(cls, path: Path) -> OperatorConfig:
        """Read and check a file.

        Raises:
            qlora_api.errors.ManifestError: names every key that is wrong.

        """
        return validate(cls, yaml.safe_load(path.read_text(encoding="utf-8")) or {})
