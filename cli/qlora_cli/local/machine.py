"""Find what this machine can train on. NVML answers in milliseconds where torch takes seconds to load."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from qlora_api.errors import FieldError
from qlora_cli.text import units
from qlora_memory.gpus import known_gpu

CPU_RANKS = 2
"""Enough to go through all that several ranks do, few enough for any laptop."""
MOST_RANKS = 1024


@dataclass(frozen=True)
class LocalGpu:
    uuid: str
    name: str
    memory_bytes: int


@dataclass(frozen=True)
class Machine:
    """The GPUs that a process started here would see."""

    gpus: tuple[LocalGpu, ...] = ()
    note: str = ""
    """Reason why there are no GPUs, if it is not obvious."""


@dataclass(frozen=True)
class World:
    """The ranks of a run."""

    device: Literal["CUDA", "CPU"]
    ranks: int
    description: str
    gpu: str | None = None
    """The smallest of its GPUs, by its name in ``qlora_memory.GPUS``; None where that is not known."""


def look() -> Machine:
    """Ask NVML for the GPUs, and the environment for those in use."""
    # NVML's own rules of dates and stubs: it has no types.
    import pynvml  # noqa: PLC0415

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        silent = error.value in (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
        return Machine(note="" if silent else f"NVML does not answer: {error}")
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        gpus = tuple(
            LocalGpu(pynvml.nvmlDeviceGetUUID(h), pynvml.nvmlDeviceGetName(h), pynvml.nvmlDeviceGetMemoryInfo(h).total)
            for h in handles
        )
    except pynvml.NVMLError as error:
        return Machine(note=f"NVML does not answer: {error}")
    finally:
        pynvml.nvmlShutdown()
    seen = visible(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    hidden = f"CUDA_VISIBLE_DEVICES hides {len(gpus) - len(seen)} of {len(gpus)} GPUs" if len(seen) < len(gpus) else ""
    return Machine(seen, hidden)


def visible(gpus: tuple[LocalGpu, ...], setting: str | None) -> tuple[LocalGpu, ...]:
    """Apply CUDA_VISIBLE_DEVICES as CUDA does: indices or UUID prefixes; the first that names no GPU ends the list."""
    if setting is None:
        return gpus
    seen: list[LocalGpu] = []
    for entry in setting.split(","):
        name = entry.strip()
        if name.isdecimal():
            named = gpus[int(name) : int(name) + 1]
        else:
            named = tuple(g for g in gpus if name.startswith("GPU-") and g.uuid.startswith(name))
        if len(named) != 1 or named[0] in seen:
            break
        seen += named
    return tuple(seen)


def choose_world(machine: Machine, ranks: int | None) -> World:
    """Return all GPUs, or two CPU processes; ``ranks`` overrides the number.

    Raises:
        FieldError: more ranks than GPUs.

    """
    if ranks is not None and not 1 <= ranks <= MOST_RANKS:
        raise FieldError("--ranks", ranks, f"must be 1 to {MOST_RANKS}")
    if not machine.gpus:
        count = ranks or CPU_RANKS
        return World("CPU", count, f"{count} CPU process{'es' if count > 1 else ''}, no GPU")
    most = len(machine.gpus)
    if ranks is not None and ranks > most:
        raise FieldError("--ranks", ranks, f"must be at most {most}: one for each GPU")
    count = ranks or most
    used = machine.gpus[:count]
    kinds = sorted({f"{g.name} ({units.size(g.memory_bytes)})" for g in used})
    known = known_gpu(min(used, key=lambda gpu: gpu.memory_bytes).name)
    return World("CUDA", count, f"{count} × {', '.join(kinds)}", known.name if known else None)
