"""A job's life on a real control plane; fake nodes play what happens to pods."""

from __future__ import annotations

import json
import re

import pytest

from cluster.api import ClusterApiError
from cluster.kwok import find_node_again, lose_node
from cluster.scenarios.jobs import condition, create_job, in_state, last_attempt, qlora_job
from cluster.scenarios.script import pods_do

JOBS, PODS = "/apis/batch/v1/namespaces/{}/jobs", "/api/v1/namespaces/{}/pods"
ADAPTER = {
    "uri": "s3://adapters/job/3f2a-attempt-1/adapter",
    "manifestUri": "s3://adapters/job/manifest.json",
    "manifestSha256": "a" * 64,
}


def word(code: int = 0, reason: str = "Completed", message: str = "step 10 of 10", **more: object) -> str:
    """A trainer's termination message."""
    said = {"exitCode": code, "reason": reason, "message": message, "progress": {"step": 10, "totalSteps": 10}}
    return json.dumps({**said, **more})


DONE = {"run-seconds": "1", "exit-code": 0, "termination-message": word(adapter=ADAPTER)}


def test_a_job_of_two_workers_runs_and_ends_with_its_adapter(api, operator, kwok_namespace):
    with pods_do(api, kwok_namespace, DONE):
        path = create_job(api, qlora_job(namespace=kwok_namespace, workers=2))
        api.wait_for(path, in_state("Running", "Training"))
        done = api.wait_for(path, in_state("Succeeded", "Completed"))
    assert done["status"]["adapter"] == ADAPTER
    assert condition(done, "Succeeded")["message"] == "step 10 of 10"
    assert [a["reason"] for a in done["status"]["attempts"]] == ["Completed"]
    assert operator.metrics()['qlora_operator_attempts_total{reason="Completed"}'] == 1


def test_kubectl_get_reads_well(api, operator, crd_cluster, kwok_namespace):
    memory = {"measured": {"peak": 24 * 1024**3}}
    progress = {"step": 10, "totalSteps": 10, "loss": "1.234"}
    does = {**DONE, "termination-message": word(adapter=ADAPTER, memory=memory, progress=progress)}
    with pods_do(api, kwok_namespace, does):
        api.wait_for(create_job(api, qlora_job(namespace=kwok_namespace)), in_state("Succeeded"))
    header, row = crd_cluster.kubectl("get", "qlorajobs", "-n", kwok_namespace).splitlines()
    assert header.split() == ["NAME", "STATE", "REASON", "STEP", "LOSS", "ETA", "RESTARTS", "MEMORY", "AGE"]
    assert re.fullmatch(r"job\s+Succeeded\s+Completed\s+10\s+1\.234\s+0\s+24\.0Gi\s+\d+s", row)


@pytest.mark.parametrize(
    ("code", "reason", "message"),
    [
        pytest.param(40, "UserError", 'spec.lora.targetModules: "q_prj" matches no layer', id="user-error"),
        pytest.param(45, "NonFiniteLoss", "the loss of step 3 is nan", id="non-finite-loss"),
        pytest.param(48, "AdapterRejected", "B is all zero", id="adapter-rejected"),
    ],
)
def test_what_another_attempt_would_only_repeat_ends_the_job_at_once(
    api, operator, kwok_namespace, code, reason, message
):
    does = {"run-seconds": "0.2", "exit-code": code, "termination-message": word(code, reason, message)}
    with pods_do(api, kwok_namespace, does):
        failed = api.wait_for(create_job(api, qlora_job(namespace=kwok_namespace)), in_state("Failed", reason))
    assert condition(failed, "Failed")["message"] == message
    attempt = last_attempt(failed)
    assert (attempt["exitCode"], attempt["reason"]) == (code, reason)
    assert attempt["node"].startswith("fake-")
    assert len(failed["status"]["attempts"]) == 1


def test_crashes_count_against_max_restarts(api, operator, kwok_namespace):
    does = {"run-seconds": "0.1", "exit-code": 1, "termination-message": word(1, "Crashed", "boom")}
    with pods_do(api, kwok_namespace, does):
        manifest = qlora_job(namespace=kwok_namespace, policy={"maxRestarts": 1})
        failed = api.wait_for(create_job(api, manifest), in_state("Failed", "Crashed"))
    assert [a["reason"] for a in failed["status"]["attempts"]] == ["Crashed", "Crashed"]
    assert "maxRestarts" in condition(failed, "Failed")["message"]


