"""The chart on a real API server: what it installs, whom it lets do what, and what is left of it."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest
import yaml

from charts.helm import NAMESPACE, RELEASE, REPOSITORY
from charts.installed import (
    ADMINISTRATOR,
    ENFORCED_SECONDS,
    FULL_NAME,
    InstalledChart,
    refusal,
    running,
)
from cluster.api import ClusterApiError
from cluster.control_plane import ControlPlane, KubectlError, Settings
from cluster.scenarios.jobs import qlora_job, wait_until_served
from cluster.waits import wait_until_counted

if TYPE_CHECKING:
    from collections.abc import Iterator

POLICY = f"/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies/{NAMESPACE}-{FULL_NAME}"
ACCOUNT = f"system:serviceaccount:{NAMESPACE}:{FULL_NAME}"
JOBS = sorted((REPOSITORY / "examples" / "cluster").glob("*.yaml"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[ControlPlane]:
    with running(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def installed(helm, cluster) -> InstalledChart:
    """The chart, installed as most do it."""
    installed = InstalledChart(helm, cluster)
    installed.upgrade()
    installed.wait_until_enforced()
    return installed


def may(cluster, user, verb, resource, *, namespace="default", groups=()):
    """Return whether RBAC lets a user do something, by the API server's own answer."""
    group, _, name = resource.rpartition("/")
    kind, _, subresource = name.partition(":")
    wanted = {"verb": verb, "resource": kind, "subresource": subresource, "group": group, "namespace": namespace}
    spec = {"user": user, "groups": list(groups), "resourceAttributes": wanted}
    review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}
    return cluster.api.post("/apis/authorization.k8s.io/v1/subjectaccessreviews", review)["status"]["allowed"]


# --------------------------------------------------------------------------------------------------------- the release


def test_helm_says_what_comes_next(installed):
    notes = installed.helm("get", "notes", RELEASE, "--namespace", NAMESPACE)
    assert f"kubectl --namespace {NAMESPACE} rollout status deployment/{FULL_NAME}" in notes
    assert "get qlorajobs --watch" in notes


def test_the_operators_pod_is_made_in_a_namespace_that_enforces_restricted(installed, cluster):
    path = f"/api/v1/namespaces/{NAMESPACE}/pods"
    cluster.api.wait_for(path, lambda pods: pods["items"], what="a pod of the Deployment")


def test_the_api_server_finds_no_fault_in_the_policys_expressions(installed, cluster):
    policy = cluster.api.wait_for(POLICY, lambda p: "typeChecking" in p.get("status", {}), what="a checked policy")
    assert policy["status"]["typeChecking"] == {}


@pytest.mark.parametrize("path", JOBS, ids=lambda p: p.name)
def test_example_jobs_pass_all_rules_of_the_definition(installed, cluster, path):
    """Those that cross fields, too, which a schema cannot hold."""
    assert refusal(cluster, yaml.safe_load(path.read_text()), ADMINISTRATOR) == ""


# ----------------------------------------------------------------------------------------------------- the operator may


@pytest.mark.parametrize(
    ("verb", "resource"),
    [
        # It may create Secrets, and the policy of keys says which: tests/cluster/operator/security/test_rights.py.
        *((verb, "secrets") for verb in ("get", "list", "watch", "update", "patch", "delete", "deletecollection")),
        *(
            (verb, resource)
            for verb in ("get", "create")
            for resource in ("pods:exec", "pods:attach", "pods:log", "pods:proxy")
        ),
        ("create", "pods"),
        ("create", "serviceaccounts:token"),
        ("get", "configmaps"),
        ("update", "rbac.authorization.k8s.io/roles"),
        ("create", "rbac.authorization.k8s.io/rolebindings"),
        ("impersonate", "users"),
        ("delete", "pods"),
        ("create", "qlora.dev/qlorasweeps"),
        ("patch", "qlora.dev/qlorasweeps"),
        ("update", "qlora.dev/qlorajobs"),
        ("patch", "apiextensions.k8s.io/customresourcedefinitions"),
        ("patch", "nodes"),
    ],
)
def test_the_operator_may_not(installed, cluster, verb, resource):
    for namespace in (NAMESPACE, "kube-system", ""):
        assert not may(cluster, ACCOUNT, verb, resource, namespace=namespace)


@pytest.mark.parametrize(
    ("verb", "resource"),
    [
        ("patch", "qlora.dev/qlorajobs:status"),
        ("patch", "qlora.dev/qlorasweeps:status"),
        ("create", "batch/jobs"),
        ("delete", "batch/jobs"),
        ("create", "events.k8s.io/events"),
    ],
)
def test_the_operator_may(installed, cluster, verb, resource):
    assert may(cluster, ACCOUNT, verb, resource)


