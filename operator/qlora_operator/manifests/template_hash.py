"""Tell a child Job that waits from the one that is wanted now: spec or settings were corrected meanwhile. Pure."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from qlora_operator.names import CONFIG_ANNOTATION, TEMPLATE_ANNOTATION


def with_template_hash(child: dict[str, Any]) -> dict[str, Any]:
    """Return a child Job with the hash of what its pods are made of, without the trainer's configuration.

    The configuration has all of the spec in it, and most of that is no reason to lose a place in a queue.
    """
    metadata, pod = child["metadata"], child["spec"]["template"]
    annotations = {name: text for name, text in pod["metadata"]["annotations"].items() if name != CONFIG_ANNOTATION}
    parts = [metadata["labels"], pod["metadata"]["labels"], annotations, pod["spec"]]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    annotated = {**metadata, "annotations": {**metadata.get("annotations", {}), TEMPLATE_ANNOTATION: digest}}
    return {**child, "metadata": annotated}


def template_hash(child: dict[str, Any]) -> str:
    """Return the hash that a rendered child Job has."""
    digest: str = child["metadata"]["annotations"][TEMPLATE_ANNOTATION]
    return digest
