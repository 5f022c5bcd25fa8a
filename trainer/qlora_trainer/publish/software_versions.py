"""Record what a training ran on and with, to explain why two runs differ."""

from __future__ import annotations

import platform
from contextlib import suppress

import pynvml
import torch

from qlora_trainer.publish.adapter_manifest import installed_packages


def software_versions() -> dict[str, str]:
    """Return the versions of packages, CUDA and driver, the memory of the GPU, and the machine."""
    found = installed_packages()
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["gpuMemory"] = str(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
        with suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            found["driver"] = str(pynvml.nvmlSystemGetDriverVersion())
    return {**found, "system": platform.platform()}