def test_in_named_namespaces_the_operator_may_nothing_elsewhere(helm, installed, cluster):
    here, there, own = (cluster.create_namespace(p) for p in ("served", "other", "system"))
    second = InstalledChart(helm, cluster, "second", own)
    off = {"install": False}
    second.upgrade(namespaces=[here], crds=off, admissionPolicy={"enabled": False}, rbac={"aggregate": False})
    account = f"system:serviceaccount:{own}:second-qlora-operator"
    assert may(cluster, account, "create", "batch/jobs", namespace=here)
    assert not may(cluster, account, "create", "batch/jobs", namespace=there)
    assert not may(cluster, account, "list", "qlora.dev/qlorajobs", namespace="")
    assert not may(cluster, account, "list", "nodes", namespace="")
    objects = second.objects()
    second.uninstall()
    assert second.left(objects) == []


# ----------------------------------------------------------------------------------------------------------- people may


@pytest.mark.parametrize(
    ("role", "verb", "allowed"),
    [("view", "list", True), ("view", "create", False), ("edit", "create", True), ("admin", "delete", True)],
)
def test_a_namespaces_roles_reach_its_jobs(installed, cluster, role, verb, allowed):
    namespace = cluster.create_namespace("people")
    cluster.kubectl("create", "rolebinding", "one", f"--clusterrole={role}", "--user=kim", "-n", namespace)
    until = time.monotonic() + ENFORCED_SECONDS  # a controller puts the rules together
    while may(cluster, "kim", verb, "qlora.dev/qlorajobs", namespace=namespace) != allowed and time.monotonic() < until:
        time.sleep(0.1)
    assert may(cluster, "kim", verb, "qlora.dev/qlorajobs", namespace=namespace) == allowed


@pytest.fixture(scope="module")
def team(installed, cluster) -> str:
    """A namespace in which jane may create and change QLoRAJobs, and get the Secret and the claim named 'hers'."""
    namespace = cluster.create_namespace("team")
    for name in ("hers", "theirs"):
        cluster.kubectl("create", "secret", "generic", name, "--from-literal=KEY=value", "-n", namespace)
    rules = [
        {"apiGroups": ["qlora.dev"], "resources": ["qlorajobs"], "verbs": ["create", "get", "update", "patch"]},
        {
            "apiGroups": [""],
            "resources": ["secrets", "persistentvolumeclaims"],
            "resourceNames": ["hers"],
            "verbs": ["get"],
        },
    ]
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": "jane"}, "rules": rules}
    cluster.api.create(role, namespace)
    cluster.kubectl("create", "rolebinding", "jane", "--role=jane", "--user=jane", "-n", namespace)
    return namespace


def naming(namespace, field, value):
    """A job that names something in one field, by its path below spec."""
    job = qlora_job("job", namespace)
    *above, last = field.split(".")
    here = job["spec"]
    for key in above:
        here = here.setdefault(key, {})
    here[last] = value
    return job


@pytest.mark.parametrize("field", ["model.credentials", "dataset.train.credentials", "output.credentials"])
def test_a_job_may_name_no_secret_that_its_creator_may_not_get(cluster, team, field):
    assert refusal(cluster, naming(team, field, "hers"), "jane") == ""
    said = refusal(cluster, naming(team, field, "theirs"), "jane")
    assert f'spec.{field}: "theirs" – jane may not get this Secret in namespace {team}' in said
    assert "name one that jane may get, or have the right granted" in said


@pytest.mark.parametrize("field", ["model.source", "dataset.train.source", "dataset.eval.source", "output.destination"])
def test_a_job_may_name_no_claim_that_its_creator_may_not_get(cluster, team, field):
    assert refusal(cluster, naming(team, field, "pvc://hers/folder"), "jane") == ""
    said = refusal(cluster, naming(team, field, "pvc://theirs/folder"), "jane")
    assert f'spec.{field}: "pvc://theirs/folder" – jane may not get this PersistentVolumeClaim' in said


TOOLS = (
    {"type": "MLflow", "server": "https://mlflow.example.com"},
    {"type": "WandB"},
    {"type": "TensorBoard", "folder": "s3://logs/board"},
)


def tracking(namespace, number, **changes):
    """A job that names three tracking tools, the one of this number with changes."""
    tools = [tool | (changes if tool is TOOLS[number] else {}) for tool in TOOLS]
    return naming(namespace, "tracking", tools)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_job_may_give_no_tracking_tool_a_secret_that_its_creator_may_not_get(cluster, team, number):
    assert refusal(cluster, tracking(team, number, credentials="hers"), "jane") == ""
    said = refusal(cluster, tracking(team, number, credentials="theirs"), "jane")
    assert f'spec.tracking[{number}].credentials: "theirs" – jane may not get this Secret in namespace {team}' in said


