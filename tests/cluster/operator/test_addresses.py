"""Pods whose addresses are of IPv6."""

from __future__ import annotations

import socket

import pytest

from cluster.scenarios.jobs import create_job, in_state, qlora_job
from cluster.scenarios.script import pods_do
from qlora_operator.names import METRICS_PORT
from services.hostile_rank import HostileRank, report
from testing.timeouts import PATIENCE_SECONDS


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_the_progress_of_a_pod_that_has_only_an_ipv6_address_is_in_its_jobs_status(crd_cluster, kwok_namespace, forked):
    api = crd_cluster.api
    with HostileRank("::1", METRICS_PORT, [report()]), pods_do(api, kwok_namespace, {"pod-ip": "::1"}):
        path = create_job(api, qlora_job("job", kwok_namespace))
        api.wait_for(path, in_state("Running"), seconds=PATIENCE_SECONDS)
        job = api.wait_for(path, lambda body: body["status"].get("progress"), seconds=PATIENCE_SECONDS)
    assert job["status"]["progress"]["step"] == 3
