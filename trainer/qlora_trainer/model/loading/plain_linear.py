"""Linear layers of a model's own class that compute what ``torch.nn.Linear`` does, such as Falcon's.

transformers' quantizer passes these by: it knows layers by their exact class.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional

_INPUTS, _OUTPUTS = 3, 5


def unify_linear_layers(model: nn.Module) -> None:
    """Make ``torch.nn.Linear`` of layers of a subclass that compute the same."""
    for module in model.modules():
        kind = type(module)
        if kind is not nn.Linear and isinstance(module, nn.Linear) and _is_plain(kind):  # type: ignore[arg-type]
            module.__class__ = nn.Linear


@cache
def _is_plain(kind: Any) -> bool:
    """Return whether a class adds nothing to its base class, found out by trying a small layer of it."""
    if kind.__module__.startswith(("bitsandbytes.", "peft.", "torch.")):
        return False
    try:
        with torch.device("cpu"), torch.no_grad():
            layer = kind(_INPUTS, _OUTPUTS)
            x = torch.linspace(-1, 1, 2 * _INPUTS).view(2, _INPUTS)
            found = layer(x)
            return isinstance(found, torch.Tensor) and torch.allclose(
                found, functional.linear(x, layer.weight, layer.bias), atol=1e-6
            )
    except Exception:  # noqa: BLE001 it is made, or called, in another way
        return False
