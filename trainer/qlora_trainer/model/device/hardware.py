"""Number formats that a device supports in hardware, decided in one place.

A format without hardware still works, by conversion or emulation, and is many times slower: a bfloat16 matrix product
takes 40 times as long as a float32 one on a CPU with AVX2 alone. Nothing is timed to decide, so that the same machine
always gives the same numbers.
"""

from __future__ import annotations

import platform

import torch

BF16_CAPABILITY = (8, 0)
"""First CUDA compute capability with bfloat16 tensor cores (Ampere). CUDA C++ Programming Guide, section 20."""
FP16_CAPABILITY = (7, 0)
"""First CUDA compute capability with float16 tensor cores (Volta)."""


def bf16_in_hardware(device: torch.device) -> bool:
    """Return whether ``device`` multiplies bfloat16 matrices by hardware.

    On CUDA from compute capability 8.0. On a CPU with AVX512_BF16, AMX or Arm's BF16 instructions, unless
    ``ONEDNN_MAX_CPU_ISA`` keeps oneDNN from AVX-512 altogether.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= BF16_CAPABILITY
    if not _onednn("bf16"):
        return False
    return not _is_x86() or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # noqa: SLF001 no public names


def fp16_in_hardware(device: torch.device) -> bool:
    """Return whether ``device`` multiplies float16 matrices by hardware.

    On CUDA from compute capability 7.0. On a CPU with AVX512_FP16, AMX-FP16 or Arm's FP16 instructions.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= FP16_CAPABILITY
    return _onednn("fp16")


def _onednn(name: str) -> bool:
    """Return whether oneDNN takes matrices of a format on this CPU; False in a build of PyTorch without oneDNN."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")())


def _is_x86() -> bool:
    return platform.machine().lower() in {"x86_64", "amd64", "i686"}


def fast_dtype(device: torch.device) -> torch.dtype:
    """Return the type for inference on ``device``: the smallest that it computes in by hardware."""
    if bf16_in_hardware(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" and fp16_in_hardware(device) else torch.float32
