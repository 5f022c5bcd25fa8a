"""Paths of QLoRAJobs and QLoRASweeps in the API."""

from __future__ import annotations

from qlora_api.job import GROUP, VERSION
from qlora_operator.state.cache import Key


def jobs_path(namespace: str) -> str:
    """Return the path of a namespace's QLoRAJobs."""
    return f"/apis/{GROUP}/{VERSION}/namespaces/{namespace}/qlorajobs"


def job_path(key: Key) -> str:
    """Return the path of a QLoRAJob."""
    return f"{jobs_path(key[0])}/{key[1]}"


def sweep_path(key: Key) -> str:
    """Return the path of a QLoRASweep."""
    return f"/apis/{GROUP}/{VERSION}/namespaces/{key[0]}/qlorasweeps/{key[1]}"
