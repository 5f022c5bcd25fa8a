"""The operator with the rights that the chart gives it, and what a tenant reaches through it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from charts.helm import Helm
from charts.installed_roles import InstalledRoles, can_i, install
from cluster.api import ClusterApiError
from cluster.audit import READS
from cluster.control_plane import ControlPlane, KubectlError, Settings
from cluster.kwok import find_node_again, lose_node
from cluster.scenarios.forked_operator import ForkedOperator
from cluster.scenarios.history import History
from cluster.scenarios.jobs import create_job, in_state, last_attempt, qlora_job
from cluster.scenarios.script import pods_do
from cluster.scenarios.sweeps import EXPECTED as SWEEP_OUTCOME
from cluster.scenarios.sweeps import live_sweep, qlora_sweep, sweep_outcome, trials_live
from cluster.scenarios.whole_life import (
    ADAPTER,
    EXPECTED,
    NAMESPACE_LABELS,
    contradictions,
    ends,
    live,
    outcome,
    pods_live,
)
from fixtures import skip_unless_ci
from services.binaries import ToolMissingError, find_or_build
from services.tools import HELM

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cluster.audit import Request

ENFORCED_SECONDS = 30
FOR_OTHER_LIVES = {
    ("get", "qlorajobs"): "somebody changed a job between a decision and its write: test_api_faults",
    ("get", "jobs"): "the answer to a create was lost: test_crash_matrix",
    ("get", "services"): "the answer to a create was lost: test_crash_matrix",
    ("get", "nodes"): "a pod does not end: below",
    ("patch", "configmaps"): "something was learned: below",
    ("create", "qlorajobs"): "trials of a sweep: below",
    ("patch", "qlorajobs"): "trials of a sweep: below",
    ("patch", "qlorasweeps/status"): "a sweep: below",
    ("delete", "qlorasweeps"): "a sweep whose time to live is over: below",
    ("get", "qlorasweeps"): "somebody changed a sweep between a decision and its write: test_sweep_crash_matrix",
    ("create", "podgroups"): "Volcano, which is not on this cluster",
    ("get", "podgroups"): "Volcano, which is not on this cluster",
}
"""Rights that a life without mishaps does not use, and what uses them."""
AUDIT_SECONDS = 30
"""For the audit log to hold all of a life."""
MODES = ("the-whole-cluster", "one-namespace")


@pytest.fixture(scope="module")
def own_cluster(tmp_path_factory) -> Iterator[ControlPlane]:
    """A cluster for this module: policies and roles of the chart hold everywhere in it."""
    try:
        cluster = ControlPlane(tmp_path_factory.mktemp("rights"), Settings(eviction_seconds=1))
    except ToolMissingError as error:
        skip_unless_ci(str(error))
    with cluster:
        cluster.add_kwok_nodes(3)
        yield cluster


@pytest.fixture(scope="module")
def history(own_cluster, cluster_wide) -> Iterator[History]:
    with History(own_cluster) as history:
        yield history


@pytest.fixture(scope="module")
def helm(tmp_path_factory) -> Helm:
    try:
        return Helm(find_or_build(HELM), tmp_path_factory.mktemp("helm"))
    except ToolMissingError as error:
        skip_unless_ci(str(error))
        raise


@pytest.fixture(scope="module")
def cluster_wide(own_cluster, helm) -> InstalledRoles:
    return install(own_cluster, helm, "qlora-system", own_cluster.create_namespace("tenant", NAMESPACE_LABELS))


@pytest.fixture(scope="module")
def namespaced(own_cluster, helm, cluster_wide) -> InstalledRoles:
    """A second release, for one namespace; the definition and the policy are the first one's."""
    served = own_cluster.create_namespace("served", NAMESPACE_LABELS)
    off = {"crds": {"install": False}, "admissionPolicy": {"enabled": False}, "rbac": {"aggregate": False}}
    return install(own_cluster, helm, "second-system", served, namespaces=[served], **off)


@pytest.fixture
def installed(request, mode) -> InstalledRoles:
    return request.getfixturevalue({"the-whole-cluster": "cluster_wide", "one-namespace": "namespaced"}[mode])


# --------------------------------------------------------------------------------------------------------- the operator