def test_out_of_device_memory_halves_the_micro_batch_and_keeps_the_global_batch(api, operator, kwok_namespace):
    oom = {"run-seconds": "0.1", "exit-code": 41, "termination-message": word(41, "OutOfDeviceMemory", "at step 3")}
    with pods_do(api, kwok_namespace, oom, attempt=1), pods_do(api, kwok_namespace, DONE, attempt=2):
        done = api.wait_for(create_job(api, qlora_job(namespace=kwok_namespace)), in_state("Succeeded"))
    first, second = done["status"]["attempts"]
    assert (first["reason"], second["reason"]) == ("OutOfDeviceMemory", "Completed")
    assert second["microBatchSize"] == first["microBatchSize"] // 2
    assert second["microBatchSize"] * second["gradientAccumulationSteps"] == 16
    assert done["status"]["restarts"] == 0


def test_a_worker_deleted_mid_run_costs_an_attempt_and_no_restart(api, operator, kwok_namespace):
    stops = {"stop-exit-code": 43, "stop-message": word(43, "Preempted", "stopped at step 5")}
    with pods_do(api, kwok_namespace, stops, attempt=1), pods_do(api, kwok_namespace, DONE, attempt=2):
        path = create_job(api, qlora_job(namespace=kwok_namespace, workers=2, policy={"maxRestarts": 0}))
        api.wait_for(path, in_state("Running"))
        pods = api.list(PODS.format(kwok_namespace))
        api.delete(f"{PODS.format(kwok_namespace)}/{pods[0]['metadata']['name']}")
        done = api.wait_for(path, in_state("Succeeded"))
    assert [a["reason"] for a in done["status"]["attempts"]] == ["Preempted", "Completed"]
    assert done["status"]["restarts"] == 0


def test_the_cause_counts_not_the_peers_that_suffer(api, operator, kwok_namespace):
    suffers = {"run-seconds": "0.1", "exit-code": 49, "termination-message": word(49, "PeerLost", "rank 0 is gone")}
    cause = {"run-seconds": "0.4", "exit-code": 40, "termination-message": word(40, "UserError", "the cause")}
    with pods_do(api, kwok_namespace, suffers, index=1), pods_do(api, kwok_namespace, cause, index=0):
        path = create_job(api, qlora_job(namespace=kwok_namespace, workers=2))
        failed = api.wait_for(path, in_state("Failed", "UserError"))
    assert condition(failed, "Failed")["message"] == "the cause"


def test_a_lost_node_costs_an_attempt_and_no_restart(api, operator, kwok_namespace):
    with pods_do(api, kwok_namespace, DONE, attempt=2):
        path = create_job(api, qlora_job(namespace=kwok_namespace, policy={"maxRestarts": 0}))
        running = api.wait_for(path, in_state("Running"))
        node = last_attempt(running)["node"]
        lose_node(api, node)
        try:
            done = api.wait_for(path, in_state("Succeeded"), seconds=60)
        finally:
            find_node_again(api, node)
    lost = done["status"]["attempts"][0]
    assert (lost["reason"], lost["node"]) == ("NodeLost", node)
    assert done["status"]["restarts"] == 0


def test_suspend_checkpoints_and_frees_the_gpus_and_resume_goes_on(api, operator, kwok_namespace):
    stops = {"stop-seconds": 1, "stop-exit-code": 43, "stop-message": word(43, "Preempted", "stopped at step 5")}
    with pods_do(api, kwok_namespace, stops, attempt=1), pods_do(api, kwok_namespace, DONE, attempt=2):
        path = create_job(api, qlora_job(namespace=kwok_namespace, workers=2))
        api.wait_for(path, in_state("Running"))
        api.patch(path, {"spec": {"suspend": True}})
        api.wait_for(path, in_state("Pending", "Suspending"))
        suspended = api.wait_for(path, in_state("Suspended", "Suspended"))
        assert {p["status"]["phase"] for p in api.list(PODS.format(kwok_namespace))} <= {"Succeeded", "Failed"}
        assert last_attempt(suspended)["reason"] == "Suspended"
        assert last_attempt(suspended)["message"] == "stopped at step 5"
        api.patch(path, {"spec": {"suspend": False}})
        done = api.wait_for(path, in_state("Succeeded"))
    assert [a["reason"] for a in done["status"]["attempts"]] == ["Suspended", "Completed"]
    assert condition(done, "Suspended")["status"] == "False"
    assert done["status"]["restarts"] == 0


def test_a_job_suspended_from_the_start_makes_nothing_until_it_is_resumed(api, operator, kwok_namespace):
    with pods_do(api, kwok_namespace, DONE):
        path = create_job(api, qlora_job(namespace=kwok_namespace, suspend=True))
        api.wait_for(path, in_state("Suspended"))
        assert api.list(JOBS.format(kwok_namespace)) == []
        api.patch(path, {"spec": {"suspend": False}})
        api.wait_for(path, in_state("Succeeded"))


