"""Tools that know nothing of QLoRAJobs: kubectl wait and get, and Helm's --wait, which is kstatus."""

from __future__ import annotations

import json
import subprocess

import pytest

from cluster.scenarios.jobs import GROUP, condition, create_job, in_state, job_path, qlora_job
from cluster.scenarios.script import pods_do
from cluster.scenarios.whole_life import ADAPTER, ends
from services.binaries import find_or_build
from services.tools import HELM

LONG = 60
KINDS = {"good": ends(adapter=ADAPTER), "bad": ends(40, "UserError", "no such column")}


@pytest.fixture
def both(api, kwok_namespace):
    """Pods of two jobs: those of one succeed, those of the other fail."""
    with (
        pods_do(api, kwok_namespace, KINDS["good"], job="good"),
        pods_do(api, kwok_namespace, KINDS["bad"], job="bad"),
    ):
        yield kwok_namespace


def test_the_end_of_either_kind_is_one_condition_and_fields_select(api, crd_cluster, forked, both):
    for name in KINDS:
        create_job(api, qlora_job(name, both))
    jobs = [f"qlorajob/{name}" for name in KINDS]
    crd_cluster.kubectl("wait", "--for=condition=Finished", "--timeout=60s", "-n", both, *jobs)
    failed = crd_cluster.kubectl("get", "qlorajobs", "-n", both, "--field-selector=status.state=Failed", "-o", "name")
    assert failed.split() == ["qlorajob.qlora.dev/bad"]
    found = {job["metadata"]["name"]: job for job in api.list(f"/apis/qlora.dev/v1alpha1/namespaces/{both}/qlorajobs")}
    assert [condition(found["good"], kind).get("status") for kind in ("Ready", "Stalled")] == ["True", None]
    assert [condition(found["bad"], kind).get("status") for kind in ("Ready", "Stalled")] == ["False", "True"]
    assert condition(found["bad"], "Stalled")["message"] == "no such column"


def test_a_job_that_trains_is_not_ready_and_says_what_goes_on(api, forked, kwok_namespace):
    path = create_job(api, qlora_job(namespace=kwok_namespace))
    ready = condition(api.wait_for(path, in_state("Running"), seconds=LONG), "Ready")
    assert (ready["status"], ready["reason"], ready["message"].startswith("attempt 1")) == ("False", "Training", True)


def helm_install(cluster, folder, job, timeout="60s"):
    """Install a chart of one job, and wait for it."""
    name, namespace = job["metadata"]["name"], job["metadata"]["namespace"]
    chart = folder / name
    (chart / "templates").mkdir(parents=True)
    (chart / "Chart.yaml").write_text(f"apiVersion: v2\nname: {name}\nversion: 0.1.0\n")
    (chart / "templates" / "job.yaml").write_text(json.dumps(job))
    command = [find_or_build(HELM), "install", name, chart, "--namespace", namespace, "--wait", "--timeout", timeout]
    kubeconfig = ["--kubeconfig", cluster.kubeconfig]
    return subprocess.run([*command, *kubeconfig], capture_output=True, text=True, timeout=LONG * 2, check=False)


def test_helm_waits_for_the_adapter_and_sees_a_failure(crd_cluster, forked, both, tmp_path):
    for name, code in (("good", 0), ("bad", 1)):
        done = helm_install(crd_cluster, tmp_path, qlora_job(name, both))
        assert done.returncode == code, done.stderr


def test_a_job_that_no_operator_has_seen_is_in_progress(api, crd_cluster, kwok_namespace, tmp_path):
    done = helm_install(crd_cluster, tmp_path, qlora_job(namespace=kwok_namespace), timeout="3s")
    assert (done.returncode, "InProgress" in done.stderr) == (1, True), done.stderr
    job, (listed,) = api.get(job_path(kwok_namespace)), api.list(f"{GROUP}/namespaces/{kwok_namespace}/qlorajobs")
    for seen in (job, listed):
        assert (seen["status"]["observedGeneration"], seen["metadata"]["generation"]) == (0, 1)
        assert (seen["status"]["state"], seen["status"]["reason"]) == ("Pending", "Pending")


def test_a_change_of_a_job_that_is_over_is_observed(api, forked, both):
    for name in KINDS:
        path = create_job(api, qlora_job(name, both))
        api.wait_for(path, lambda job: condition(job, "Finished"), seconds=LONG)
        generation = api.patch(path, {"spec": {"policy": {"maxRestarts": 5}}})["metadata"]["generation"]
        api.wait_for(path, lambda job, now=generation: job["status"]["observedGeneration"] == now, seconds=LONG)
