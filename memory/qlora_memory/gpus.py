"""GPUs that a plan may be made for without having one.

``memory_bytes`` is what CUDA gives a process, ``total_memory`` of ``torch.cuda.get_device_properties``: less than the
name says, since the driver (and ECC on GDDR cards) keeps a share. Source: the lowest "has a total capacity of … GiB" in
PyTorch's out-of-memory messages of such cards. Speeds and bandwidths: NVIDIA's data sheets, dense, without sparsity.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from qlora_api.errors import FieldError, closest
from qlora_api.spec import ComputeType, QuantizationSpec, QuantizationType

GPU_PRODUCT = "nvidia.com/gpu.product"
"""Label of a node with the name of its GPU, as NVIDIA's GPU feature discovery sets it."""
CUBLAS_BYTES = 8_519_680
"""Workspace of one cuBLAS handle before Hopper."""
OLDEST = 7.0
"""Compute capability from which the trainer works: the first with tensor cores (Volta)."""
AMPERE = 8.0
"""First with bf16 and flash attention."""
HOPPER = 9.0
CONSUMER_BLACKWELL = 12.0
GIB = 1 << 30
MIB = 1 << 20


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    name: str
    memory_bytes: int
    """Memory that one process can allocate."""
    tflops: float
    """Dense bf16 (fp16 where there is no bf16), fp32 accumulation, 10¹² a second."""
    bandwidth: float
    """Bytes a second."""
    capability: float = 8.0
    """CUDA compute capability: 7.0 Volta, 7.5 Turing, 8.x Ampere and Ada, 9.0 Hopper, 10.0 and 12.0 Blackwell."""

    @property
    def trains(self) -> bool:
        """Return whether the trainer can use the GPU: it has tensor cores."""
        return self.capability >= OLDEST

    @property
    def ampere(self) -> bool:
        """Return whether the GPU has bf16 and flash attention."""
        return self.capability >= AMPERE

    @property
    def hopper(self) -> bool:
        """Return whether cuBLAS is given a workspace of 32 MiB in place of 8.1: Hopper and data-center Blackwell."""
        return HOPPER <= self.capability < CONSUMER_BLACKWELL

    @property
    def compute_type(self) -> ComputeType:
        """The type that ``quantization.computeType: Auto`` means here."""
        return ComputeType.BFLOAT16 if self.ampere else ComputeType.FLOAT16

    @property
    def workspace_bytes(self) -> int:
        """cuBLAS workspaces, one for the forward and one for autograd's thread.

        aten/src/ATen/cuda/CublasHandlePool.cpp: ``:4096:2:16:8`` (8,519,680 bytes), 32 MiB from Hopper on.
        """
        return 2 * (32 * MIB if self.hopper else CUBLAS_BYTES)


def _gpu(name: str, gib: float, tflops: float, tb: float, capability: float) -> Gpu:
    return Gpu(name, int(gib * GIB), tflops, tb * 1e12, capability)


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("b200-192gb", 178.35, 2250.0, 7.7, 10.0),
        _gpu("h200-141gb", 139.72, 989.5, 4.8, 9.0),
        _gpu("h100-80gb", 79.11, 989.5, 3.35, 9.0),
        _gpu("h100-pcie-80gb", 79.11, 756.0, 2.0, 9.0),
        _gpu("h100-nvl-94gb", 93.0, 835.5, 3.9, 9.0),
        _gpu("a100-80gb", 79.14, 312.0, 2.0, 8.0),
        _gpu("a100-40gb", 39.38, 312.0, 1.555, 8.0),
        _gpu("l40s-48gb", 44.34, 362.0, 0.864, 8.9),
        _gpu("l40-48gb", 44.34, 181.05, 0.864, 8.9),
        _gpu("a6000-48gb", 47.4, 154.8, 0.768, 8.6),
        _gpu("l4-24gb", 22.03, 121.0, 0.3, 8.9),
        _gpu("a10g-24gb", 22.05, 70.0, 0.6, 8.6),
        _gpu("rtx5090-32gb", 31.36, 209.5, 1.792, 12.0),
        _gpu("rtx4090-24gb", 23.52, 165.2, 1.008, 8.9),
        _gpu("rtx3090-24gb", 23.56, 71.0, 0.936, 8.6),
        _gpu("t4-16gb", 14.56, 65.0, 0.32, 7.5),
        _gpu("v100-32gb", 31.73, 125.0, 0.9, 7.0),
        _gpu("v100-16gb", 15.77, 125.0, 0.9, 7.0),
        _gpu("p100-16gb", 15.89, 21.2, 0.732, 6.0),
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
    ("P100 PCIE 16GB", "p100-16gb"),
    ("P100 SXM2 16GB", "p100-16gb"),
)
"""Words of what NVML and CUDA call them; the first of which a device's name holds all."""
_ANOTHER = re.compile(r"MIG|LAPTOP|MAX|TI|D|\d+[ABCQ]")
"""Words after which it is a part of a card (MIG, a virtual GPU's profile as 24Q), or another of the same number."""


