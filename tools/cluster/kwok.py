"""Fake nodes: kwok plays the kubelet, so that pods run, end and fail as their annotations say, and nothing executes.

Annotations of a pod, all strings, and what their absence means:

=============================================  ===================================================================
``test.qlora.dev/start-seconds``               time in Pending after it is scheduled; none
``test.qlora.dev/run-seconds``                 time in Running; it runs until it is deleted
``test.qlora.dev/exit-code``                   of all its containers at the end; 0
``test.qlora.dev/reason``                      of the end, such as OOMKilled; Completed or Error
``test.qlora.dev/termination-message``         of the end; none
``test.qlora.dev/stop-seconds``                time from deletion to the end, at most the grace period; none
``test.qlora.dev/stop-exit-code``              after a deletion; 143, or 137 if it outlasts the grace period
``test.qlora.dev/stop-message``                termination message after a deletion; none
``test.qlora.dev/pod-ip``                      its address, such as a loopback address where the test serves; a fake one
=============================================  ===================================================================
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cluster.node.nodes import is_usable
from cluster.processes import ServerProcess
from services.binaries import find_or_build
from services.tools import KWOK

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from cluster.api import ClusterApi, Object
    from cluster.control_plane import ControlPlane

STAGES = Path(__file__).with_name("kwok-stages.yaml")
MANAGED = "kwok.x-k8s.io/node"
PREFIX = "test.qlora.dev/"
LEASE_SECONDS = 40
"""As a kubelet's."""
CPUS, MEMORY, DISK, PODS = "128", "1Ti", "10Ti", "110"
"""Capacity of a fake node, which is that of an 8-GPU machine."""


class Kwok:
    """One kwok for one cluster. A context manager."""

    def __init__(self, cluster: ControlPlane) -> None:
        self._binary = find_or_build(KWOK)
        self._cluster = cluster
        self._nodes = 0
        kubeconfig = cluster.user_kubeconfig("kwok", ["system:masters"])
        self._process = ServerProcess(
            "kwok",
            [
                *(self._binary, f"--kubeconfig={kubeconfig}", f"--config={STAGES}"),
                *(f"--cidr={cluster.addresses.fake_pod_range}", f"--node-lease-duration-seconds={LEASE_SECONDS}"),
                f"--manage-nodes-with-annotation-selector={MANAGED}=fake",
            ],
            cluster.logs,
        )

    def stop(self) -> None:
        self._process.kill()

    def add_nodes(
        self, count: int, *, gpus: int, labels: Mapping[str, str], taints: Iterable[Object], prefix: str
    ) -> list[str]:
        """Create nodes and wait until they are ready; their names."""
        names = [f"{prefix}-{self._nodes + number}" for number in range(count)]
        self._nodes += count
        for name in names:
            self._cluster.api.create(_node(name, gpus, labels, list(taints)))
        for name in names:
            self._cluster.api.wait_for(f"/api/v1/nodes/{name}", is_usable, what=f"node {name} ready")
        return names


def lose_node(api: ClusterApi, name: str) -> None:
    """Cut a fake node off: its pods stay as they are, deleted or not, and the control plane knows at once.

    The node controller taints it and, after the pods' toleration, deletes them; they hang until the node is back.
    """
    _mark_lost(api, name, "true")
    unknown = {"type": "Ready", "status": "Unknown", "reason": "NodeStatusUnknown", "message": "lost by the test"}
    api.patch(f"/api/v1/nodes/{name}/status", {"status": {"conditions": [unknown]}}, kind="strategic")


def find_node_again(api: ClusterApi, name: str) -> None:
    """Undo ``lose_node``: the node reports itself ready, and its pods go on where they were."""
    _mark_lost(api, name, None)
    api.wait_for(f"/api/v1/nodes/{name}", is_usable, what=f"node {name} ready")


def finish_pod(
    api: ClusterApi, namespace: str, name: str, *, exit_code: int = 0, message: str = "", reason: str = ""
) -> Object:
    """End a running fake pod now; the pod as it is then."""
    path = f"/api/v1/namespaces/{namespace}/pods/{name}"
    wanted = {"run-seconds": "0", "exit-code": str(exit_code), "termination-message": message, "reason": reason}
    api.patch(path, {"metadata": {"annotations": {f"{PREFIX}{key}": value for key, value in wanted.items() if value}}})
    return api.wait_for(path, lambda pod: pod["status"]["phase"] in ("Succeeded", "Failed"), what=f"end of pod {name}")


def finish_container(
    api: ClusterApi, namespace: str, name: str, *, exit_code: int = 0, message: str = "", trainer: bool = True
) -> None:
    """End the trainer's container of a running fake pod, or all others; the rest goes on, and so the pod does."""
    path = f"/api/v1/namespaces/{namespace}/pods/{name}"
    status = api.get(path)["status"]
    terminated = {"exitCode": exit_code, "reason": "Error" if exit_code else "Completed", "message": message}
    ended = {"ready": False, "started": False, "state": {"terminated": terminated}}
    containers = [{**c, **ended} if (c["name"] == "trainer") is trainer else c for c in status["containerStatuses"]]
    unready = {"Ready": "False", "ContainersReady": "False"}
    conditions = [{**c, "status": unready.get(c["type"], c["status"])} for c in status["conditions"]]
    api.patch(f"{path}/status", {"status": {"conditions": conditions, "containerStatuses": containers}})


def _mark_lost(api: ClusterApi, node: str, value: str | None) -> None:
    mark = {"metadata": {"annotations": {f"{PREFIX}lost": value}}}
    api.patch(f"/api/v1/nodes/{node}", mark)
    for pod in api.list("/api/v1/pods", fieldSelector=f"spec.nodeName={node}"):
        api.patch(f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}", mark)


def _node(name: str, gpus: int, labels: Mapping[str, str], taints: list[Object]) -> Object:
    resources = {"cpu": CPUS, "memory": MEMORY, "ephemeral-storage": DISK, "pods": PODS}
    if gpus:
        resources["nvidia.com/gpu"] = str(gpus)
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "annotations": {MANAGED: "fake"},
            "labels": {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "type": "kwok", **labels},
        },
        "spec": {"taints": taints},
        "status": {"capacity": resources, "allocatable": resources},
    }
