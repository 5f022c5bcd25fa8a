"""The harness's own promises about fake nodes, and what native gang scheduling does for Jobs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.kwok import PREFIX, find_node_again, finish_container, finish_pod, lose_node
from cluster.waits import wait_for_condition

if TYPE_CHECKING:
    from cluster.api import Object
    from cluster.control_plane import ControlPlane


def indexed_job(name: str, pods: int, *, gpus: int = 1, grace_seconds: int = 30, **annotations: str) -> Object:
    container = {"name": "main", "image": "none", "resources": {"limits": {"nvidia.com/gpu": str(gpus)}}}
    behaviour = {f"{PREFIX}{key.replace('_', '-')}": value for key, value in annotations.items()}
    pod = {"restartPolicy": "Never", "containers": [container], "terminationGracePeriodSeconds": grace_seconds}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {
            "completionMode": "Indexed",
            "parallelism": pods,
            "completions": pods,
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            "template": {"metadata": {"annotations": behaviour}, "spec": pod},
        },
    }


def wait_for_running(cluster: ControlPlane, namespace: str, job: str, count: int) -> list[Object]:
    """Pods of a Job, once so many of them run."""

    def enough(pods: Object) -> bool:
        return sum(pod["status"]["phase"] == "Running" for pod in pods["items"]) == count

    path = f"/api/v1/namespaces/{namespace}/pods"
    return cluster.api.wait_for(path, enough, labelSelector=f"job-name={job}", what=f"{count} running")["items"]


def scheduled(pod: Object) -> str:
    """True, False once the scheduler has refused it, or empty before."""
    return next((c["status"] for c in pod["status"].get("conditions", ()) if c["type"] == "PodScheduled"), "")


def terminated(pod: Object) -> Object:
    return pod["status"]["containerStatuses"][0]["state"]["terminated"]


def test_a_job_of_two_pods_completes(kwok_cluster: ControlPlane, kwok_namespace: str):
    kwok_cluster.api.create(indexed_job("job", 2, gpus=8, run_seconds="0.2"), kwok_namespace)
    wait_for_condition(kwok_cluster, kwok_namespace, "job", "Complete")
    pods = kwok_cluster.api.list(f"/api/v1/namespaces/{kwok_namespace}/pods")
    assert len({pod["spec"]["nodeName"] for pod in pods}) == 2
    assert all(pod["status"]["podIP"].startswith("10.") for pod in pods)


def test_a_pod_ends_as_its_annotations_say(kwok_cluster: ControlPlane, kwok_namespace: str):
    message = '{"reason": "OutOfMemory"}'
    job = indexed_job(
        "job", 1, run_seconds="0", exit_code="42", termination_message=message, reason="OOMKilled", pod_ip="127.0.0.1"
    )
    kwok_cluster.api.create(job, kwok_namespace)
    wait_for_condition(kwok_cluster, kwok_namespace, "job", "Failed")
    (pod,) = kwok_cluster.api.list(f"/api/v1/namespaces/{kwok_namespace}/pods")
    assert (pod["status"]["phase"], pod["status"]["podIP"]) == ("Failed", "127.0.0.1")
    assert {k: terminated(pod)[k] for k in ("exitCode", "message", "reason")} == {
        "exitCode": 42,
        "message": message,
        "reason": "OOMKilled",
    }


def test_a_pod_runs_until_a_test_ends_it(kwok_cluster: ControlPlane, kwok_namespace: str):
    kwok_cluster.api.create(indexed_job("job", 2), kwok_namespace)
    first, second = wait_for_running(kwok_cluster, kwok_namespace, "job", 2)
    ended = finish_pod(kwok_cluster.api, kwok_namespace, first["metadata"]["name"], exit_code=3, message="three")
    assert (terminated(ended)["exitCode"], terminated(ended)["message"]) == (3, "three")
    other = kwok_cluster.api.get(f"/api/v1/namespaces/{kwok_namespace}/pods/{second['metadata']['name']}")
    assert other["status"]["phase"] == "Running"


def test_a_deleted_pod_ends_gracefully_before_it_vanishes(kwok_cluster: ControlPlane, kwok_namespace: str):
    job = indexed_job("job", 1, stop_seconds="0.5", stop_exit_code="7", stop_message="saved")
    kwok_cluster.api.create(job, kwok_namespace)
    (pod,) = wait_for_running(kwok_cluster, kwok_namespace, "job", 1)
    path = f"/api/v1/namespaces/{kwok_namespace}/pods/{pod['metadata']['name']}"
    held = {"metadata": {"finalizers": [*pod["metadata"]["finalizers"], "test.qlora.dev/look"]}}
    kwok_cluster.api.patch(path, held)
    kwok_cluster.api.delete(path)
    assert kwok_cluster.api.get(path)["status"]["phase"] == "Running"
    ended = kwok_cluster.api.wait_for(path, lambda pod: pod["status"]["phase"] == "Failed")
    assert (terminated(ended)["exitCode"], terminated(ended)["message"]) == (7, "saved")
    kwok_cluster.api.patch(path, {"metadata": {"finalizers": None}})
    kwok_cluster.api.wait_gone(path)


def test_a_container_that_has_ended_keeps_its_end_when_its_pod_is_deleted(
    kwok_cluster: ControlPlane, kwok_namespace: str
):
    kwok_cluster.api.create(indexed_job("job", 1, stop_message="saved"), kwok_namespace)
    (pod,) = wait_for_running(kwok_cluster, kwok_namespace, "job", 1)
    name = pod["metadata"]["name"]
    path = f"/api/v1/namespaces/{kwok_namespace}/pods/{name}"
    kwok_cluster.api.patch(path, {"metadata": {"finalizers": ["test.qlora.dev/look"]}})
    finish_container(kwok_cluster.api, kwok_namespace, name, exit_code=41, message="no memory", trainer=False)
    kwok_cluster.api.delete(path)
    ended = kwok_cluster.api.wait_for(path, lambda pod: pod["status"]["phase"] == "Failed")
    assert (terminated(ended)["exitCode"], terminated(ended)["message"]) == (41, "no memory")
    kwok_cluster.api.patch(path, {"metadata": {"finalizers": None}})


def test_a_pod_that_outlasts_its_grace_period_is_killed(kwok_cluster: ControlPlane, kwok_namespace: str):
    kwok_cluster.api.create(indexed_job("job", 1, grace_seconds=1, stop_seconds="60"), kwok_namespace)
    (pod,) = wait_for_running(kwok_cluster, kwok_namespace, "job", 1)
    path = f"/api/v1/namespaces/{kwok_namespace}/pods/{pod['metadata']['name']}"
    kwok_cluster.api.patch(path, {"metadata": {"finalizers": ["test.qlora.dev/look"]}})
    kwok_cluster.api.delete(path)
    ended = kwok_cluster.api.wait_for(path, lambda pod: pod["status"]["phase"] == "Failed")
    assert terminated(ended)["exitCode"] == 137
    kwok_cluster.api.patch(path, {"metadata": {"finalizers": None}})


def test_two_gangs_that_do_not_fit_together_run_one_after_the_other(kwok_cluster: ControlPlane, kwok_namespace: str):
    # Three of four nodes each: placed pod by pod, two and two would hold the nodes and wait for each other for ever.
    for name in ("one", "two"):
        kwok_cluster.api.create(indexed_job(name, 3, gpus=8), kwok_namespace)
    path = f"/api/v1/namespaces/{kwok_namespace}/pods"

    def is_decided(pods: Object) -> bool:
        states = [scheduled(pod) for pod in pods["items"]]
        return states.count("True") == states.count("False") == 3

    pods = kwok_cluster.api.wait_for(path, is_decided, what="three pods placed, three refused")["items"]
    first, second = (
        {pod["metadata"]["labels"]["job-name"] for pod in pods if scheduled(pod) == s} for s in ("True", "False")
    )
    assert (len(first), len(second)) == (1, 1)
    for pod in wait_for_running(kwok_cluster, kwok_namespace, *first, 3):
        finish_pod(kwok_cluster.api, kwok_namespace, pod["metadata"]["name"])
    wait_for_running(kwok_cluster, kwok_namespace, *second, 3)


def test_a_lost_node_keeps_its_pods_until_it_is_back(kwok_cluster: ControlPlane, kwok_namespace: str):
    kwok_cluster.api.create(indexed_job("job", 2, gpus=8), kwok_namespace)
    lost, _ = wait_for_running(kwok_cluster, kwok_namespace, "job", 2)
    node, path = lost["spec"]["nodeName"], f"/api/v1/namespaces/{kwok_namespace}/pods/{lost['metadata']['name']}"
    lose_node(kwok_cluster.api, node)
    try:
        deleted = kwok_cluster.api.wait_for(path, lambda pod: pod["metadata"].get("deletionTimestamp"))
        assert deleted["status"]["phase"] == "Running"
        assert any(c["type"] == "DisruptionTarget" for c in deleted["status"]["conditions"])
    finally:
        find_node_again(kwok_cluster.api, node)
    kwok_cluster.api.wait_gone(path)
