"""Tools that know nothing of QLoRAJobs: kubectl wait and get, and Helm's --wait, which is kstatus."""

from __future__ import annotations

import json
import subprocess

import pytest

from cluster.scenarios.jobs import condition, create_job, in_state, qlora_job
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


def test_helm_waits_for_the_adapter_and_sees_a_failure(api, crd_cluster, forked, both, tmp_path):
    for name, code in (("good", 0), ("bad", 1)):
        chart = tmp_path / name
        (chart / "templates").mkdir(parents=True)
        (chart / "Chart.yaml").write_text(f"apiVersion: v2\nname: {name}\nversion: 0.1.0\n")
        (chart / "templates" / "job.yaml").write_text(json.dumps(qlora_job(name, both)))
        command = [find_or_build(HELM), "install", name, chart, "--namespace", both, "--wait", "--timeout", "60s"]
        kubeconfig = ["--kubeconfig", crd_cluster.kubeconfig]
        done = subprocess.run([*command, *kubeconfig], capture_output=True, text=True, timeout=LONG * 2, check=False)
        assert done.returncode == code, done.stderr