@pytest.mark.parametrize("mode", MODES)
def test_a_whole_life_needs_no_right_that_the_chart_does_not_give(installed, history, fork_server, tmp_path):
    cluster, mark = installed.cluster, installed.cluster.audit_mark()
    operator = ForkedOperator(fork_server, tmp_path, installed.kubeconfig, **installed.settings)
    with operator, pods_live(cluster.api, installed.served):
        live(cluster.api, installed.served)
        assert operator.healthz() == (200, "ok\n")
    assert outcome(history, installed.served) == EXPECTED
    assert contradictions(history, installed.served) == []
    deadline = time.monotonic() + AUDIT_SECONDS
    while True:  # a watch is in the audit log when it has ended, and these ended with the operator
        asked = [r for r in cluster.requests_since(mark) if r.user == installed.account]
        unused = installed.rights - {(r.verb, r.resource) for r in asked} - FOR_OTHER_LIVES.keys()
        if not unused or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    assert {"create", "patch", "delete", "list", "watch"} <= {r.verb for r in asked}
    assert [(r.verb, r.resource, r.namespace) for r in asked if r.code == 403] == []
    assert unused == set(), "rights that no call needs"


@pytest.mark.parametrize("mode", MODES)
def test_a_whole_sweep_needs_no_right_that_the_chart_does_not_give(installed, history, fork_server, tmp_path):
    """With the chart's policies, which leave its trials to the operator and nothing else."""
    cluster, mark = installed.cluster, installed.cluster.audit_mark()
    settings = installed.settings | {"prepare": {"enabled": False}}
    with (
        trials_live(cluster.api, installed.served, everywhere=NAMESPACE_LABELS),
        ForkedOperator(fork_server, tmp_path, installed.kubeconfig, **settings),
    ):
        live_sweep(cluster.api, installed.served)
    assert sweep_outcome(history, installed.served) == SWEEP_OUTCOME
    asked = [r for r in cluster.requests_since(mark) if r.user == installed.account]
    assert [(r.verb, r.resource, r.namespace) for r in asked if r.code == 403] == []


def test_a_lost_node_is_looked_at_with_the_rights_of_the_chart(cluster_wide, fork_server, tmp_path):
    cluster, api = cluster_wide.cluster, cluster_wide.cluster.api
    namespace, mark = cluster.create_namespace(), cluster.audit_mark()
    settings = cluster_wide.settings | {"prepare": {"enabled": False}}
    with (
        ForkedOperator(fork_server, tmp_path, cluster_wide.kubeconfig, **settings),
        pods_do(api, namespace, ends(adapter=ADAPTER), attempt=2),
    ):
        path = create_job(api, qlora_job(namespace=namespace))
        node = last_attempt(api.wait_for(path, in_state("Running")))["node"]
        lose_node(api, node)
        try:
            done = api.wait_for(path, in_state("Succeeded"), seconds=60)
        finally:
            find_node_again(api, node)
    assert [a["reason"] for a in done["status"]["attempts"]] == ["NodeLost", "Completed"]
    asked = [r for r in cluster.requests_since(mark) if r.user == cluster_wide.account]
    assert [(r.verb, r.resource) for r in asked if r.code == 403] == []


def test_what_jobs_took_is_learned_with_the_rights_of_the_chart_and_not_again_after_a_restart(
    cluster_wide, fork_server, tmp_path
):
    cluster, api = cluster_wide.cluster, cluster_wide.cluster.api
    namespace, mark = cluster.create_namespace(), cluster.audit_mark()
    memory = {"predicted": {"peak": 1000}, "measured": {"peak": 1100}}
    settings = cluster_wide.settings | {"prepare": {"enabled": False}}
    settings["trainer"] = settings["trainer"] | {"gpu": "h100-80gb"}
    where, _, name = settings["memoryConfigMap"].partition("/")
    learned = f"/api/v1/namespaces/{where}/configmaps/{name}"
    with pods_do(api, namespace, ends(adapter=ADAPTER, memory=memory)):
        with ForkedOperator(fork_server, tmp_path / "first", cluster_wide.kubeconfig, **settings):
            api.wait_for(create_job(api, qlora_job("one", namespace)), in_state("Succeeded"), seconds=60)
            kept = api.wait_for(learned, lambda found: bool(found.get("data")), what="something is learned")["data"]
        assert {key: json.loads(text) for key, text in kept.items()} == {
            "h100-80gb.NF4": {"correction": 1.02, "jobs": 1}
        }
        restarted = cluster.audit_mark()
        with ForkedOperator(fork_server, tmp_path / "second", cluster_wide.kubeconfig, **settings):
            path = create_job(api, qlora_job("two", namespace, suspend=True))
            api.wait_for(path, in_state("Suspended"))
            assert {r.name for r in writes(cluster, cluster_wide, restarted)} == {"two"}
            api.patch(path, {"spec": {"suspend": False}})
            done = api.wait_for(path, in_state("Succeeded"), seconds=60)
    assert done["status"]["memoryCorrection"] == "1.0200"
    asked = [r for r in cluster.requests_since(mark) if r.user == cluster_wide.account]
    assert [(r.verb, r.resource) for r in asked if r.code == 403] == []


