"""Read from the values of the operator's chart which GPU the pods of a profile get."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from qlora_api.errors import FieldError, closest
from qlora_memory.gpus import known_gpu

if TYPE_CHECKING:
    from pathlib import Path

    from qlora_api.spec import SchedulingSpec

DEFAULT = "default"
GPU_PRODUCT = "nvidia.com/gpu.product"


def gpu_of_profile(scheduling: SchedulingSpec, path: Path) -> str:
    """Return the GPU of the profile that a job names, by a name of the table of ``qlora plan``.

    Raises:
        FieldError: there is no such profile, or it does not say which GPU its pods get.

    """
    values = _read(path)
    profiles, name = values.get("profiles") or {}, scheduling.profile or DEFAULT
    if name != DEFAULT and name not in profiles:
        close = closest(name, profiles, 1)
        hint = f'; did you mean "{close[0]}"? Allowed' if close else "; allowed"
        allowed = ", ".join(sorted({DEFAULT, *profiles}))
        raise FieldError("spec.scheduling.profile", name, f"is no profile of {path}{hint}: {allowed}")
    profile = profiles.get(name) or {}
    product = scheduling.node_selector.get(GPU_PRODUCT)
    if product is None and not profile.get("gpu"):
        product = (profile.get("nodeSelector") or {}).get(GPU_PRODUCT)
    same = profile.get("gpuResource") in (None, values.get("gpuResource", "nvidia.com/gpu"))
    found: str | None = profile.get("gpu") or ((values.get("trainer") or {}).get("gpu") if same else None)
    if product is not None:
        known = known_gpu(product)
        found = known.name if known else None
    if not found:
        raise FieldError(
            "--gpu", None, f'is required, as profile "{name}" of {path} does not say which GPU its pods get'
        )
    return found


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
