"""Obstacles of a job show in its conditions, with a reason and what to do about it, within ten seconds."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from cluster.api import ClusterApiError
from cluster.scenarios.forked_operator import ForkedOperator
from cluster.scenarios.jobs import condition, create_job, in_state, qlora_job
from cluster.scenarios.script import pods_do
from cluster.scenarios.whole_life import ADAPTER, ends
from cluster.waits import wait_until_counted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster.api import ClusterApi, Object

SOON = 10
JOBS, PODS = "/apis/batch/v1/namespaces/{}/jobs", "/api/v1/namespaces/{}/pods"
ADMISSION = "admissionregistration.k8s.io/v1"
DONE = ends(adapter=ADAPTER)


def quota(**hard: str) -> Object:
    return {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "quota"}, "spec": {"hard": hard}}


def create(api: ClusterApi, manifest: Object, namespace: str) -> None:
    """Create it; a quota is waited for until it is counted."""
    api.create(manifest, namespace)
    if manifest["kind"] == "ResourceQuota":
        wait_until_counted(api, namespace, manifest["metadata"]["name"])


def limits(**limit: Any) -> Object:
    spec = {"limits": [{"type": "Container", **limit}]}
    return {"apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "limits"}, "spec": spec}


@contextmanager
def denied(api: ClusterApi, namespace: str, group: str, resource: str, message: str) -> Iterator[None]:
    """A policy of the cluster's that lets nobody create a kind of object in a namespace."""
    name = f"deny-{resource}-{namespace}"
    rule = {"apiGroups": [group], "apiVersions": ["*"], "operations": ["CREATE"], "resources": [resource]}
    policy = {
        "apiVersion": ADMISSION,
        "kind": "ValidatingAdmissionPolicy",
        "metadata": {"name": name},
        "spec": {
            "matchConstraints": {"resourceRules": [rule]},
            "validations": [{"expression": "false", "message": message}],
        },
    }
    binding = {
        "apiVersion": ADMISSION,
        "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": {"name": name},
        "spec": {
            "policyName": name,
            "validationActions": ["Deny"],
            "matchResources": {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}}},
        },
    }
    for body in (policy, binding):
        api.create(body)
    try:
        wait_until_denied(api, namespace, group, resource, message)
        yield
    finally:
        for body in (binding, policy):
            api.delete(api.path_of(body))


def wait_until_denied(api: ClusterApi, namespace: str, group: str, resource: str, message: str) -> None:
    probes = {
        "jobs": {"kind": "Job", "spec": {"template": {"spec": POD | {"restartPolicy": "Never"}}}},
        "pods": {"kind": "Pod", "spec": POD},
        "services": {"kind": "Service", "spec": {"clusterIP": "None"}},
    }
    place = f"/apis/{group}/v1" if group else "/api/v1"
    body = {"apiVersion": f"{group}/v1".strip("/"), "metadata": {"name": "probe"}, **probes[resource]}
    deadline = time.monotonic() + SOON
    while time.monotonic() < deadline:
        try:
            api.post(f"{place}/namespaces/{namespace}/{resource}", body, dryRun="All")
        except ClusterApiError as error:
            if message in error.message:
                return
        time.sleep(0.05)
    raise TimeoutError(f"the policy on {resource} is not enforced")


POD = {"containers": [{"name": "probe", "image": "probe"}]}


