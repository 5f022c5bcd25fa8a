"""The QLoRAJob API: names, types, conditions and the contract between whoever starts a trainer and the trainer.

The types are loaded when they are asked for: the command line uses modules without them, and starts sooner.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_api.job import API_VERSION, KIND, QLoRAJob
    from qlora_api.spec import QLoRAJobSpec

__all__ = ["API_VERSION", "KIND", "QLoRAJob", "QLoRAJobSpec"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("qlora_api.spec" if name == "QLoRAJobSpec" else "qlora_api.job"), name)
