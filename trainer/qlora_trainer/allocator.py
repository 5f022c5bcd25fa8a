"""The C library's allocator, told to keep freed memory for the next step.

glibc returns large freed blocks to the kernel, and a training step frees and allocates the same hundreds of MB again
and again. Each page is then zeroed and mapped anew at its first touch: a minor page fault of 0.1 to 20 µs, the latter
on some virtual machines, where a step can spend most of its time in them.
"""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
"""Parameters of mallopt(3), from glibc's malloc.h."""
KEPT_BLOCK_BYTES = (1 << 30, 32 << 20)
"""Blocks up to this size are taken from the heap, which keeps them; larger ones are mapped and unmapped by themselves.
Activations and chunks of logits (128 MiB) are smaller. glibc before 2.35 takes no more than 32 MiB."""
THRESHOLDS = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}
NEVER = -1
"""Value of M_TRIM_THRESHOLD with which the end of the heap is never given back."""


def keep_freed_memory() -> bool:
    """Have this process keep the memory that it frees; call it before large allocations.

    Memory peaks stay as they are, but what was freed after a peak is not given to other processes. Where the
    environment sets the allocator's thresholds (mallopt(3)) or any ``glibc.malloc`` tunable, they stay.

    Returns:
        Whether it was done; False also where the C library is not glibc.

    """
    if THRESHOLDS & os.environ.keys() or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # The first value that is taken counts.
    return any(mallopt(M_MMAP_THRESHOLD, size) for size in KEPT_BLOCK_BYTES) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
