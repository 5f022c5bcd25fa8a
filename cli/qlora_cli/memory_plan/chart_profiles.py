"""Read from the values of the operator's chart which GPU the pods of a profile get."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from qlora_api.errors import FieldError
from qlora_api.profile_names import DEFAULT_PROFILE, unknown_profile
from qlora_memory.gpus import GPU_PRODUCT, known_gpu

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from qlora_api.spec import SchedulingSpec


def gpu_of_profile(scheduling: SchedulingSpec, path: Path) -> str:
    """Return the GPU of the profile that a job names, by a name of the table of ``qlora plan``.

    Raises:
        FieldError: there is no such profile, or it does not say which GPU its pods get.

    """
    values = _read(path)
    profiles, name = values.get("profiles") or {}, scheduling.profile or DEFAULT_PROFILE
    if problem := unknown_profile(name, profiles, f"is not a profile of {path}"):
        raise FieldError("spec.scheduling.profile", name, problem)
    found = _gpu(profiles.get(name) or {}, values, scheduling.node_selector.get(GPU_PRODUCT))
    if not found:
        raise FieldError(
            "--gpu", None, f'is required, as profile "{name}" of {path} does not say which GPU its pods get'
        )
    return found


def _gpu(profile: Mapping[str, Any], values: Mapping[str, Any], product: str | None) -> str | None:
    """Return the GPU of the pods of a profile as the operator finds it; None: not known, or they have none.

    Args:
        profile: as the chart's values have it.
        values: of the whole chart.
        product: GPU that the job's own nodes have.

    """
    trainer, usual = values.get("trainer") or {}, values.get("gpuResource", "nvidia.com/gpu")
    own, selector = profile.get("gpuResource"), profile.get("nodeSelector") or {}
    resource = usual if own is None else own
    if (trainer.get("device") or ("CUDA" if resource else "CPU")) == "CPU":
        return None
    gpu: str | None = profile.get("gpu")
    if gpu is None and GPU_PRODUCT in selector:
        product = product or selector[GPU_PRODUCT]
    elif gpu is None and resource == usual:
        gpu = trainer.get("gpu")
    if product is None:
        return gpu
    known = known_gpu(product)
    return known.name if known else None


def _read(path: Path) -> dict[str, Any]:
    """Return the chart's values, or the operator's configuration in a ConfigMap.

    Raises:
        FieldError: it is neither.

    """
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(read, dict) and read.get("kind") == "ConfigMap":
            read = yaml.safe_load(read["data"]["config.yaml"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError) as error:
        raise FieldError("--profiles", str(path), f"cannot be read: {error}") from None
    if not isinstance(read, dict) or not isinstance(read.get("profiles") or {}, dict):
        raise FieldError("--profiles", str(path), "must hold the values of the operator's chart, with profiles")
    return read
