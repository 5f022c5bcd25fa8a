"""The operator's settings: one file, read once, frozen. The chart renders it and documents its keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, StringConstraints

from qlora_api.base import Model
from qlora_api.errors import validate
from qlora_api.spec import Gang

Quantity = Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?([EPTGM]i?|[kKm]|Ki)?$", max_length=32)]
"""As Kubernetes writes amounts: 500m, 4, 16Gi."""


class EnvVar(Model):
    name: str
    value: str


class PrepareConfig(Model):
    """The stage that holds no GPU."""

    enabled: bool = True
    cpu: Quantity = "2"
    memory: Quantity = "8Gi"


class TrainerPodConfig(Model):
    """What all trainer pods have in common; a job cannot change it."""

    image: str
    image_pull_policy: str = "IfNotPresent"
    image_pull_secrets: tuple[str, ...] = ()
    service_account_name: str = "default"
    runtime_class_name: str | None = None
    device: Literal["CUDA", "CPU"] | None = None
    """What trains. Default: CUDA where a GPU resource is requested, else the CPU."""
    gpu: str | None = None
    """Which GPU a rank gets, where a job's nodes do not say it: a name of ``qlora plan``'s table."""
    cpu: Quantity = "4"
    """For each rank; so are memory and shared_memory."""
    memory: Quantity = "32Gi"
    shared_memory: Quantity = "1Gi"
    cache_size_limit: Quantity = "200Gi"
    node_lost_seconds: int = Field(60, ge=1)
    grace_seconds: int = Field(120, ge=30, le=900)
    """Between SIGTERM and SIGKILL, until a job's own steps and saves are known to need more."""
    env: tuple[EnvVar, ...] = ()


class OperatorConfig(Model):
    """Everything the operator is told."""

    namespaces: tuple[str, ...] = ()
    """Empty: all."""
    gang: Gang = Gang.AUTO
    gpu_resource: str | None = "nvidia.com/gpu"
    """None: trainers run on the CPU."""
    shared_cache_uri: str | None = None
    progress_seconds: float = Field(15, gt=0)
    metrics_port: int = Field(9090, ge=0, le=65535)
    log_format: str = "text"
    memory_config_map: str = ""
    prepare: PrepareConfig = PrepareConfig()
    trainer: TrainerPodConfig

    @classmethod
    def read(cls, path: Path) -> OperatorConfig:
        """Read and check a file.

        Raises:
            qlora_api.errors.ManifestError: names every key that is wrong.

        """
        return validate(cls, yaml.safe_load(path.read_text(encoding="utf-8")) or {})
