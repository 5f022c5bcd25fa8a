"""Resolve the profile of a job's pods: what the platform team gives, and what the job may change of it. Pure."""

from __future__ import annotations

from typing import Literal

from qlora_api.profile_names import DEFAULT_PROFILE, unknown_profile
from qlora_api.spec import QLoRAJobSpec, SchedulingSpec
from qlora_memory.gpus import GPU_PRODUCT, known_gpu
from qlora_operator.config import OperatorConfig
from qlora_operator.profile_types import AmountRange, PodProfile, PreparePod

UNKNOWN_PROFILE = "is not a profile of this cluster"


def profile_of(spec: QLoRAJobSpec, config: OperatorConfig) -> PodProfile | None:
    """Return the profile of a job; its GPUs and how they are run are the operator's where it does not say.

    None where there is none of the name that the job gives.
    """
    name, trainer = spec.scheduling.profile or DEFAULT_PROFILE, config.trainer
    profile = config.profiles.get(name, PodProfile() if name == DEFAULT_PROFILE else None)
    if profile is None:
        return None
    resource = config.gpu_resource if profile.gpu_resource is None else profile.gpu_resource
    same_gpus = resource == config.gpu_resource and GPU_PRODUCT not in profile.node_selector
    runtime = profile.runtime_class_name or (trainer.runtime_class_name if resource else None)
    gpu = profile.gpu or (trainer.gpu if same_gpus else None)
    return profile.model_copy(update={"gpu": gpu, "gpu_resource": resource, "runtime_class_name": runtime})


def cpu_of(profile: PodProfile, config: OperatorConfig) -> AmountRange:
    """Return the CPUs for each GPU of a trainer."""
    return profile.cpu or AmountRange(default=config.trainer.cpu)


def memory_of(profile: PodProfile, config: OperatorConfig) -> AmountRange:
    """Return the memory for each GPU of a trainer."""
    return profile.memory or AmountRange(default=config.trainer.memory)


def prepare_of(spec: QLoRAJobSpec, config: OperatorConfig) -> PreparePod:
    """Return Prepare's pod: the profile's own, else the operator's."""
    profile = config.profiles.get(spec.scheduling.profile or DEFAULT_PROFILE)
    return (profile and profile.prepare) or config.prepare


def profile_problem(scheduling: SchedulingSpec, config: OperatorConfig) -> str:
    """Return why no pod can be made by the profile of a job, with what is allowed; empty where one can."""
    name = scheduling.profile or DEFAULT_PROFILE
    if problem := unknown_profile(name, config.profiles, UNKNOWN_PROFILE):
        return f'spec.scheduling.profile: "{name}" {problem}'
    profile = config.profiles.get(name, PodProfile())
    amounts = (
        ("cpu", scheduling.cpu, cpu_of(profile, config)),
        ("memory", scheduling.memory, memory_of(profile, config)),
    )
    for field, asked, bounds in amounts:
        if asked is not None and not bounds.allow(asked):
            allowed = bounds.least if bounds.least == bounds.most else f"{bounds.least} to {bounds.most}"
            return f'spec.scheduling.{field}: "{asked}" is not allowed by profile "{name}": {allowed} for each GPU'
    for key, value in scheduling.node_selector.items():
        if profile.node_selector.get(key, value) != value:
            given = profile.node_selector[key]
            return (
                f'spec.scheduling.nodeSelector: {key} is "{value}", and profile "{name}" has "{given}": leave it out, '
                "or choose another profile"
            )
    return ""


def device_of(spec: QLoRAJobSpec, config: OperatorConfig) -> Literal["CUDA", "CPU"]:
    """Return what a job's ranks compute on."""
    profile = profile_of(spec, config)
    resource = config.gpu_resource if profile is None else profile.gpu_resource
    return config.trainer.device or ("CUDA" if resource else "CPU")


def gpu_of(spec: QLoRAJobSpec, config: OperatorConfig) -> str | None:
    """Return which GPU a rank gets: the product that its nodes must have, else the profile's, else the operator's.

    The product is NVIDIA's feature discovery's. One that is not known, or a part of a card (MIG), is not taken for the
    operator's.
    """
    profile = profile_of(spec, config)
    if profile is None or device_of(spec, config) == "CPU":
        return None
    product = spec.scheduling.node_selector.get(GPU_PRODUCT)
    if product is None and profile.gpu is None:
        product = profile.node_selector.get(GPU_PRODUCT)
    if product is None:
        return profile.gpu
    known = known_gpu(product)
    return known.name if known else None
