"""Corrections of a job, or of the operator's settings, reach the attempt that waits, under its own number."""

from __future__ import annotations

import pytest

from cluster.api import ClusterApiError
from cluster.scenarios.forked_operator import ForkedOperator
from cluster.scenarios.jobs import condition, create_job, in_state, last_attempt, qlora_job
from cluster.scenarios.script import jobs_are_suspended, pods_do
from cluster.scenarios.whole_life import ADAPTER, ends

JOBS, PODS = "/apis/batch/v1/namespaces/{}/jobs", "/api/v1/namespaces/{}/pods"
LONG = 60


def runs_as_attempt_one(api, path):
    running = api.wait_for(path, in_state("Running"), seconds=LONG)
    assert [a["number"] for a in running["status"]["attempts"]] == [1]
    assert running["status"]["totalRestarts"] == 0
    return running


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        pytest.param({"nodeSelector": {"gpu": "none"}}, {"nodeSelector": None}, id="node-selector"),
        pytest.param({"priorityClassName": "no-such"}, {"priorityClassName": None}, id="priority-class"),
    ],
)
def test_a_corrected_job_runs_as_the_attempt_that_waited(api, forked, kwok_namespace, wrong, right):
    path = create_job(api, qlora_job(namespace=kwok_namespace, workers=2, scheduling=wrong))
    api.wait_for(path, lambda job: job.get("status", {}).get("reason") in ("Unschedulable", "MissingReference"))
    api.patch(path, {"spec": {"scheduling": right}})
    runs_as_attempt_one(api, path)


def test_a_toleration_that_was_missing_is_taken_up(api, crd_cluster, forked, kwok_namespace):
    taint = {"key": "team", "value": "b", "effect": "NoSchedule"}
    (node,) = crd_cluster.add_kwok_nodes(1, labels={"pool": "tainted"}, taints=[taint], prefix="tainted")
    try:
        path = create_job(api, qlora_job(namespace=kwok_namespace, scheduling={"nodeSelector": {"pool": "tainted"}}))
        api.wait_for(path, in_state("Pending", "Unschedulable"), seconds=LONG)
        api.patch(path, {"spec": {"scheduling": {"tolerations": [{"key": "team", "operator": "Exists"}]}}})
        assert last_attempt(runs_as_attempt_one(api, path))["node"] == node
    finally:
        api.delete(path)
        api.delete(f"/api/v1/nodes/{node}")


def test_an_image_that_is_corrected_in_the_operators_settings_is_taken_up(
    api, crd_cluster, fork_server, kwok_namespace, tmp_path
):
    settings = {"namespaces": [kwok_namespace]}
    wrong, right = {"image": "wrong:1"}, {"image": "right:1", "imagePullSecrets": ["pull"]}
    with (
        pods_do(api, kwok_namespace, {"start-seconds": 600}),
        ForkedOperator(fork_server, tmp_path / "1", crd_cluster.kubeconfig, trainer=wrong, **settings),
    ):
        path = create_job(api, qlora_job(namespace=kwok_namespace))
        api.wait_for(PODS.format(kwok_namespace), lambda found: found["items"], seconds=LONG)
        api.wait_for(path, in_state("Pending", "Starting"), seconds=LONG)
    with ForkedOperator(fork_server, tmp_path / "2", crd_cluster.kubeconfig, trainer=right, **settings):
        runs_as_attempt_one(api, path)
    (pod,) = (p for p in api.list(PODS.format(kwok_namespace)) if p["status"]["phase"] == "Running")
    assert pod["spec"]["containers"][0]["image"] == "right:1"
    assert pod["spec"]["imagePullSecrets"] == [{"name": "pull"}]