def test_deleting_a_running_job_leaves_nothing_behind(api, operator, kwok_namespace):
    path = create_job(api, qlora_job(namespace=kwok_namespace, workers=2))
    api.wait_for(path, in_state("Running"))
    api.delete(path)
    for collection in (JOBS, PODS, "/api/v1/namespaces/{}/services"):
        api.wait_for(collection.format(kwok_namespace), lambda found: not found["items"])


def test_a_finished_job_deletes_itself_when_its_time_has_come(api, operator, kwok_namespace):
    with pods_do(api, kwok_namespace, DONE):
        manifest = qlora_job(namespace=kwok_namespace, policy={"ttlSecondsAfterFinished": 2})
        path = create_job(api, manifest)
        api.wait_for(path, in_state("Succeeded"))
        api.wait_gone(path)


def test_changes_that_would_break_a_resume_are_refused_by_the_api_server(api, operator, kwok_namespace):
    path = create_job(api, qlora_job(namespace=kwok_namespace))
    with pytest.raises(ClusterApiError, match="lora is immutable: a resumed run must match its checkpoint"):
        api.patch(path, {"spec": {"lora": {"rank": 32}}})
    api.patch(path, {"spec": {"policy": {"maxRestarts": 9}}})


def test_a_job_of_the_same_name_as_a_deleted_one_starts_anew(api, operator, kwok_namespace):
    path = create_job(api, qlora_job(namespace=kwok_namespace, workers=2))
    api.wait_for(path, in_state("Running"))
    api.delete(path)
    with pods_do(api, kwok_namespace, DONE):
        create_job(api, qlora_job(namespace=kwok_namespace, workers=2))
        done = api.wait_for(path, in_state("Succeeded"))
    assert [a["number"] for a in done["status"]["attempts"]] == [1]


def test_prepare_holds_no_gpu_and_goes_before_the_trainers(api, crd_cluster, kwok_namespace, tmp_path):
    from cluster.scenarios.operator import OperatorProcess

    result = {
        "modelRevision": "abc",
        "dataHash": "d",
        "trainRows": 7,
        "trainTokens": 99,
        "trainSequences": 3,
        "batch": {"worldSize": 1, "microBatchSize": 8, "gradientAccumulationSteps": 2},
        "gradientCheckpointing": True,
        "memory": {"quantizedWeights": 4_000_000_000},
    }
    prepared = {"run-seconds": "0.5", "exit-code": 0, "termination-message": word(prepared=result)}
    settings = {"namespaces": [kwok_namespace], "prepare": {"enabled": True}}
    with (
        OperatorProcess(tmp_path, crd_cluster.kubeconfig, **settings),
        pods_do(api, kwok_namespace, prepared, component="prepare"),
        pods_do(api, kwok_namespace, DONE, component="trainer"),
    ):
        path = create_job(api, qlora_job(namespace=kwok_namespace))
        api.wait_for(path, in_state("Pending", "Preparing"))
        pod = api.wait_for(PODS.format(kwok_namespace), lambda found: found["items"])["items"][0]
        assert "nvidia.com/gpu" not in json.dumps(pod["spec"]["containers"])
        done = api.wait_for(path, in_state("Succeeded"))
    assert done["status"]["prepared"]["trainRows"] == 7
    assert done["status"]["memory"]["predicted"] == {"quantizedWeights": 4_000_000_000}
    assert last_attempt(done)["microBatchSize"] == 8
    assert condition(done, "Prepared")["status"] == "True"


def test_a_user_error_in_prepare_ends_the_job_before_a_gpu_is_held(api, crd_cluster, kwok_namespace, tmp_path):
    from cluster.scenarios.operator import OperatorProcess

    text = "spec.dataset.train.source: no row has a completion"
    bad = {"run-seconds": "0.2", "exit-code": 40, "termination-message": word(40, "UserError", text)}
    settings = {"namespaces": [kwok_namespace], "prepare": {"enabled": True}}
    with OperatorProcess(tmp_path, crd_cluster.kubeconfig, **settings), pods_do(api, kwok_namespace, bad):
        path = create_job(api, qlora_job(namespace=kwok_namespace))
        failed = api.wait_for(path, in_state("Failed", "UserError"))
    assert condition(failed, "Failed")["message"] == text
    assert condition(failed, "Prepared")["status"] == "False"
    assert [j["metadata"]["name"] for j in api.list(JOBS.format(kwok_namespace))] == ["job-prepare"]


def test_sigterm_ends_the_operator_in_order(operator):
    assert operator.stop() == 0
