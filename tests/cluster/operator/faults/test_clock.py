"""An operator whose machine's clock is five minutes off decides as any other."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import pytest

from cluster.scenarios.jobs import create_job, in_state, last_attempt, qlora_job
from cluster.scenarios.operator import OperatorProcess
from cluster.scenarios.script import pods_do
from cluster.scenarios.whole_life import word

SCRIPT = Path(__file__).parents[4] / "tools" / "cluster" / "scenarios" / "skewed_operator.py"
LONG = 60


@pytest.mark.parametrize("skew", [-300, 300])
def test_five_minutes_of_skew_change_no_decision(crd_cluster, kwok_namespace, tmp_path, skew):
    api = crd_cluster.api
    stops = {"stop-seconds": 4, "stop-exit-code": 43, "stop-message": word(43, "Preempted", "stopped at step 5")}
    operator = OperatorProcess(tmp_path, crd_cluster.kubeconfig, namespaces=[kwok_namespace])
    operator.program = ("-P", SCRIPT, str(skew))
    with pods_do(api, kwok_namespace, stops), operator:
        path = create_job(api, qlora_job(namespace=kwok_namespace))
        running = api.wait_for(path, in_state("Running"), seconds=LONG)
        api.patch(path, {"spec": {"suspend": True}})
        suspended = api.wait_for(path, in_state("Suspended"), seconds=LONG)
    attempt = last_attempt(suspended)
    assert (attempt["reason"], attempt["message"]) == ("Suspended", "stopped at step 5")
    created = datetime.fromisoformat(running["metadata"]["creationTimestamp"])
    assert abs(datetime.fromisoformat(attempt["startTime"]) - created) < timedelta(seconds=LONG)
