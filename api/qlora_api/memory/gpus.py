"""GPUs that a plan may be made for without having one.

``memory_bytes`` is what CUDA gives a process, ``total_memory`` of ``torch.cuda.get_device_properties``: less than the
name says, since the driver (and ECC on GDDR cards) keeps a share. Source: the lowest "has a total capacity of … GiB" in
PyTorch's out-of-memory messages of such cards. Speeds and bandwidths: NVIDIA's data sheets, dense, without sparsity.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from qlora_api.errors import FieldMistake

CUBLAS_BYTES = 8_519_680
"""Of one cuBLAS handle before Hopper."""
GIB = 1 << 30
MIB = 1 << 20


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    name: str
    memory_bytes: int
    """What a process can have."""
    tflops: float
    """Dense bf16 (fp16 where there is no bf16), fp32 accumulation, 10¹² a second."""
    bandwidth: float
    """Bytes a second."""
    flash: bool = True
    """Has bf16 and flash attention (compute capability 8.0): without it rows cannot be packed by the trainer."""
    hopper: bool = False
    """cuBLAS is given a workspace of 32 MiB in place of 8.1."""

    @property
    def workspace_bytes(self) -> int:
        """cuBLAS workspaces, one for the forward and one for autograd's thread.

        aten/src/ATen/cuda/CublasHandlePool.cpp: ``:4096:2:16:8`` (8,519,680 bytes), 32 MiB from Hopper on.
        """
        return 2 * (32 * MIB if self.hopper else CUBLAS_BYTES)


def _gpu(name: str, gib: float, tflops: float, tb: float, *, flash: bool = True, hopper: bool = False) -> Gpu:
    return Gpu(name, int(gib * GIB), tflops, tb * 1e12, flash, hopper)


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("b200-192gb", 178.35, 2250.0, 7.7, hopper=True),
        _gpu("h200-141gb", 139.72, 989.5, 4.8, hopper=True),
        _gpu("h100-80gb", 79.11, 989.5, 3.35, hopper=True),
        _gpu("h100-pcie-80gb", 79.11, 756.0, 2.0, hopper=True),
        _gpu("h100-nvl-94gb", 93.0, 835.5, 3.9, hopper=True),
        _gpu("a100-80gb", 79.14, 312.0, 2.0),
        _gpu("a100-40gb", 39.38, 312.0, 1.555),
        _gpu("l40s-48gb", 44.34, 362.0, 0.864),
        _gpu("l40-48gb", 44.34, 181.05, 0.864),
        _gpu("a6000-48gb", 47.4, 154.8, 0.768),
        _gpu("l4-24gb", 22.03, 121.0, 0.3),
        _gpu("a10g-24gb", 22.05, 70.0, 0.6),
        _gpu("rtx5090-32gb", 31.36, 209.5, 1.792),
        _gpu("rtx4090-24gb", 23.52, 165.2, 1.008),
        _gpu("rtx3090-24gb", 23.56, 71.0, 0.936),
        _gpu("t4-16gb", 14.56, 65.0, 0.32, flash=False),
        _gpu("v100-32gb", 31.73, 125.0, 0.9, flash=False),
        _gpu("v100-16gb", 15.77, 125.0, 0.9, flash=False),
    )
}
_NAMES = (
    ("B200", "b200-192gb"),
    ("H200", "h200-141gb"),
    ("H100 NVL", "h100-nvl-94gb"),
    ("H100 PCIE", "h100-pcie-80gb"),
    ("H100 80GB HBM3", "h100-80gb"),
    ("A100 40GB", "a100-40gb"),
    ("A100 80GB", "a100-80gb"),
    ("L40S", "l40s-48gb"),
    ("L40", "l40-48gb"),
    ("A6000", "a6000-48gb"),
    ("L4", "l4-24gb"),
    ("A10G", "a10g-24gb"),
    ("RTX 5090", "rtx5090-32gb"),
    ("RTX 4090", "rtx4090-24gb"),
    ("RTX 3090", "rtx3090-24gb"),
    ("T4", "t4-16gb"),
    ("V100 32GB", "v100-32gb"),
    ("V100 16GB", "v100-16gb"),
)
"""Words of what NVML and CUDA call them; the first of which a device's name holds all."""
_ANOTHER = re.compile(r"MIG|LAPTOP|MAX|TI|D|\d+[ABCQ]")
"""Words after which it is a part of a card (MIG, a virtual GPU's profile as 24Q), or another of the same number."""


def gpu_named(name: str, field: str = "--gpu") -> Gpu:
    """A GPU of the table.

    Raises:
        FieldMistake: there is none of this name.

    """
    found = GPUS.get(name.lower())
    if found is None:
        raise FieldMistake(field, name, f"is not known; there are {', '.join(GPUS)}")
    return found


def must_train(gpu: Gpu, field: str = "spec.scheduling.nodeSelector") -> None:
    """Take only what the trainer can use.

    Raises:
        FieldMistake: it has neither bf16 nor flash attention.

    """
    if not gpu.flash:
        raise FieldMistake(
            field,
            gpu.name,
            "has neither bf16 nor flash attention, which the trainer uses on a GPU: take one of Ampere's generation or"
            " newer, such as l4-24gb or a100-40gb",
        )


def known_gpu(device_name: str) -> Gpu | None:
    """The GPU of the table that NVML or CUDA calls by this name, or feature discovery, which has dashes for spaces.

    None where it is not known: cards that only share a part of the name, and parts of a card.
    """
    words = set(device_name.upper().replace("-", " ").split())
    if any(_ANOTHER.fullmatch(word) for word in words):
        return None
    return next((GPUS[name] for needed, name in _NAMES if words.issuperset(needed.split())), None)


def gpu_of_device(device_name: str, memory_bytes: int) -> Gpu:
    """The GPU that this machine has: speeds from the table where its name is known, memory as it says."""
    known = known_gpu(device_name)
    if known is None:
        return Gpu(device_name, memory_bytes, tflops=100.0, bandwidth=0.6e12)
    return Gpu(device_name, memory_bytes, known.tflops, known.bandwidth, known.flash, known.hopper)