def test_a_prepare_that_waits_is_made_anew_too(api, crd_cluster, fork_server, kwok_namespace, tmp_path):
    settings = {"namespaces": [kwok_namespace], "prepare": {"enabled": True}}
    with (
        pods_do(api, kwok_namespace, {"start-seconds": 600}),
        ForkedOperator(fork_server, tmp_path, crd_cluster.kubeconfig, **settings),
    ):
        path = create_job(api, qlora_job(namespace=kwok_namespace, output={"credentials": "no-such"}))
        prepare = f"{JOBS.format(kwok_namespace)}/job-prepare"
        first = api.wait_for(prepare, bool, seconds=LONG)["metadata"]["uid"]
        api.patch(path, {"spec": {"output": {"credentials": "store"}}})
        again = api.wait_for(prepare, lambda found: found["metadata"]["uid"] != first, seconds=LONG)
    (source,) = again["spec"]["template"]["spec"]["containers"][0]["envFrom"]
    assert source["secretRef"]["name"] == "store"


def test_what_runs_is_left_alone(api, forked, kwok_namespace):
    path = create_job(api, qlora_job(namespace=kwok_namespace))
    api.wait_for(path, in_state("Running"), seconds=LONG)
    uid = api.get(f"{JOBS.format(kwok_namespace)}/job-1")["metadata"]["uid"]
    job = api.patch(path, {"spec": {"scheduling": {"nodeSelector": {"gpu": "none"}}}})
    seen = job["metadata"]["generation"]
    api.wait_for(path, lambda job: job["status"]["observedGeneration"] == seen, seconds=LONG)
    there = api.get(f"{JOBS.format(kwok_namespace)}/job-1")
    assert (there["metadata"]["uid"], "deletionTimestamp" in there["metadata"]) == (uid, False)


def test_a_job_in_no_queue_is_told_to_name_one_and_nothing_that_does_not_help(api, forked, kwok_namespace):
    with jobs_are_suspended(api, kwok_namespace):
        path = create_job(api, qlora_job(namespace=kwok_namespace))
        queued = api.wait_for(path, in_state("Pending", "Queued"), seconds=LONG)
    assert "set spec.scheduling.queue" in condition(queued, "Running")["message"]
    assert "spec.suspend" not in condition(queued, "Running")["message"]


def test_an_attempt_that_never_ran_did_not_stop_at_a_checkpoint(api, forked, kwok_namespace):
    scheduling = {"nodeSelector": {"gpu": "none"}}
    with pods_do(api, kwok_namespace, ends(adapter=ADAPTER)):
        path = create_job(api, qlora_job(namespace=kwok_namespace, scheduling=scheduling))
        api.wait_for(path, in_state("Pending", "Unschedulable"), seconds=LONG)
        api.patch(path, {"spec": {"suspend": True}})
        suspended = api.wait_for(path, in_state("Suspended"), seconds=LONG)
        assert "checkpoint" not in last_attempt(suspended)["message"]
        api.patch(path, {"spec": {"suspend": False, "scheduling": {"nodeSelector": None}}})
        api.wait_for(path, in_state("Succeeded"), seconds=LONG)


def test_credentials_may_be_exchanged_and_what_they_belong_to_may_not(api, forked, kwok_namespace):
    path = create_job(api, qlora_job(namespace=kwok_namespace, model={"credentials": "old"}))
    api.wait_for(path, in_state("Running"), seconds=LONG)
    api.patch(path, {"spec": {"model": {"credentials": "new"}, "dataset": {"train": {"credentials": "rows"}}}})
    with pytest.raises(ClusterApiError, match="model is immutable"):
        api.patch(path, {"spec": {"model": {"source": "s3://models/other"}}})
    with pytest.raises(ClusterApiError, match="dataset is immutable"):
        api.patch(path, {"spec": {"dataset": {"eval": {"fraction": "0.1"}}}})
    api.patch(path, {"spec": {"suspend": True}})
    api.wait_for(path, in_state("Suspended"), seconds=LONG)
    api.patch(path, {"spec": {"suspend": False}})
    second = api.wait_for(f"{JOBS.format(kwok_namespace)}/job-2", bool, seconds=LONG)
    sources = second["spec"]["template"]["spec"]["containers"][0]["envFrom"]
    assert [source["secretRef"]["name"] for source in sources] == ["new", "rows"]