def test_a_job_may_give_no_tracking_tool_a_claim_that_its_creator_may_not_get(cluster, team):
    assert refusal(cluster, tracking(team, 2, folder="pvc://hers/board"), "jane") == ""
    said = refusal(cluster, tracking(team, 2, folder="pvc://theirs/board"), "jane")
    assert 'spec.tracking[2].folder: "pvc://theirs/board" – jane may not get this PersistentVolumeClaim' in said


def test_a_job_that_names_all_of_it_is_not_too_dear_for_the_api_server(cluster, team):
    """Name everything that costs a check: asking for eleven rights at once is limited."""
    job = qlora_job("job", team)
    for place in (job["spec"]["model"], job["spec"]["dataset"]["train"], job["spec"]["output"]):
        place["credentials"] = "hers"
    job["spec"]["model"]["source"] = "pvc://hers/model"
    job["spec"]["dataset"]["train"]["source"] = "pvc://hers/rows"
    job["spec"]["dataset"]["eval"] = {"source": "pvc://hers/eval"}
    job["spec"]["output"]["destination"] = "pvc://hers/out"
    job["spec"]["tracking"] = [tool | {"credentials": "hers"} for tool in TOOLS]
    job["spec"]["tracking"][2]["folder"] = "pvc://hers/board"
    assert refusal(cluster, job, "jane") == ""


def test_who_changes_something_else_of_a_job_needs_no_right_to_its_secrets(cluster, team):
    cluster.api.create(naming(team, "model.credentials", "theirs") | {"metadata": {"name": "old", "namespace": team}})
    change = json.dumps({"spec": {"suspend": True}})
    cluster.kubectl("patch", "qlorajob", "old", "-n", team, "--type=merge", "-p", change, "--as", "jane")


@pytest.mark.parametrize("number", range(len(TOOLS)))
def test_who_changes_where_a_jobs_keys_go_must_be_allowed_to_get_them(cluster, team, number):
    job = naming(team, "model.credentials", "theirs") | {"metadata": {"name": f"keys-{number}", "namespace": team}}
    cluster.api.create(job)
    change = json.dumps({"spec": {"tracking": [TOOLS[number]]}})
    with pytest.raises(KubectlError, match=r'spec.model.credentials: "theirs" – jane may not get this Secret'):
        cluster.kubectl("patch", "qlorajob", f"keys-{number}", "-n", team, "--type=merge", "-p", change, "--as", "jane")


def test_a_job_may_name_only_the_priority_classes_of_the_list(cluster, team):
    assert refusal(cluster, naming(team, "scheduling.priorityClassName", "research"), "jane") == ""
    said = refusal(cluster, naming(team, "scheduling.priorityClassName", "nightly"), "jane")
    assert 'spec.scheduling.priorityClassName: "nightly" is not for QLoRAJobs here; use research' in said


@pytest.mark.parametrize("name", ["system-node-critical", "system-cluster-critical", "system-x"])
def test_no_job_names_a_priority_class_of_the_systems_whatever_the_list_says(cluster, installed, name):
    job = qlora_job(scheduling={"priorityClassName": name})
    assert "priorityClassName must not be a system class (system-…)" in refusal(cluster, job, ADMINISTRATOR)


@pytest.mark.parametrize(
    ("toleration", "complaint"),
    [
        pytest.param({"operator": "Exists"}, "key is required: a job must not tolerate all taints", id="every-taint"),
        pytest.param({"key": "", "operator": "Exists"}, "key is required", id="every-taint-by-an-empty-key"),
        pytest.param(
            {"key": "node-role.kubernetes.io/control-plane", "operator": "Exists"},
            'the key "node-role.kubernetes.io/control-plane" is not for QLoRAJobs here; allowed: amd.com/gpu',
            id="control-plane",
        ),
        pytest.param({"key": "node.kubernetes.io/unschedulable", "operator": "Exists"}, "is not for", id="cordoned"),
        pytest.param({"key": "team-b", "value": "reserved"}, 'the key "team-b" is not for QLoRAJobs', id="of-others"),
        pytest.param({"key": "nvidia.com/gpu", "operator": "Exists"}, "", id="gpu"),
        pytest.param({"key": "spot", "operator": "Exists", "effect": "NoSchedule"}, "", id="spot"),
    ],
)
def test_a_job_tolerates_only_the_taints_of_the_list(cluster, installed, toleration, complaint):
    said = refusal(cluster, qlora_job(scheduling={"tolerations": [{"key": "spot"}, toleration]}), ADMINISTRATOR)
    assert (complaint in said) if complaint else said == ""


