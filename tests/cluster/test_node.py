"""The harness's own promises about a real node: pods are containers that reach each other."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from cluster.control_plane import ControlPlane, KubectlError, Settings
from cluster.leftovers import remove_leftovers
from cluster.node import cgroups
from cluster.node.images import BUSYBOX_IMAGE
from cluster.node.node import require_node_tools
from cluster.node.nodes import is_ready
from cluster.waits import eventually, wait_for_condition, wait_until_ended
from fixtures import skip_unless_ci
from qlora_operator.decide.attempts import attempt_outcome
from services.binaries import ToolMissingError, find_or_build
from services.tools import CONTROL_PLANE, KUBECTL, NODE

if TYPE_CHECKING:
    from cluster.api import Object

GREET = """
if [ "$JOB_COMPLETION_INDEX" = 0 ]; then
  echo "hello from $(hostname)" | nc -l -p 4000
else
  until greeting=$(nc -w 5 greet-0.greet 4000 2>/dev/null) && [ -n "$greeting" ]; do sleep 0.2; done
  echo "$greeting" | tee /dev/termination-log
fi
"""


def pod(name: str, script: str, **more: object) -> Object:
    container = {"name": "main", "image": BUSYBOX_IMAGE, "command": ["sh", "-c", script], **more}
    spec = {"restartPolicy": "Never", "terminationGracePeriodSeconds": 1, "containers": [container]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}}, "spec": spec}


def service(name: str, selector: dict, port: int, **more: object) -> Object:
    spec = {"selector": selector, "ports": [{"port": port}], **more}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}


def wait_for_phase(cluster: ControlPlane, namespace: str, name: str, phase: str, seconds: float = 30) -> Object:
    path, what = f"/api/v1/namespaces/{namespace}/pods/{name}", f"pod {name} {phase}"
    return cluster.api.wait_for(path, lambda pod: pod["status"]["phase"] == phase, what=what, seconds=seconds)


def test_two_workers_of_a_job_meet_by_name(node_cluster: ControlPlane, node_namespace: str):
    api = node_cluster.api
    api.create(service("greet", {"job-name": "greet"}, 4000, clusterIP="None"), node_namespace)
    template = pod("greet", GREET, resources={"limits": {"nvidia.com/gpu": "2"}})["spec"]
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "greet"},
        "spec": {
            "completionMode": "Indexed",
            "completions": 2,
            "parallelism": 2,
            "backoffLimit": 0,
            "template": {"spec": {**template, "subdomain": "greet"}},
        },
    }
    api.create(job, node_namespace)
    wait_for_condition(node_cluster, node_namespace, "greet", "Complete")
    pods = api.list(f"/api/v1/namespaces/{node_namespace}/pods", labelSelector="job-name=greet")
    (asked,) = [p for p in pods if p["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"] == "1"]
    terminated = asked["status"]["containerStatuses"][0]["state"]["terminated"]
    assert (terminated["exitCode"], terminated["message"]) == (0, "hello from greet-0\n")
    assert node_cluster.kubectl("logs", asked["metadata"]["name"], "-n", node_namespace) == "hello from greet-0\n"


def test_a_pod_is_reached_by_exec_by_address_and_by_service(node_cluster: ControlPlane, node_namespace: str):
    api = node_cluster.api
    api.create(pod("web", "echo hi > index.html; exec httpd -f -p 8000"), node_namespace)
    made = api.create(service("web", {"app": "web"}, 8000), node_namespace)
    running = wait_for_phase(node_cluster, node_namespace, "web", "Running")
    for address in (running["status"]["podIP"], made["spec"]["clusterIP"]):
        assert _get_eventually(f"http://{address}:8000/") == "hi\n"
    inside = ["exec", "-n", node_namespace, "web", "--", "wget", "-qO-", "http://web:8000/"]
    assert node_cluster.kubectl(*inside) == "hi\n"


def test_a_service_account_reaches_the_api_from_its_pod(node_cluster: ControlPlane, node_namespace: str):
    folder = "/var/run/secrets/kubernetes.io/serviceaccount"
    name = "kubernetes.default.svc.cluster.local"
    script = f"test -s {folder}/token && nslookup {name} && until nc {name} 443 </dev/null; do sleep 0.2; done"
    node_cluster.api.create(pod("inside", script), node_namespace)
    wait_for_phase(node_cluster, node_namespace, "inside", "Succeeded")


def test_a_container_that_uses_too_much_memory_is_killed(node_cluster: ControlPlane, node_namespace: str):
    limits = {"limits": {"memory": "16Mi"}}
    node_cluster.api.create(pod("greedy", "tail /dev/zero", resources=limits), node_namespace)
    failed = wait_for_phase(node_cluster, node_namespace, "greedy", "Failed")
    terminated = failed["status"]["containerStatuses"][0]["state"]["terminated"]
    assert (terminated["exitCode"], terminated["reason"]) == (137, "OOMKilled")


def test_a_pod_that_fills_its_nodes_disk_is_evicted_in_the_words_that_the_operator_knows(
    node_cluster: ControlPlane, node_namespace: str
):
    filling = "head -c 8388608 /dev/zero > /tmp/file; exec sleep 600"
    limits = {"requests": {"ephemeral-storage": "1Mi"}, "limits": {"ephemeral-storage": "2Mi"}}
    for name, volume, resources in (("volume", {"sizeLimit": "1Mi"}, {}), ("limit", {}, limits)):
        manifest = pod(name, filling, resources=resources, volumeMounts=[{"name": "tmp", "mountPath": "/tmp"}])
        manifest["spec"]["volumes"] = [{"name": "tmp", "emptyDir": volume}]
        node_cluster.api.create(manifest, node_namespace)
    # The kubelet measures volumes each minute.
    volume, limit = (
        wait_for_phase(node_cluster, node_namespace, name, "Failed", seconds=240)["status"]
        for name in ("volume", "limit")
    )
    assert (volume["reason"], limit["reason"]) == ("Evicted", "Evicted")
    assert attempt_outcome._OVERFULL.search(volume["message"]).groups() == ("tmp", "1Mi")
    assert attempt_outcome._OVER_LIMIT.search(limit["message"])[1] == "2Mi"


def test_a_node_is_lost_comes_back_and_leaves_nothing(tmp_path: Path):
    _skip_without_tools()
    with ControlPlane(tmp_path / "cluster", Settings(real_nodes=True, node_grace_seconds=4)) as cluster:
        first, second = cluster.add_node("first", gpus=1), cluster.add_node("second", labels={"disk": "ssd"})
        namespace = cluster.create_namespace()
        served, asks = pod("served", "echo hi > index.html; exec httpd -f -p 8000"), pod("asks", "sleep 600")
        served["spec"]["nodeSelector"], asks["spec"]["nodeName"] = {"disk": "ssd"}, "first"
        for manifest in (served, asks, service("served", {"app": "served"}, 8000)):
            cluster.api.create(manifest, namespace)
        for name in ("served", "asks"):
            wait_for_phase(cluster, namespace, name, "Running")
        ask = "until wget -qO- http://served:8000/ 2>/dev/null; do sleep 0.2; done"
        across = ("exec", "-n", namespace, "asks", "--", "sh", "-c", ask)
        assert _kubectl_eventually(cluster, *across) == "hi\n"

        first.stop_kubelet()
        cluster.api.wait_for("/api/v1/nodes/first", lambda node: not is_ready(node), what="first node lost")
        first.start_kubelet()
        assert cluster.api.get("/api/v1/nodes/first")["status"]["capacity"]["nvidia.com/gpu"] == "1"
        assert _kubectl_eventually(cluster, *across) == "hi\n"

        second.stop()
        second.start()
        wait_for_phase(cluster, namespace, "served", "Failed")
        bridge = cluster.addresses.bridge
        pids = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _is_of(p, tmp_path)]
        assert len(pids) > 10
    assert wait_until_ended(pids, seconds=0) == []
    assert not Path(f"/sys/class/net/{bridge}").exists()
    assert not cgroups.names(f"{bridge}-")
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


def test_a_killed_harness_takes_its_containers_along(tmp_path: Path):
    script = (
        "import pathlib, sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from cluster.control_plane import ControlPlane, Settings\n"
        "with ControlPlane(pathlib.Path(sys.argv[2]), Settings(real_nodes=True)) as c:\n"
        "    c.add_node(); print(c.addresses.bridge, flush=True); time.sleep(600)"
    )
    _skip_without_tools()
    folder = tmp_path / "cluster"
    command = [sys.executable, "-c", script, Path(__file__).parents[2] / "tools", folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as harness:
        bridge = harness.stdout.readline().strip()
        assert Path(f"/sys/class/net/{bridge}").exists()
        kubectl = [find_or_build(KUBECTL), "--kubeconfig", folder / "admin.kubeconfig"]
        run = [*kubectl, "run", "sleeper", f"--image={BUSYBOX_IMAGE}", "--", "sleep", "31536000"]
        subprocess.run(run, check=True, capture_output=True)
        wait = [*kubectl, "wait", "pod/sleeper", "--for=condition=Ready", "--timeout=30s"]
        subprocess.run(wait, check=True, capture_output=True)
        pids = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _is_of(p, folder)]
        sleepers = [pid for pid in pids if b"31536000" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        left = _left_of(bridge)
        harness.kill()
    assert sleepers
    assert wait_until_ended(pids) == []
    assert len(left) > 1

    def is_removed() -> bool:
        remove_leftovers()  # passes over a number that another harness looks at in this very moment
        return not left & _left_of(bridge)

    assert eventually(is_removed)


def _left_of(bridge: str) -> set[tuple[str, int]]:
    """A cluster's bridge and control groups, by name and number: the next cluster may take the name over at once."""
    folders = [Path(f"/sys/class/net/{bridge}/ifindex"), *map(cgroups.path, cgroups.names(f"{bridge}-"))]
    numbers = ((p.name, int(p.read_text()) if p.is_file() else p.stat().st_ino) for p in folders if p.exists())
    return set(numbers)


def _skip_without_tools() -> None:
    try:
        require_node_tools()
        for tool in (*CONTROL_PLANE, *NODE):
            find_or_build(tool)
    except ToolMissingError as error:
        skip_unless_ci(str(error))


def _is_of(process: Path, folder: Path) -> bool:
    """Return whether a process sees the folder in its arguments, root or mounts: those of a node's namespace do."""
    try:
        return str(folder).encode() in (process / "cmdline").read_bytes() + (process / "mountinfo").read_bytes()
    except OSError:
        return False


def _kubectl_eventually(cluster: ControlPlane, *arguments: str, seconds: float = 10) -> str:
    """A kubelet that has just started finds its pods again within a second or two."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return cluster.kubectl(*arguments)
        except KubectlError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _get_eventually(url: str, seconds: float = 10) -> str:
    deadline = time.monotonic() + seconds
    while True:
        try:
            return httpx.get(url, timeout=2, trust_env=False).raise_for_status().text
        except httpx.HTTPError:
            if time.monotonic() > deadline:
                pytest.fail(f"{url} does not answer")
            time.sleep(0.1)
