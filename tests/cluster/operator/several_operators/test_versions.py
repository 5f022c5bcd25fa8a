"""Other versions: an older operator beside a newer definition, and the other way round, while jobs run."""

from __future__ import annotations

import copy
import json
from contextlib import contextmanager

import pytest
import yaml

from cluster.scenarios.jobs import CRD, GROUP, condition, create_job, in_state, job_path, qlora_job
from cluster.scenarios.script import pods_do
from cluster.scenarios.whole_life import ADAPTER, ends
from cluster.waits import eventually

JOBS, PODS = "/apis/batch/v1/namespaces/{}/jobs", "/api/v1/namespaces/{}/pods"
LONG, MOST_WRITES = 60, 20
TEXT = {"type": "string"}
PROBE = "servedProbe"
"""Field of a changed definition alone."""
FIRST_CONDITIONS = ["Prepared", "Running", "Suspended", "Succeeded", "Failed"]


def newer(properties):
    """Add fields and values as a later version may have them."""
    spec, status = properties["spec"]["properties"], properties["status"]["properties"]
    spec["policy"]["properties"]["later"] = {**TEXT, "default": "yes"}
    spec["laterGroup"] = {"type": "object", "properties": {"field": TEXT}}
    spec["policy"]["properties"]["onOutOfMemory"]["enum"].append("Later")
    status["later"] = TEXT
    status["attempts"]["items"]["properties"]["later"] = TEXT


def older(properties):
    """Close the lists and take away what version 0.1.0 did not have."""
    status = properties["status"]["properties"]
    entry = status["conditions"]["items"]["properties"]
    entry["type"] = {**TEXT, "enum": FIRST_CONDITIONS}
    reasons = [*("Pending", "Queued", "Starting", "Unschedulable", "Training", "Completed", "UserError", "Suspended")]
    entry["reason"] = status["reason"] = {**TEXT, "enum": reasons}
    status["conditions"] |= {"maxItems": 8}
    del status["totalRestarts"], properties["status"]["default"]


