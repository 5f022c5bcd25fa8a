"""Ends of jobs on a real control plane: stalls in a row, and what Prepare says of hours and money."""

from __future__ import annotations

from cluster.scenarios.forked_operator import ForkedOperator
from cluster.scenarios.jobs import condition, create_job, in_state, qlora_job
from cluster.scenarios.script import pods_do
from cluster.scenarios.whole_life import PREPARED, ends


def test_three_stalls_without_a_step_gained_end_a_job_and_name_the_last(api, forked, kwok_namespace):
    said = "rank 1 on node-b has given no sign of life for 30 s, in Backward"
    with pods_do(api, kwok_namespace, ends(44, "Stalled", said, progress={"step": 0, "totalSteps": 10})):
        path = create_job(api, qlora_job(namespace=kwok_namespace, policy={"maxRestarts": 50}))
        failed = api.wait_for(path, in_state("Failed", "Stalled"), seconds=60)
    assert [a["reason"] for a in failed["status"]["attempts"]] == ["Stalled"] * 3
    message = condition(failed, "Failed")["message"]
    assert message.startswith(f"{said} (3 attempts in a row ended so, the last on ")
    assert message.endswith(", without a step gained)")


def test_hours_and_money_are_in_status_before_a_gpu_is_held(api, crd_cluster, fork_server, kwok_namespace, tmp_path):
    settings = {"namespaces": [kwok_namespace], "prepare": {"enabled": True}, "pricePerGpuHour": {"default": 2.5}}
    batch = {"worldSize": 1, "microBatchSize": 4, "gradientAccumulationSteps": 4}
    found = PREPARED | {"expectedGpuHours": "12.5", "batch": batch}
    with (
        ForkedOperator(fork_server, tmp_path, crd_cluster.kubeconfig, **settings),
        pods_do(api, kwok_namespace, ends(prepared=found), component="prepare"),
    ):
        path = create_job(api, qlora_job(namespace=kwok_namespace, policy={"budgetGpuHours": "10"}))
        planned = api.wait_for(path, lambda job: "expectedCost" in job.get("status", {}), seconds=60)
    assert planned["status"]["expectedCost"] == "31.25"
    assert (
        "about 12.5 GPU-hours for 31.25, more than spec.policy.budgetGpuHours (10)"
        in (condition(planned, "Prepared")["message"])
    )
