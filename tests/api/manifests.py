"""Valid manifests, and changes to them."""

from __future__ import annotations

import copy
from typing import Any

VALID: dict[str, Any] = {
    "apiVersion": "qlora.dev/v1alpha1",
    "kind": "QLoRAJob",
    "metadata": {"name": "docs"},
    "spec": {
        "model": {"source": "hf://org/base@main"},
        "dataset": {"train": {"source": "s3://bucket/rows"}, "format": "PromptCompletion"},
        "training": {"epochs": 1},
        "output": {"destination": "s3://bucket/adapters/docs"},
    },
}


def manifest(**changes: Any) -> dict[str, Any]:
    """The valid manifest with ``spec`` fields set by path: ``manifest(training__epochs=2)``; None removes."""
    made = copy.deepcopy(VALID)
    for path, value in changes.items():
        *groups, name = path.split("__")
        place = made["spec"]
        for group in groups:
            place = place.setdefault(group, {})
        if value is None:
            place.pop(name, None)
        else:
            place[name] = value
    return made