def gpu_named(name: str, field: str = "--gpu") -> Gpu:
    """Return a GPU of the table.

    Raises:
        FieldError: there is none of this name.

    """
    found = GPUS.get(name.lower())
    if found is None:
        close = _resembling(name)
        hint = f"; did you mean {' or '.join(close)}? Known: " if close else "; there are "
        raise FieldError(field, name, f"is not known{hint}{', '.join(GPUS)}")
    return found


def _resembling(name: str) -> list[str]:
    """Return names of the table for a device's own name, or a part or misspelling of one in the table."""
    known = known_gpu(name)
    if known is not None:
        return [known.name]
    plain = re.sub(r"[^a-z0-9]", "", name.lower().removeprefix("nvidia"))
    return [gpu for gpu in GPUS if plain and plain in gpu.replace("-", "")] or closest(plain, GPUS, 3)


def check_gpu(gpu: Gpu, quantization: QuantizationSpec, field: str = "spec.scheduling.nodeSelector") -> None:
    """Refuse a GPU that the trainer cannot use, or not with this quantization.

    Args:
        gpu: the GPU of each rank.
        quantization: of the job.
        field: names the GPU.

    Raises:
        FieldError: it is older than Volta, or INT8 would have to compute in Float16.

    """
    if not gpu.trains:
        raise FieldError(
            field,
            gpu.name,
            f"has compute capability {gpu.capability}; the trainer needs {OLDEST} or higher: take one of Volta's or"
            " Turing's generation or newer, such as t4-16gb or l4-24gb",
        )
    if quantization.type is QuantizationType.INT8 and resolved(quantization, gpu).compute_type is ComputeType.FLOAT16:
        raise FieldError(
            "spec.quantization.type",
            quantization.type,
            f"is not available on {gpu.name}, which has no bf16: set NF4 or FP4, or computeType Float32",
        )


def resolved(quantization: QuantizationSpec, gpu: Gpu | None, *, cuda: bool = True) -> QuantizationSpec:
    """Return the quantization with the compute type that ``Auto`` means on a device.

    The trainer asks the device itself. For planning, a GPU that is not known is taken to have bf16; a CPU is taken to
    have none, which needs more memory.
    """
    if quantization.compute_type is not ComputeType.AUTO:
        return quantization
    on_gpu = gpu.compute_type if gpu else ComputeType.BFLOAT16
    return quantization.model_copy(update={"compute_type": on_gpu if cuda else ComputeType.FLOAT32})


def known_gpu(device_name: str) -> Gpu | None:
    """The GPU of the table that NVML or CUDA calls by this name, or feature discovery, which has dashes for spaces.

    None where it is not known: cards that only share a part of the name, and parts of a card.
    """
    words = set(device_name.upper().replace("-", " ").split())
    if any(_ANOTHER.fullmatch(word) for word in words):
        return None
    return next((GPUS[name] for needed, name in _NAMES if words.issuperset(needed.split())), None)


def gpu_of_device(device_name: str, memory_bytes: int) -> Gpu:
    """Return the GPU that this machine has: speeds from the table where its name is known, memory as it says."""
    known = known_gpu(device_name)
    if known is None:
        return Gpu(device_name, memory_bytes, tflops=100.0, bandwidth=0.6e12)
    return Gpu(device_name, memory_bytes, known.tflops, known.bandwidth, known.capability)