@contextmanager
def definition(api, change):
    """Have a changed definition served."""
    body = yaml.safe_load(CRD.read_text())
    changed = copy.deepcopy(body)
    properties = changed["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    change(properties)
    properties["spec"]["properties"][PROBE] = TEXT
    api.apply(changed)
    assert eventually(lambda: _has_probe(api), LONG), "the changed definition is not served"
    try:
        yield
    finally:
        api.apply(body)
        assert eventually(lambda: not _has_probe(api), LONG), "the definition is not served again"


def _has_probe(api):
    """Return whether the definition by which the API server handles requests has the probe; others are dropped.

    Neither the definition's conditions nor the OpenAPI document say so: the handler takes a change up on its own.
    """
    probe = qlora_job("probe", **{PROBE: "x"})
    return PROBE in api.post(f"{GROUP}/namespaces/default/qlorajobs", probe, dryRun="All")["spec"]


def is_running_and_degraded(job):
    return in_state("Running")(job) and "status" in condition(job, "Degraded")


def test_what_a_newer_definition_has_ends_no_job_and_is_named(api, forked, kwok_namespace):
    with definition(api, newer), pods_do(api, kwok_namespace, ends(adapter=ADAPTER), attempt=2):
        path = create_job(api, qlora_job(namespace=kwok_namespace, laterGroup={"field": "x"}))
        assert "laterGroup" in api.get(path)["spec"]
        running = api.wait_for(path, is_running_and_degraded, seconds=LONG)
        degraded = condition(running, "Degraded")
        assert (degraded["status"], degraded["reason"]) == ("True", "NotUnderstood")
        assert "spec.policy.later" in degraded["message"]
        assert "spec.laterGroup" in degraded["message"]
        (pod,) = api.list(PODS.format(kwok_namespace))
        config = json.loads(pod["metadata"]["annotations"]["qlora.dev/config"])
        assert "later" not in json.dumps(config["spec"])
        assert config["job"]["cluster"], "the claims of jobs do not say in which cluster they are"

        forked.kill()  # a newer one works meanwhile
        said = running["status"]
        later = {"type": "Later", "status": "True", "reason": "LaterReason", "message": "", "lastTransitionTime": NOW}
        attempt = {**said["attempts"][0], "later": "kept"}
        change = {"later": "kept", "attempts": [attempt], "conditions": [*said["conditions"], later]}
        api.patch(f"{path}/status", {"status": change})
        job_uid = api.get(f"{JOBS.format(kwok_namespace)}/job-1")["metadata"]["uid"]
        forked.start()
        again = api.patch(path, {"spec": {"policy": {"maxRestarts": 5}}})["metadata"]["generation"]
        there = api.wait_for(path, lambda job: job["status"]["observedGeneration"] == again, seconds=LONG)
        assert there["status"]["attempts"] == [attempt]
        assert api.get(f"{JOBS.format(kwok_namespace)}/job-1")["metadata"]["uid"] == job_uid

        api.delete(f"{PODS.format(kwok_namespace)}/{pod['metadata']['name']}")
        done = api.wait_for(path, in_state("Succeeded"), seconds=LONG)
    assert done["status"]["later"] == "kept"
    assert done["status"]["attempts"][0]["later"] == "kept"
    assert condition(done, "Later")["reason"] == "LaterReason"


NOW = "2026-01-01T00:00:00Z"


def test_a_value_that_is_not_known_leaves_the_job_and_its_pods_as_they_are(api, forked, kwok_namespace):
    with definition(api, newer), pods_do(api, kwok_namespace, {}):
        path = create_job(api, qlora_job(namespace=kwok_namespace))
        api.wait_for(path, in_state("Running"), seconds=LONG)
        api.patch(path, {"spec": {"policy": {"onOutOfMemory": "Later"}}})
        left = api.wait_for(
            path, lambda job: "onOutOfMemory" in condition(job, "Degraded").get("message", ""), seconds=LONG
        )
        assert left["status"]["state"] == "Running"
        create_job(api, qlora_job("waits", kwok_namespace, policy={"onOutOfMemory": "Later"}))
        api.wait_for(job_path(kwok_namespace, "waits"), in_state("Pending", "NotUnderstood"), seconds=LONG)
        (pod,) = api.list(PODS.format(kwok_namespace))
        assert "deletionTimestamp" not in pod["metadata"]
        for each in (path, job_path(kwok_namespace, "waits")):
            api.patch(each, {"spec": {"policy": {"onOutOfMemory": "Fail", "later": None}}})
            api.wait_for(each, in_state("Running"), seconds=LONG)


def test_a_condition_that_a_newer_operator_takes_back_is_written_less_and_less_often(api, forked, kwok_namespace):
    path = job_path(kwok_namespace)
    with definition(api, newer):
        create_job(api, qlora_job(namespace=kwok_namespace, policy={"onOutOfMemory": "Later"}))
        for _ in range(MOST_WRITES):  # this test is the newer operator
            left = api.wait_for(path, lambda job: condition(job, "Degraded").get("status") == "True", seconds=LONG)
            if "it is written again in 4 s" in forked.log.read_text():
                break
            kept = [c | ({"status": "False"} if c["type"] == "Degraded" else {}) for c in left["status"]["conditions"]]
            api.patch(f"{path}/status", {"status": {"conditions": kept}})
        else:
            pytest.fail(f"it was written {MOST_WRITES} times without a pause")


def test_an_older_definition_takes_what_a_newer_operator_writes(api, forked, kwok_namespace):
    with definition(api, older), pods_do(api, kwok_namespace, ends(adapter=ADAPTER), attempt=2):
        path = create_job(api, qlora_job(namespace=kwok_namespace))
        api.wait_for(path, in_state("Running"), seconds=LONG)
        api.patch(path, {"spec": {"suspend": True}})
        api.wait_for(path, in_state("Suspended"), seconds=LONG)
        api.patch(path, {"spec": {"suspend": False}})
        done = api.wait_for(path, in_state("Succeeded"), seconds=LONG)
    assert [a["reason"] for a in done["status"]["attempts"]] == ["Suspended", "Completed"]
    assert condition(done, "Succeeded")["status"] == "True"
    assert "another program" not in forked.log.read_text()
