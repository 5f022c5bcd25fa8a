"""The stage of Prepare is in the job's status while its pod works, at no more writes than words have."""

from __future__ import annotations

import os

from cluster.scenarios.forked_operator import ForkedOperator
from cluster.scenarios.jobs import condition, create_job, qlora_job
from cluster.scenarios.script import pods_do
from qlora_operator.names import METRICS_PORT
from services.hostile_rank import HostileRank, report
from testing.timeouts import PATIENCE_SECONDS

ADDRESS = f"127.{os.getpid() % 200 + 10}.9.7"


def test_a_job_that_prepares_says_its_stage_and_since_when(api, crd_cluster, fork_server, kwok_namespace, tmp_path):
    said = report(attempt=0, section="Prepare", stage="tokenizing the rows", stageSeconds=100)
    settings = {"namespaces": [kwok_namespace], "prepare": {"enabled": True}}
    with (
        HostileRank(ADDRESS, METRICS_PORT, [said]),
        pods_do(api, kwok_namespace, {"pod-ip": ADDRESS}, component="prepare"),
        ForkedOperator(fork_server, tmp_path, crd_cluster.kubeconfig, **settings),
    ):
        path = create_job(api, qlora_job(namespace=kwok_namespace))
        job = api.wait_for(path, lambda body: body.get("status", {}).get("stage"), seconds=PATIENCE_SECONDS)
    assert (job["status"]["reason"], job["status"]["stage"]["name"]) == ("Preparing", "tokenizing the rows")
    assert job["status"]["stage"]["startTime"] < job["metadata"]["creationTimestamp"]
    assert condition(job, "Prepared")["message"].startswith("tokenizing the rows: ")
    assert "attempts" not in job["status"] or job["status"]["attempts"] == []
