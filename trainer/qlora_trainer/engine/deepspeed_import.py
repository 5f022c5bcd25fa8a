"""Import DeepSpeed without MLflow.

DeepSpeed's autotuner, which is loaded with it and not used here, imports MLflow wherever that is installed: two seconds
and 80 to 110 MB in each rank. MLflow is for the processes of the tracking tools alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def not_importable(module: str) -> Iterator[None]:
    """Let imports of a module that is not loaded yet fail, as where it is not installed."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]  # documented: import raises ModuleNotFoundError
    try:
        yield
    finally:
        del sys.modules[module]


with not_importable("mlflow"):
    import deepspeed

__all__ = ["deepspeed"]