@pytest.mark.parametrize(
    ("objects", "job", "reason", "texts"),
    [
        pytest.param(
            [],
            {"parallelism": {"gpusPerWorker": 16}},
            "Unschedulable",
            ["as many free nvidia.com/gpu as spec.parallelism.gpusPerWorker asks for"],
            id="more-gpus-than-any-node-has",
        ),
        pytest.param(
            [],
            {"workers": 2, "training": {"globalBatchSize": 32}, "parallelism": {"gpusPerWorker": 16, "workers": 2}},
            "Unschedulable",
            ["spec.parallelism.gpusPerWorker"],
            id="more-gpus-than-any-node-has-as-a-gang",
        ),
        pytest.param(
            [],
            {"scheduling": {"nodeSelector": {"gpu": "of-tomorrow"}}},
            "Unschedulable",
            ["spec.scheduling.nodeSelector matches no node"],
            id="a-selector-that-matches-no-node",
        ),
        pytest.param(
            [quota(**{"requests.nvidia.com/gpu": "3"})],
            {"parallelism": {"gpusPerWorker": 4}},
            "QuotaExceeded",
            [
                "too little requests.nvidia.com/gpu (4 requested, 0 of 3 used)",
                "ask for fewer GPUs",
            ],
            id="a-quota-of-gpus",
        ),
        pytest.param(
            [quota(**{"count/jobs.batch": "0"})],
            {},
            "QuotaExceeded",
            ["exceeded quota: quota, requested: count/jobs.batch=1", "free some of the quota"],
            id="a-quota-of-jobs",
        ),
        pytest.param(
            [quota(**{"limits.cpu": "100"})],
            {},
            "Refused",
            ["failed quota: quota: must specify limits.cpu for: trainer", "have trainer.limitCpu set to true"],
            id="a-quota-of-cpu-limits",
        ),
        pytest.param(
            [limits(max={"memory": "1Gi"})],
            {},
            "Refused",
            ["maximum memory usage per Container is 1Gi"],
            id="a-limit-of-memory",
        ),
        pytest.param(
            [],
            {"model": {"source": "pvc://models.of-ours/llama"}},
            "MissingReference",
            ['claim "models.of-ours" not found; create it'],
            id="a-claim-that-is-missing",
        ),
        pytest.param(
            [],
            {"scheduling": {"priorityClassName": "most-important"}},
            "MissingReference",
            ["no PriorityClass with name most-important was found", "spec.scheduling.priorityClassName"],
            id="a-priority-class-that-is-missing",
        ),
        pytest.param(
            [],
            {"scheduling": {"gang": "Volcano"}},
            "Refused",
            ["spec.scheduling.gang", "Volcano"],
            id="a-gang-scheduler-that-is-not-installed",
        ),
        pytest.param(
            [],
            {"scheduling": {"gang": "Kueue", "queue": "team"}},
            "Refused",
            ["spec.scheduling.gang", "Kueue"],
            id="a-queue-that-nobody-serves",
        ),
        pytest.param(
            [],
            {"scheduling": {"tolerations": [{"operator": "Exists", "value": "x", "key": "k"}]}},
            "Refused",
            ["value must be empty when `operator` is 'Exists'"],
            id="what-only-the-pods-definition-forbids",
        ),
    ],
)
def test_what_keeps_a_job_from_running_is_said(api, forked, kwok_namespace, objects, job, reason, texts):
    for each in objects:
        create(api, each, kwok_namespace)
    path = create_job(api, qlora_job(namespace=kwok_namespace, **job))
    waiting = api.wait_for(path, in_state("Pending", reason), seconds=SOON)
    said = condition(waiting, "Running")
    assert (said["status"], said["reason"]) == ("False", reason)
    for text in texts:
        assert text in said["message"]


def test_a_namespace_with_quotas_on_limits_takes_pods_that_are_limited(
    fork_server, crd_cluster, kwok_namespace, tmp_path, api
):
    hard = {"limits.cpu": "100", "limits.memory": "1Ti", "limits.ephemeral-storage": "1Ti", "requests.cpu": "100"}
    create(api, quota(**hard), kwok_namespace)
    settings = {"namespaces": [kwok_namespace], "trainer": {"limitCpu": True}, "prepare": {"enabled": True}}
    pods = PODS.format(kwok_namespace)
    with ForkedOperator(fork_server, tmp_path / "operator", crd_cluster.kubeconfig, **settings):
        create_job(api, qlora_job(namespace=kwok_namespace))
        api.wait_for(pods, lambda found: len(found["items"]) == 1, what="Prepare's pod")


def test_kueue_without_a_queue_is_refused_by_the_api_server(api, kwok_namespace):
    with pytest.raises(ClusterApiError, match="gang Kueue needs queue, the name of a LocalQueue"):
        api.create(qlora_job("queued", kwok_namespace, scheduling={"gang": "Kueue"}))


def test_a_job_without_a_queue_is_told_so_where_the_operator_starts_gangs_by_kueue(
    api, crd_cluster, fork_server, kwok_namespace, tmp_path
):
    settings = {"namespaces": [kwok_namespace], "gang": "Kueue"}
    with ForkedOperator(fork_server, tmp_path, crd_cluster.kubeconfig, **settings):
        path = create_job(api, qlora_job(namespace=kwok_namespace))
        waiting = api.wait_for(path, in_state("Pending", "Refused"), seconds=SOON)
        assert condition(waiting, "Running")["message"].startswith("spec.scheduling.queue: must name a LocalQueue")
        api.patch(path, {"spec": {"scheduling": {"gang": "None"}}})
        api.wait_for(path, in_state("Running"), seconds=60)


def test_a_job_goes_on_by_itself_once_the_quota_allows(api, forked, kwok_namespace):
    create(api, quota(**{"requests.nvidia.com/gpu": "0"}), kwok_namespace)
    with pods_do(api, kwok_namespace, DONE):
        path = create_job(api, qlora_job(namespace=kwok_namespace))
        api.wait_for(path, in_state("Pending", "QuotaExceeded"), seconds=SOON)
        api.patch(
            f"/api/v1/namespaces/{kwok_namespace}/resourcequotas/quota",
            {"spec": {"hard": {"requests.nvidia.com/gpu": "8"}}},
        )
        done = api.wait_for(path, in_state("Succeeded"), seconds=60)
    assert [a["reason"] for a in done["status"]["attempts"]] == ["Completed"]


