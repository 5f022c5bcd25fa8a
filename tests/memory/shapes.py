"""Configurations of published models, and jobs for them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from api.manifests import manifest
from qlora_api.spec import QLoRAJobSpec
from qlora_memory import GPUS, ModelShape, PlanRequest, model_shape


def figures() -> ModuleType:
    """benchmarks/memory_figures.py, which has the published runs."""
    path = Path(__file__).parents[2] / "benchmarks" / "memory_figures.py"
    known = sys.modules.get("memory_figures")
    if known is not None:
        return known
    found = importlib.util.spec_from_file_location("memory_figures", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["memory_figures"] = module
    sys.path.append(str(path.parent))  # for what it imports beside it
    found.loader.exec_module(module)
    return module


LLAMA_8B: dict[str, Any] = figures().LLAMA_8B
LLAMA_70B: dict[str, Any] = figures().MODELS["Llama-3.1-70B"]


def llama_8b(**changes: Any) -> ModelShape:
    return model_shape({**LLAMA_8B, **changes})


def spec(**changes: Any) -> QLoRAJobSpec:
    """A job's spec with fields set by path, as ``manifest`` does."""
    return QLoRAJobSpec.model_validate(manifest(**changes)["spec"])


def request(
    gpu: str = "h100-80gb", world_size: int = 1, config: dict[str, Any] | None = None, **changes: Any
) -> PlanRequest:
    """Ask for a plan of a small job on one kind of GPU."""
    fields = {"dataset__maxLength": 2048, "training__globalBatchSize": 16, **changes}
    return PlanRequest(spec(**fields), model_shape(config or LLAMA_8B), GPUS[gpu], world_size)
