"""Every transition that a person would look for is an Event, once."""

from __future__ import annotations

from collections import Counter

from cluster.kwok import finish_pod
from cluster.scenarios.forked_operator import ForkedOperator
from cluster.scenarios.jobs import create_job, in_state, last_attempt, qlora_job
from cluster.scenarios.script import pods_do
from cluster.scenarios.whole_life import ADAPTER, PREPARED, ends, word

LONG = 60


def test_each_transition_of_a_life_is_told_once(api, crd_cluster, fork_server, kwok_namespace, tmp_path):
    settings = {"namespaces": [kwok_namespace], "prepare": {"enabled": True}}
    with (
        pods_do(api, kwok_namespace, ends(prepared=PREPARED), component="prepare"),
        ForkedOperator(fork_server, tmp_path, crd_cluster.kubeconfig, **settings),
    ):
        path = create_job(api, qlora_job(namespace=kwok_namespace, workers=2))
        api.wait_for(path, in_state("Running"), seconds=LONG)
        pods = f"/api/v1/namespaces/{kwok_namespace}/pods"
        first = api.list(pods, labelSelector="qlora.dev/attempt=1")[0]
        finish_pod(api, kwok_namespace, first["metadata"]["name"], exit_code=1, message="boom")
        api.wait_for(path, lambda job: len(job["status"]["attempts"]) == 2 and in_state("Running")(job), seconds=LONG)
        for pod in api.list(pods, labelSelector="qlora.dev/attempt=2"):
            finish_pod(api, kwok_namespace, pod["metadata"]["name"], message=word(adapter=ADAPTER))
        api.wait_for(path, in_state("Succeeded"), seconds=LONG)
        events = f"/apis/events.k8s.io/v1/namespaces/{kwok_namespace}/events"

        def of_the_job(found):
            return [e for e in found["items"] if e["regarding"]["kind"] == "QLoRAJob"]

        found = api.wait_for(events, lambda found: len(of_the_job(found)) >= 5, seconds=LONG)
    told = of_the_job(found)
    assert Counter(e["reason"] for e in told) == dict.fromkeys(
        ("Prepared", "Started", "Crashed", "Recovered", "Completed"), 1
    )
    notes = {e["reason"]: e["note"] for e in told}
    assert "another attempt follows" in notes["Crashed"]
    assert "attempt 1 ended: Crashed" in notes["Recovered"]
    assert ADAPTER["uri"] in notes["Completed"]


def test_a_queue_that_takes_and_gives_is_told(api, forked, kwok_namespace):
    stops = {"stop-exit-code": 43, "stop-message": word(43, "Preempted", "stopped")}
    with pods_do(api, kwok_namespace, stops):
        path = create_job(api, qlora_job(namespace=kwok_namespace))
        api.wait_for(path, in_state("Running"), seconds=LONG)
        child = f"/apis/batch/v1/namespaces/{kwok_namespace}/jobs/job-1"
        api.patch(child, {"spec": {"suspend": True}})
        api.wait_for(path, in_state("Pending", "Queued"), seconds=LONG)
        api.wait_for(path, lambda job: "runningTime" not in last_attempt(job), seconds=LONG, what="its pods are gone")
        api.patch(child, {"spec": {"suspend": False}})
        api.wait_for(path, in_state("Running"), seconds=LONG)
        events = f"/apis/events.k8s.io/v1/namespaces/{kwok_namespace}/events"
        wanted = {"Started", "Queued", "Requeued", "Admitted"}
        api.wait_for(events, lambda found: wanted <= {e["reason"] for e in found["items"]}, seconds=LONG)
