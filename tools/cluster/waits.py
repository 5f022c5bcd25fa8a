"""Wait for what no watch announces: processes that end, conditions of Jobs, ResourceQuotas that are counted."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from testing.timeouts import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.api import ClusterApi, Object
    from cluster.control_plane import ControlPlane

SOON = 15
"""Seconds in which what happened unseen is found out."""
POLL_SECONDS = 0.05


def eventually(holds: Callable[[], object], seconds: float = SOON) -> bool:
    """Return whether something holds within a time."""
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return bool(holds())


def is_alive(pid: int) -> bool:
    """Return whether a process runs; one that has ended and that nobody waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_ended(pids: list[int], seconds: float = 10) -> list[int]:
    """Those that still run in the end."""
    deadline = time.monotonic() + seconds
    while (alive := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return alive


def wait_for_condition(cluster: ControlPlane, namespace: str, job: str, condition: str, seconds: float = 30) -> None:
    def holds(found: Object) -> bool:
        return any(c["type"] == condition and c["status"] == "True" for c in found["status"].get("conditions", ()))

    path = f"/apis/batch/v1/namespaces/{namespace}/jobs/{job}"
    cluster.api.wait_for(path, holds, seconds=seconds, what=f"Job {job} {condition}")


def wait_until_counted(api: ClusterApi, namespace: str, quota: str, seconds: float = PATIENCE_SECONDS) -> None:
    """Wait until a ResourceQuota is counted. Before, everything that it bounds is refused."""

    def counted(found: Object) -> bool:
        return found["spec"]["hard"].keys() <= found.get("status", {}).get("used", {}).keys()

    path = f"/api/v1/namespaces/{namespace}/resourcequotas/{quota}"
    api.wait_for(path, counted, seconds=seconds, what=f"ResourceQuota {quota} is counted")
