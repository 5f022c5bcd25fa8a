"""Make a node usable, real or fake."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.api import Object


def is_ready(node: Object) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in node["status"].get("conditions", ()))


def is_usable(node: Object) -> bool:
    """Ready, and the scheduler may know it: the node controller has taken its taints away."""
    return is_ready(node) and not any(
        t["key"].startswith("node.kubernetes.io/") for t in node["spec"].get("taints", ())
    )
