"""Status says within seconds what holds a job up, and nothing that is not so."""

from __future__ import annotations

import time

from cluster.kwok import find_node_again, lose_node
from cluster.scenarios.forked_operator import ForkedOperator
from cluster.scenarios.jobs import condition, create_job, in_state, last_attempt, qlora_job
from cluster.scenarios.script import gate_on_pods, jobs_are_suspended, pods_do
from cluster.scenarios.whole_life import ADAPTER, ends, word

LONG = 60
JOBS_AT_ONCE, REPEATS, QUEUED_SECONDS = 12, 20, 5


def test_jobs_that_are_suspended_as_they_are_made_say_queued_within_seconds(
    api, crd_cluster, fork_server, kwok_namespace, tmp_path
):
    slowest = 0.0
    settings = {"namespaces": [kwok_namespace], "progressSeconds": 15}
    with (
        jobs_are_suspended(api, kwok_namespace),
        ForkedOperator(fork_server, tmp_path, crd_cluster.kubeconfig, **settings),
    ):
        for repeat in range(REPEATS):
            names = [f"job-{repeat}-{number}" for number in range(JOBS_AT_ONCE)]
            paths = [create_job(api, qlora_job(name, kwok_namespace)) for name in names]
            created = time.monotonic()
            for path in paths:
                api.wait_for(path, in_state("Pending", "Queued"), seconds=LONG)
            slowest = max(slowest, time.monotonic() - created)
            for path in paths:
                api.delete(path)
    assert slowest < QUEUED_SECONDS, f"{slowest:.2f} s"


def test_a_suspension_on_a_lost_node_becomes_suspended(api, crd_cluster, fork_server, kwok_namespace, tmp_path):
    settings = {"namespaces": [kwok_namespace], "trainer": {"graceSeconds": 30, "nodeLostSeconds": 600}}
    with ForkedOperator(fork_server, tmp_path, crd_cluster.kubeconfig, **settings):
        path = create_job(api, qlora_job(namespace=kwok_namespace))
        node = last_attempt(api.wait_for(path, in_state("Running"), seconds=LONG))["node"]
        lose_node(api, node)
        try:
            api.patch(path, {"spec": {"suspend": True}})
            suspended = api.wait_for(path, in_state("Suspended"), seconds=90)
        finally:
            find_node_again(api, node)
    assert last_attempt(suspended)["reason"] == "NodeLost"
    assert node in condition(suspended, "Suspended")["message"]


def test_a_noexecute_taint_is_no_lost_node(api, forked, kwok_namespace):
    stops = {"stop-exit-code": 43, "stop-message": word(43, "Preempted", "stopped at step 5")}
    with pods_do(api, kwok_namespace, stops, attempt=1), pods_do(api, kwok_namespace, ends(adapter=ADAPTER), attempt=2):
        path = create_job(api, qlora_job(namespace=kwok_namespace))
        node = last_attempt(api.wait_for(path, in_state("Running"), seconds=LONG))["node"]
        api.patch(f"/api/v1/nodes/{node}", {"spec": {"taints": [{"key": "repair", "effect": "NoExecute"}]}})
        try:
            done = api.wait_for(path, in_state("Succeeded"), seconds=LONG)
        finally:
            api.patch(f"/api/v1/nodes/{node}", {"spec": {"taints": None}})
    first = done["status"]["attempts"][0]
    assert (first["reason"], first["message"]) == ("Preempted", "stopped at step 5")
    assert (done["status"]["restarts"], done["status"]["totalRestarts"]) == (0, 1)


def test_taints_of_the_control_plane_are_not_mentioned(api, crd_cluster, forked, kwok_namespace):
    taint = {"key": "node-role.kubernetes.io/control-plane", "effect": "NoSchedule"}
    (node,) = crd_cluster.add_kwok_nodes(1, gpus=0, taints=[taint], prefix="control-plane")
    try:
        path = create_job(api, qlora_job(namespace=kwok_namespace, parallelism={"gpusPerWorker": 16}))
        waiting = api.wait_for(path, in_state("Pending", "Unschedulable"), seconds=LONG)
        remedy, _, said = condition(waiting, "Running")["message"].partition(" (0/")
        assert "taint" in said
        assert "taint" not in remedy
        assert remedy.startswith("pod job-1-0")
    finally:
        api.delete(f"/api/v1/nodes/{node}")


def test_a_pod_that_is_gated_is_queued(api, forked, kwok_namespace):
    with gate_on_pods(api, kwok_namespace, "example.com/topology"):
        path = create_job(api, qlora_job(namespace=kwok_namespace))
        queued = api.wait_for(path, in_state("Pending", "Queued"), seconds=LONG)
    assert "example.com/topology" in condition(queued, "Running")["message"]
