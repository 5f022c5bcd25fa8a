"""The harness's own promises about a control plane."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.api import ClusterApiError
from cluster.control_plane import ControlPlane, KubectlError, Settings
from cluster.waits import wait_until_ended

TOOLS = Path(__file__).parents[2] / "tools"


def config_map(name: str) -> dict:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"key": "value"}}


def test_objects_are_created_changed_and_deleted(control_plane: ControlPlane, namespace: str):
    path = f"/api/v1/namespaces/{namespace}/configmaps/one"
    control_plane.api.create(config_map("one"), namespace)
    control_plane.api.apply({**config_map("one"), "data": {"key": "changed"}}, namespace)
    control_plane.api.patch(path, {"metadata": {"labels": {"a": "b"}}})
    assert control_plane.api.get(path)["data"] == {"key": "changed"}
    assert json.loads(control_plane.kubectl("get", "cm", "-n", namespace, "-l", "a=b", "-o", "json"))["items"]
    control_plane.api.delete(path)
    control_plane.api.wait_gone(path)
    with pytest.raises(ClusterApiError, match="404 NotFound"):
        control_plane.api.get(path)


def test_a_service_account_may_do_what_rbac_says_and_no_more(control_plane: ControlPlane, namespace: str):
    control_plane.kubectl("create", "serviceaccount", "reader", "-n", namespace)
    control_plane.kubectl("create", "role", "reader", "--verb=get,list", "--resource=configmaps", "-n", namespace)
    account = f"--serviceaccount={namespace}:reader"
    control_plane.kubectl("create", "rolebinding", "reader", "--role=reader", account, "-n", namespace)
    reader = control_plane.service_account_kubeconfig(namespace, "reader")
    assert "kube-root-ca.crt" in control_plane.kubectl("get", "configmaps", kubeconfig=reader)
    with pytest.raises(KubectlError, match=rf"system:serviceaccount:{namespace}:reader.*cannot list resource"):
        control_plane.kubectl("get", "pods", kubeconfig=reader)


def test_a_user_is_who_its_kubeconfig_names(control_plane: ControlPlane):
    jane = control_plane.user_kubeconfig("jane", ["developers"])
    who = json.loads(control_plane.kubectl("auth", "whoami", "-o", "json", kubeconfig=jane))["status"]["userInfo"]
    assert (who["username"], who["groups"]) == ("jane", ["developers", "system:authenticated"])


def test_the_audit_log_says_who_wrote_what(control_plane: ControlPlane, namespace: str):
    mark = control_plane.audit_mark()
    control_plane.api.create(config_map("audited"), namespace)
    control_plane.kubectl("delete", "configmap", "audited", "-n", namespace)
    written = [r for r in control_plane.requests_since(mark) if r.is_write and r.name == "audited"]
    assert [(r.verb, r.resource, r.code, r.user_agent.split("/")[0]) for r in written] == [
        ("create", "configmaps", 201, "cluster-harness"),
        ("delete", "configmaps", 200, "kubectl"),
    ]


def test_pod_security_is_enforced_by_the_namespaces_label(control_plane: ControlPlane):
    restricted = control_plane.create_namespace(labels={"pod-security.kubernetes.io/enforce": "restricted"})
    container = {"name": "main", "image": "none", "securityContext": {"privileged": True}}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": {"containers": [container]}}
    with pytest.raises(ClusterApiError, match=r'403 Forbidden.*violates PodSecurity "restricted'):
        control_plane.api.create(pod, restricted)


def test_two_clusters_run_at_once_and_an_api_server_can_restart(control_plane: ControlPlane, tmp_path: Path):
    with ControlPlane(tmp_path, Settings(gang_scheduling=False)) as other:
        assert other.url != control_plane.url
        other.api.create(config_map("kept"))
        others = [pid for name, pid in other.pids.items() if name != "kube-apiserver"]
        other.stop_api_server()
        other.start_api_server()
        assert other.api.get("/api/v1/namespaces/default/configmaps/kept")["data"] == {"key": "value"}
        assert [pid for name, pid in other.pids.items() if name != "kube-apiserver"] == others
        with pytest.raises(ClusterApiError, match="404"):
            other.api.get("/apis/scheduling.k8s.io/v1alpha2")
        pids = list(other.pids.values())
    assert wait_until_ended(pids, seconds=0) == []
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_no_process_outlives_the_harness(control_plane: ControlPlane, tmp_path: Path, how: signal.Signals):
    script = (
        "import pathlib, sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from cluster.control_plane import ControlPlane\n"
        "with ControlPlane(pathlib.Path(sys.argv[2])) as c: print(*c.pids.values(), flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", script, TOOLS, tmp_path / "cluster"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=dict(os.environ)
    ) as harness:
        pids = [int(pid) for pid in harness.stdout.readline().split()]
        harness.send_signal(how)
        harness.wait(30)
    assert len(pids) == 4
    assert wait_until_ended(pids) == []