def writes(cluster: ControlPlane, installed: InstalledRoles, mark: int) -> list[Request]:
    """Return the operator's writes, events aside."""
    asked = [r for r in cluster.requests_since(mark) if r.user == installed.account]
    return [r for r in asked if r.verb not in READS and r.resource != "events"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("verb", ["get", "list", "watch", "update", "patch", "delete"])
def test_the_operator_sees_no_secrets(installed, verb):
    for namespace in (installed.served, "kube-system", ""):
        assert not can_i(installed.cluster, installed.account, verb, "secrets", namespace)


@pytest.mark.parametrize(
    ("verb", "resource"),
    [
        ("list", "qlorajobs.qlora.dev"),
        ("create", "jobs.batch"),
        ("delete", "services"),
        ("list", "pods"),
        ("get", "services"),
    ],
)
def test_an_operator_of_one_namespace_may_nothing_in_others(namespaced, verb, resource):
    assert can_i(namespaced.cluster, namespaced.account, verb, resource, namespaced.served)
    for namespace in ("default", "kube-system", ""):
        assert not can_i(namespaced.cluster, namespaced.account, verb, resource, namespace)


def test_an_operator_of_one_namespace_leaves_jobs_of_others_alone(namespaced, fork_server, tmp_path):
    api = namespaced.cluster.api
    with ForkedOperator(fork_server, tmp_path, namespaced.kubeconfig, **namespaced.settings):
        outside = create_job(api, qlora_job("outside", "default", suspend=True))
        inside = create_job(api, qlora_job("inside", namespaced.served, suspend=True))
        api.wait_for(inside, in_state("Suspended"))
        assert api.get(outside)["status"]["observedGeneration"] == 0
    for path in (outside, inside):
        api.delete(path)


@pytest.mark.parametrize(
    ("name", "kind", "allowed"),
    [
        ("qlora-key-1", "qlora.dev/job-key", True),
        ("qlora-key-2", "Opaque", False),
        ("other", "qlora.dev/job-key", False),
        ("token", "kubernetes.io/service-account-token", False),
    ],
)
def test_an_operator_that_was_taken_over_creates_no_secret_but_keys(name, kind, allowed, cluster_wide, tenant):
    said = create_secret(tenant, name, kind, cluster_wide.kubeconfig)
    assert bool(said) != allowed, said
    assert allowed or "the operator creates no Secrets but those" in said


def test_an_operator_that_was_taken_over_creates_and_changes_no_job_but_trials(cluster_wide, tenant):
    job = qlora_job("made", tenant.namespace, suspend=True)
    operator = Tenant(tenant.cluster, tenant.namespace, cluster_wide.kubeconfig)
    assert "the operator creates and changes no QLoRAJobs but the trials" in operator.create(job)
    tenant.cluster.api.create(job)
    suspend = ("patch", "qlorajob", "made", "--type=merge", "-p", '{"spec": {"suspend": false}}')
    with pytest.raises(KubectlError, match="the operator creates and changes no QLoRAJobs but the trials"):
        tenant.cluster.kubectl(*suspend, "-n", tenant.namespace, kubeconfig=cluster_wide.kubeconfig)
    sweep = tenant.cluster.api.create(qlora_sweep(tenant.namespace, suspend=True))["metadata"]["uid"]
    assert operator.create(as_trial(qlora_job("search-8", tenant.namespace, suspend=True), sweep)) == ""
    more = '{"spec": {"output": {"credentials": "of-others"}}}'
    with pytest.raises(KubectlError, match="changes nothing of a trial but"):
        tenant.cluster.kubectl(
            *("patch", "qlorajob", "search-8", "--type=merge", "-p", more, "-n", tenant.namespace),
            kubeconfig=cluster_wide.kubeconfig,
        )


def test_nobody_else_makes_a_trial_of_a_sweep(tenant):
    job = qlora_job("search-9", tenant.namespace, suspend=True)
    assert "only the operator creates trials" in tenant.create(as_trial(job))
    assert tenant.create(job) == ""
    assert "only the operator creates trials" in tenant.apply(as_trial(job))


def as_trial(job: dict[str, Any], sweep: str = "a-uid") -> dict[str, Any]:
    """A job that says a sweep controls it."""
    owner: dict[str, Any] = {"apiVersion": "qlora.dev/v1alpha1", "kind": "QLoRASweep", "name": "search", "uid": sweep}
    owner["controller"] = True
    return job | {"metadata": job["metadata"] | {"ownerReferences": [owner]}}


def test_nobody_else_puts_a_key_where_the_operator_would_find_it(tenant):
    """A user who may create Secrets, and read none, would otherwise know a job's key before its first pod."""
    rules = [{"apiGroups": [""], "resources": ["secrets"], "verbs": ["create"]}]
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": "w"}, "rules": rules}
    tenant.cluster.api.create(role, tenant.namespace)
    tenant.cluster.kubectl("create", "rolebinding", "w", "--role=w", "--user=writer", "-n", tenant.namespace)
    writer = tenant.cluster.user_kubeconfig("writer", namespace=tenant.namespace)
    assert "only their operator creates them" in create_secret(tenant, "qlora-key-3", "qlora.dev/job-key", writer)
    assert create_secret(tenant, "own-secret", "Opaque", writer) == ""


def create_secret(tenant: Tenant, name: str, kind: str, kubeconfig: Path) -> str:
    """Create a Secret; why it was refused, empty if it was not."""
    metadata: dict[str, Any] = {"name": name, "namespace": tenant.namespace}
    if kind == "kubernetes.io/service-account-token":
        metadata["annotations"] = {"kubernetes.io/service-account.name": "default"}
    body = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": kind}
    try:
        tenant.cluster.kubectl("create", "-f", "-", stdin=json.dumps(body), kubeconfig=kubeconfig)
    except KubectlError as error:
        return str(error)
    return ""


# ------------------------------------------------------------------------------------------------------------- a tenant


@dataclass(frozen=True)
class Tenant:
    """Somebody who may create and change QLoRAJobs in one namespace, and get one Secret there: 'own'."""

    cluster: ControlPlane
    namespace: str
    kubeconfig: Path

    def apply(self, manifest: dict[str, Any]) -> str:
        """Apply as kubectl does; why it was refused, empty if it was not."""
        return self._do("apply", manifest)

    def create(self, manifest: dict[str, Any]) -> str:
        """Create it; why it was refused, empty if it was not."""
        return self._do("create", manifest)

    def _do(self, verb: str, manifest: dict[str, Any]) -> str:
        try:
            self.cluster.kubectl(verb, "-f", "-", stdin=json.dumps(manifest), kubeconfig=self.kubeconfig)
        except KubectlError as error:
            return str(error)
        return ""


@pytest.fixture(scope="module")
def tenant(cluster_wide) -> Tenant:
    cluster, namespace = cluster_wide.cluster, cluster_wide.cluster.create_namespace("tenant")
    for name in ("own", "of-others"):
        cluster.kubectl("create", "secret", "generic", name, "--from-literal=TOKEN=x", "-n", namespace)
    rules = [
        {"apiGroups": ["qlora.dev"], "resources": ["qlorajobs", "qlorasweeps"], "verbs": ["create", "get", "patch"]},
        {"apiGroups": [""], "resources": ["secrets"], "resourceNames": ["own"], "verbs": ["get"]},
    ]
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": "jane"}, "rules": rules}
    cluster.api.create(role, namespace)
    cluster.kubectl("create", "rolebinding", "jane", "--role=jane", "--user=jane", "-n", namespace)
    jane = Tenant(cluster, namespace, cluster.user_kubeconfig("jane", namespace=namespace))
    deadline = time.monotonic() + ENFORCED_SECONDS
    while not jane.apply(naming(jane, "output", "of-others", "probe")) and time.monotonic() < deadline:
        cluster.api.delete(cluster.api.path_of(qlora_job("probe", namespace)))
    return jane


def naming(tenant: Tenant, group: str, secret: str, name: str = "job") -> dict[str, Any]:
    """A job with credentials in a group of its spec."""
    if group == "dataset.train":
        train = {"source": "s3://data/rows.jsonl", "credentials": secret}
        return qlora_job(name, tenant.namespace, dataset={"train": train}, suspend=True)
    return qlora_job(name, tenant.namespace, suspend=True, **{group: {"credentials": secret}})


@pytest.mark.parametrize("group", ["model", "dataset.train", "output"])
def test_a_tenant_gains_no_secret_through_a_job(tenant, group):
    assert "jane may not get this Secret" in tenant.apply(naming(tenant, group, "of-others"))
    assert "jane may not get this Secret" in tenant.apply(naming(tenant, group, "not-there"))
    assert tenant.apply(naming(tenant, group, "own", f"job-{group.replace('.', '-')}")) == ""


@pytest.mark.parametrize("group", ["model", "dataset.train", "output"])
def test_a_tenant_gains_no_secret_through_a_sweep(tenant, group):
    def naming_in_template(secret: str, name: str = "sweep") -> dict[str, Any]:
        made = qlora_sweep(tenant.namespace, name, suspend=True)
        place = made["spec"]["template"]["spec"]
        for key in group.split("."):
            place = place[key]
        place["credentials"] = secret
        return made

    said = tenant.apply(naming_in_template("of-others"))
    assert f'spec.template.spec.{group}.credentials: "of-others" – jane may not get this Secret' in said
    assert tenant.apply(naming_in_template("own", f"sweep-{group.replace('.', '-')}")) == ""


def test_a_tenant_gains_no_secret_by_changing_a_job_later(tenant):
    assert tenant.apply(naming(tenant, "model", "own", "later")) == ""
    said = tenant.apply(naming(tenant, "model", "of-others", "later"))
    assert "model is immutable" in said or "jane may not get this Secret" in said


def test_a_tenant_can_neither_read_a_secret_nor_make_pods_nor_write_status(tenant):
    api = tenant.cluster
    for arguments in (
        ("get", "secret", "of-others"),
        ("run", "pod", "--image=x"),
        ("create", "job", "job", "--image=x"),
        ("patch", "qlorajob", "later", "--subresource=status", "--type=merge", "-p", '{"status": {"state": "Failed"}}'),
    ):
        with pytest.raises(KubectlError, match="forbidden"):
            api.kubectl(*arguments, kubeconfig=tenant.kubeconfig)


def test_what_a_tenant_may_name_reaches_the_pods_by_name_alone(tenant, cluster_wide, fork_server, tmp_path):
    """The operator never reads it."""
    cluster, mark = tenant.cluster, tenant.cluster.audit_mark()
    manifest = naming(tenant, "output", "own", "runs")
    manifest["spec"]["suspend"] = False
    settings = cluster_wide.settings | {"prepare": {"enabled": False}}
    with (
        ForkedOperator(fork_server, tmp_path, cluster_wide.kubeconfig, **settings),
        pods_do(cluster.api, tenant.namespace, {"run-seconds": 60}),
    ):
        assert tenant.apply(manifest) == ""
        path = cluster.api.path_of(manifest)
        cluster.api.wait_for(path, in_state("Running"))
        (pod,) = cluster.api.list(f"/api/v1/namespaces/{tenant.namespace}/pods")
        cluster.api.delete(path)
        cluster.api.wait_gone(path)
    assert pod["spec"]["containers"][0]["envFrom"] == [{"prefix": "QLORA_SECRET_0_", "secretRef": {"name": "own"}}]
    assert pod["spec"]["automountServiceAccountToken"] is False
    of_secrets = [r for r in cluster.requests_since(mark) if r.resource == "secrets" and r.user == cluster_wide.account]
    assert {r.verb for r in of_secrets} == {"create"}
    with pytest.raises(ClusterApiError):
        cluster.api.get(path)
