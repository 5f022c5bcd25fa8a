"""Pods with containers that are not the operator's: service meshes, log shippers. The trainer's end is the pod's."""

from __future__ import annotations

import pytest

from cluster.kwok import finish_container
from cluster.scenarios.forked_operator import ForkedOperator
from cluster.scenarios.jobs import create_job, in_state, last_attempt, qlora_job
from cluster.scenarios.script import sidecar_in_pods
from cluster.scenarios.whole_life import ADAPTER, PREPARED, word

PODS = "/api/v1/namespaces/{}/pods"
LONG = 60


@pytest.fixture
def meshed(api, kwok_namespace):
    """A namespace in which each pod gets a container that runs until the pod is deleted."""
    with sidecar_in_pods(api, kwok_namespace):
        yield kwok_namespace


def running_pods(api, namespace, count=1):
    """Names of the pods once so many run, by worker."""

    def run(found):
        return sum(pod["status"].get("phase") == "Running" for pod in found["items"]) == count

    found = api.wait_for(PODS.format(namespace), run, seconds=LONG)
    return sorted(pod["metadata"]["name"] for pod in found["items"])


def no_pods(api, namespace):
    api.wait_for(PODS.format(namespace), lambda found: not found["items"], seconds=LONG, what="no pods")


def test_an_adapter_that_is_published_ends_the_job_and_its_pod_goes(api, forked, meshed):
    path = create_job(api, qlora_job(namespace=meshed))
    api.wait_for(path, in_state("Running"), seconds=LONG)
    (name,) = running_pods(api, meshed)
    finish_container(api, meshed, name, message=word(adapter=ADAPTER))
    done = api.wait_for(path, in_state("Succeeded", "Completed"), seconds=LONG)
    assert done["status"]["adapter"] == ADAPTER
    no_pods(api, meshed)


def test_a_failure_of_one_worker_ends_the_others_and_the_next_attempt_follows(api, forked, meshed):
    path = create_job(api, qlora_job(namespace=meshed, workers=2))
    api.wait_for(path, in_state("Running"), seconds=LONG)
    names = running_pods(api, meshed, 2)
    finish_container(api, meshed, names[1], exit_code=41, message=word(41, "OutOfDeviceMemory", "at step 3"))
    again = api.wait_for(path, lambda job: len(job["status"]["attempts"]) == 2, seconds=LONG)
    first = again["status"]["attempts"][0]
    assert (first["reason"], first["message"], first["exitCode"]) == ("OutOfDeviceMemory", "at step 3", 41)
    api.wait_for(path, in_state("Running"), seconds=LONG)


def test_prepare_goes_on_to_the_training(api, crd_cluster, fork_server, meshed, tmp_path):
    settings = {"namespaces": [meshed], "prepare": {"enabled": True}}
    with ForkedOperator(fork_server, tmp_path, crd_cluster.kubeconfig, **settings):
        path = create_job(api, qlora_job(namespace=meshed, workers=2))
        (name,) = running_pods(api, meshed)
        finish_container(api, meshed, name, message=word(prepared=PREPARED))
        running = api.wait_for(path, in_state("Running"), seconds=LONG)
        assert running["status"]["prepared"]["trainRows"] == PREPARED["trainRows"]
        api.wait_gone(f"{PODS.format(meshed)}/{name}", seconds=LONG)


def test_a_container_that_fails_beside_a_trainer_that_runs_changes_nothing(api, forked, meshed):
    path = create_job(api, qlora_job(namespace=meshed))
    (name,) = running_pods(api, meshed)
    finish_container(api, meshed, name, exit_code=1, trainer=False)
    api.patch(path, {"metadata": {"annotations": {"wake": "up"}}})
    running = api.wait_for(path, in_state("Running"), seconds=LONG)
    assert "runningTime" in last_attempt(running)


def test_a_budget_and_a_suspension_act_though_another_container_is_not_ready(api, forked, meshed):
    path = create_job(api, qlora_job(namespace=meshed))
    (name,) = running_pods(api, meshed)
    finish_container(api, meshed, name, exit_code=1, trainer=False)
    api.wait_for(path, in_state("Running"), seconds=LONG)
    api.patch(path, {"spec": {"suspend": True}})
    api.wait_for(path, in_state("Suspended"), seconds=LONG)
    no_pods(api, meshed)
    api.patch(path, {"spec": {"suspend": False, "policy": {"budgetGpuHours": "0.002"}}})
    (name,) = running_pods(api, meshed)
    finish_container(api, meshed, name, exit_code=1, trainer=False)
    api.wait_for(path, in_state("Suspended", "BudgetReached"), seconds=LONG)
    no_pods(api, meshed)


def test_labels_and_annotations_of_chart_and_job_are_on_the_pods(
    api, crd_cluster, fork_server, kwok_namespace, tmp_path
):
    chart = {"podLabels": {"team": "platform", "mesh": "on"}, "podAnnotations": {"example.com/a": "chart"}}
    of_job = {"podLabels": {"mesh": "off"}, "podAnnotations": {"sidecar.istio.io/inject": "false"}}
    with ForkedOperator(fork_server, tmp_path, crd_cluster.kubeconfig, namespaces=[kwok_namespace], trainer=chart):
        create_job(api, qlora_job(namespace=kwok_namespace, scheduling=of_job))
        (name,) = running_pods(api, kwok_namespace)
    metadata = api.get(f"{PODS.format(kwok_namespace)}/{name}")["metadata"]
    assert {"team": "platform", "mesh": "off", "qlora.dev/job": "job"}.items() <= metadata["labels"].items()
    assert metadata["annotations"]["example.com/a"] == "chart"
    assert metadata["annotations"]["sidecar.istio.io/inject"] == "false"