def test_what_keeps_prepare_from_running_is_said(api, crd_cluster, fork_server, kwok_namespace, tmp_path):
    create(api, quota(**{"requests.cpu": "1"}), kwok_namespace)
    settings = {"namespaces": [kwok_namespace], "prepare": {"enabled": True}}
    with ForkedOperator(fork_server, tmp_path, crd_cluster.kubeconfig, **settings):
        path = create_job(api, qlora_job(namespace=kwok_namespace))
        waiting = api.wait_for(path, in_state("Pending", "QuotaExceeded"), seconds=SOON)
    assert "exceeded quota: quota, requested: requests.cpu=2" in condition(waiting, "Prepared")["message"]


@pytest.mark.parametrize(
    ("group", "resource", "workers"), [("batch", "jobs", 1), ("", "services", 2), ("", "pods", 1)], ids=str
)
def test_a_policy_of_the_clusters_is_quoted(api, forked, kwok_namespace, group, resource, workers):
    text = f"no {resource} on Fridays"
    with denied(api, kwok_namespace, group, resource, text):
        path = create_job(api, qlora_job(namespace=kwok_namespace, workers=workers))
        refused = api.wait_for(path, in_state("Pending", "Refused"), seconds=SOON)
        assert text in condition(refused, "Running")["message"]
    api.wait_for(path, in_state("Running"), seconds=60)


@pytest.mark.parametrize("name", ["Job", "job.one", "-job", "j" * 53, "jöb", ""])
def test_names_that_children_could_not_have_are_refused_by_the_api_server(api, crd_cluster, kwok_namespace, name):
    with pytest.raises(ClusterApiError, match="name"):
        api.create(qlora_job(name, kwok_namespace))


def test_the_longest_name_runs(api, forked, kwok_namespace):
    with pods_do(api, kwok_namespace, DONE):
        path = create_job(api, qlora_job("j" * 52, kwok_namespace, workers=2))
        api.wait_for(path, in_state("Succeeded"))


def test_in_a_namespace_with_limits_and_restricted_pods_a_job_runs(api, forked, kwok_namespace):
    label = {"pod-security.kubernetes.io/enforce": "restricted"}
    api.create(limits(default={"cpu": "8"}, defaultRequest={"cpu": "1"}, max={"memory": "64Gi"}), kwok_namespace)
    with pods_do(api, kwok_namespace, DONE):
        api.patch(f"/api/v1/namespaces/{kwok_namespace}", {"metadata": {"labels": label}})
        path = create_job(api, qlora_job(namespace=kwok_namespace, workers=2))
        api.wait_for(path, in_state("Succeeded"))


def test_a_job_of_somebody_elses_under_the_childs_name_is_waited_for_and_named(api, forked, kwok_namespace):
    spec = {"suspend": True, "template": {"spec": POD | {"restartPolicy": "Never"}}}
    api.create({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job-1"}, "spec": spec}, kwok_namespace)
    path = create_job(api, qlora_job(namespace=kwok_namespace))
    waiting = api.wait_for(path, in_state("Pending", "Refused"), seconds=SOON)
    assert '"job-1"' in condition(waiting, "Running")["message"]
    api.delete(f"{JOBS.format(kwok_namespace)}/job-1")
    api.wait_for(path, in_state("Running"))


@pytest.mark.parametrize("labels", [{"qlora.dev/attempt": "first"}, {"qlora.dev/job-uid": "no-such"}, {}], ids=str)
def test_objects_with_the_operators_labels_that_it_did_not_make_do_no_harm(api, forked, kwok_namespace, labels):
    metadata = {"name": "foreign", "labels": {"qlora.dev/job": "job", **labels}}
    spec = {"template": {"metadata": {"labels": metadata["labels"]}, "spec": POD | {"restartPolicy": "Never"}}}
    api.create({"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}, kwok_namespace)
    api.create({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": POD}, kwok_namespace)
    with pods_do(api, kwok_namespace, DONE, component="trainer"):
        path = create_job(api, qlora_job(namespace=kwok_namespace))
        done = api.wait_for(path, in_state("Succeeded"))
    assert len(done["status"]["attempts"]) == 1
    forked.kill()
    forked.start()
    (jobs,) = (value for name, value in forked.metrics().items() if name.startswith("qlora_operator_jobs{"))
    assert jobs == 1


def test_a_namespace_that_is_deleted_takes_its_jobs_along(api, crd_cluster, fork_server, tmp_path):
    namespace = crd_cluster.create_namespace()
    with ForkedOperator(fork_server, tmp_path, crd_cluster.kubeconfig, namespaces=[namespace]) as operator:
        api.wait_for(create_job(api, qlora_job(namespace=namespace, workers=2)), in_state("Running"))
        api.delete(f"/api/v1/namespaces/{namespace}")
        api.wait_gone(f"/api/v1/namespaces/{namespace}", seconds=60)
        metrics = operator.metrics()
        assert operator.healthz()[0] == 200
    assert not [name for name in metrics if name.startswith("qlora_operator_jobs{")]
    assert sum(v for n, v in metrics.items() if n.startswith("qlora_operator_reconcile_errors_total")) < 10