@pytest.mark.parametrize(
    ("key", "complaint"),
    [
        (
            "node-role.kubernetes.io/control-plane",
            'the key "node-role.kubernetes.io/control-plane" is not for QLoRAJobs',
        ),
        ("kubernetes.io/hostname", "is not for QLoRAJobs here; allowed: amd.com/*"),
        ("team", 'the key "team" is not'),
        ("kubernetes.azure.com/mode", "is not for"),
        ("eks.amazonaws.com/nodegroup", "is not for"),
        ("cloud.google.com/gke-nodepool", "is not for"),
        ("cloud.google.com/gke-accelerator-count", ""),
        ("nvidia.com/gpu.product", ""),
        ("kubernetes.io/arch", ""),
        ("kubernetes.io/arch-of-others", "is not for"),
        (f"nvidia.com/{'x' * 317}", "nodeSelector must have keys of at most 317 characters"),
    ],
)
def test_a_job_selects_nodes_only_by_the_labels_of_the_list(cluster, installed, key, complaint):
    said = refusal(cluster, qlora_job(scheduling={"nodeSelector": {key: "x"}}), ADMINISTRATOR)
    assert (complaint in said) if complaint else said == ""


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ({"labels": {f"l{i}": "x" for i in range(65)}}, "metadata.labels: 65 are more than the 64"),
        ({"annotations": {f"a{i}": "x" for i in range(65)}}, "metadata.annotations: 65 are more than the 64"),
        ({"annotations": {"a": "x" * 65537}}, "a value is longer than the 65536 characters"),
        ({"finalizers": [f"example.com/f{i}" for i in range(17)]}, "metadata.finalizers: 17 are more than the 16"),
        (
            {
                "ownerReferences": [
                    {"apiVersion": "v1", "kind": "ConfigMap", "name": f"o{i}", "uid": f"u{i}"} for i in range(17)
                ]
            },
            "metadata.ownerReferences: 17 are more than the 16",
        ),
        (
            {"ownerReferences": [{"apiVersion": "v1", "kind": "ConfigMap", "name": "o" * 254, "uid": "u"}]},
            "metadata.ownerReferences: a value is longer than",
        ),
        (
            {
                "labels": {f"l{i}": "x" for i in range(64)},
                "annotations": {"a": "x" * 65536},
                "finalizers": [f"example.com/f{i}" for i in range(16)],
            },
            "",
        ),
    ],
    ids=["labels", "annotations", "long-annotation", "finalizers", "owners", "long-owner", "all-that-is-allowed"],
)
def test_metadata_of_a_job_is_bounded(cluster, installed, metadata, complaint):
    job = qlora_job()
    job["metadata"] |= metadata
    said = refusal(cluster, job, ADMINISTRATOR)
    assert (complaint in said) if complaint else said == ""


def test_a_job_of_before_the_bounds_can_still_be_suspended(helm, tmp_path):
    with running(tmp_path / "cluster") as cluster:
        release = InstalledChart(helm, cluster)
        release.upgrade(admissionPolicy={"enabled": False})
        wait_until_served(cluster.api)
        job = qlora_job("old", scheduling={"tolerations": [{"key": "team-b"}], "nodeSelector": {"team": "b"}})
        job["metadata"] |= {"labels": {f"l{i}": "x" for i in range(70)}, "annotations": {"a": "x" * 70000}}
        path = cluster.api.path_of(job)
        cluster.api.create(job)
        release.upgrade()
        release.wait_until_enforced()
        assert cluster.api.patch(path, {"spec": {"suspend": True}})["spec"]["suspend"] is True
        with pytest.raises(ClusterApiError, match=r"metadata\.labels: 71"):
            cluster.api.patch(path, {"metadata": {"labels": {"one-more": "x"}}})


def test_a_namespace_of_the_releases_holds_no_more_jobs_than_its_quota(helm, tmp_path):
    with running(tmp_path / "cluster", Settings(quota_sync_seconds=2)) as cluster:
        team = cluster.create_namespace("team")
        InstalledChart(helm, cluster).upgrade(namespaces=[team], jobQuota={"count": 2})
        wait_until_served(cluster.api)
        wait_until_counted(cluster.api, team, f"{FULL_NAME}-jobs")
        for name in ("one", "two"):
            cluster.api.create(qlora_job(name, team))
        with pytest.raises(ClusterApiError, match=r"exceeded quota.*qlorajobs\.qlora\.dev=2"):
            cluster.api.create(qlora_job("three", team))
