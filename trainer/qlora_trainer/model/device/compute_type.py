"""Decide in which type the base computes: as the job says, as the run began, or what the device does in hardware."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from qlora_api.spec import ComputeType, QuantizationSpec, QuantizationType
from qlora_memory.gpus import OLDEST
from qlora_trainer.errors import UserError
from qlora_trainer.model.device.hardware import bf16_in_hardware, fast_dtype, fp16_in_hardware

if TYPE_CHECKING:
    from qlora_api.contract import TrainerConfig
    from qlora_trainer.ranks import Ranks

FIELD = "spec.quantization.computeType"
DTYPES = {
    ComputeType.BFLOAT16: torch.bfloat16,
    ComputeType.FLOAT16: torch.float16,
    ComputeType.FLOAT32: torch.float32,
}
OF_OLD_CHECKPOINTS = ComputeType.BFLOAT16
"""The default of versions whose checkpoints do not say in which type they computed."""


def with_compute_type(config: TrainerConfig, ranks: Ranks, began_with: ComputeType | None) -> TrainerConfig:
    """Return the configuration with the compute type of this attempt in place of ``Auto``. A collective.

    Args:
        config: of the attempt.
        ranks: all of them get the same type: the best that every device has in hardware.
        began_with: the type of the checkpoint that the attempt resumes; None at the first attempt.

    Raises:
        UserError: on all ranks; the job names another type than the run began with, or a device cannot compute in it.

    """
    quantization = config.spec.quantization
    chosen = quantization.compute_type
    if began_with is not None:
        chosen = kept_type(chosen, began_with)
    elif chosen is ComputeType.AUTO:
        chosen = best_type(ranks)
    resolved = quantization.model_copy(update={"compute_type": chosen})
    problem = device_problem(resolved, ranks.device, resumes=began_with is not None)
    said = ranks.gather(None if problem is None else list(problem.arguments))
    if found := next((texts for texts in said if texts is not None), None):
        raise UserError(*found)
    return config.model_copy(update={"spec": config.spec.model_copy(update={"quantization": resolved})})


def resolved_on(quantization: QuantizationSpec, device: torch.device) -> QuantizationSpec:
    """Return the quantization with the type that ``device`` computes in fast in place of ``Auto``."""
    if quantization.compute_type is not ComputeType.AUTO:
        return quantization
    found = next(name for name, dtype in DTYPES.items() if dtype is fast_dtype(device))
    return quantization.model_copy(update={"compute_type": found})


def kept_type(wanted: ComputeType, began_with: ComputeType) -> ComputeType:
    """Return the type of a resumed run: the one it began with.

    Raises:
        UserError: the job names another one.

    """
    if wanted not in (ComputeType.AUTO, began_with):
        raise UserError(
            FIELD,
            wanted,
            f"differs from {began_with}, with which this run began: set {began_with} or Auto, or start a new run",
        )
    return began_with


def best_type(ranks: Ranks) -> ComputeType:
    """Return the type that every rank's device computes in fast. A collective."""
    device = ranks.device
    bf16, fp16 = ranks.sum(bf16_in_hardware(device), device.type == "cuda" and fp16_in_hardware(device))
    if bf16 == ranks.world_size:
        return ComputeType.BFLOAT16
    # On a CPU float32 is as fast, and needs no loss scaling.
    return ComputeType.FLOAT16 if fp16 == ranks.world_size else ComputeType.FLOAT32


def device_problem(quantization: QuantizationSpec, device: torch.device, *, resumes: bool = False) -> UserError | None:
    """Return why a device cannot compute as the job says, or as a resumed run began; None where it can."""
    if device.type == "cuda" and not fp16_in_hardware(device):
        major, minor = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
        return UserError(
            "spec.scheduling.nodeSelector",
            name,
            f"has compute capability {major}.{minor}; {OLDEST} or higher is needed",
        )
    if quantization.compute_type is not ComputeType.FLOAT16:
        return None
    if not fp16_in_hardware(device):
        remedy = (
            "resume this run, which began in it, on a GPU, or start a new run" if resumes else "set Auto or Float32"
        )
        return UserError(FIELD, ComputeType.FLOAT16, f"needs a GPU: this CPU has no float16 arithmetic; {remedy}")
    if quantization.type is QuantizationType.INT8:
        return UserError(
            "spec.quantization.type",
            quantization.type,
            "is not available with Float16: set NF4 or FP4, or computeType Float32",
        )
    return None


def slow_bf16_warning(quantization: QuantizationSpec, device: torch.device) -> str | None:
    """Return what BFloat16 costs on a device that emulates it, measured on one product; None where it is fast.

    It informs, and decides nothing.
    """
    if quantization.compute_type is not ComputeType.BFLOAT16 or bf16_in_hardware(device):
        return None
    rows, inner, columns = 256, 512, 512
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = (torch.ones(shape, dtype=dtype, device=device) for shape in ((rows, inner), (inner, columns)))
        (left @ right).sum().item()  # the first product sets up its kernel
        start = time.perf_counter()
        (left @ right).sum().item()
        seconds[dtype] = time.perf_counter() - start
    times = seconds[torch.bfloat16] / seconds[torch.float32]
    return (
        f"{FIELD}: this device emulates BFloat16: a matrix product takes {times:.1f} times as long as in Float32. "
        "A new run with Auto computes in a type that the device has in hardware"
    )
