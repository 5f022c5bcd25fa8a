"""Conclusions of the doctor: the cases that a real cluster does not play on demand."""

from datetime import timedelta

import pytest

from cli_builders import NOW, job, running, waiting
from fake_server import FakeServer
from qlora_api.credentials import KEYS
from qlora_cli.doctor import check_crd, cluster_snapshot
from qlora_cli.doctor.answer import Answer
from qlora_cli.doctor.checks import run_checks
from qlora_cli.doctor.cluster_snapshot import RIGHTS, ClusterSnapshot
from qlora_cli.doctor.findings import Level, lines, summary
from qlora_cli.doctor.references import NEEDED_KEYS, ReferencedObject, endpoints, missing_keys, of_jobs
from qlora_cli.kube.errors import KubeApiError

DENIED = Answer(denied=True)
OURS = {"labels": {"app.kubernetes.io/part-of": "qlora-operator"}}


def deployment(**more):
    meta = {"name": "op", "namespace": "sys", "labels": {"app.kubernetes.io/version": "1.0"}}
    return {"metadata": meta, "spec": {"selector": {}}, "status": {"availableReplicas": 1}, **more}


def operators(*namespaces):
    """Operators, by the namespaces that each serves."""
    return {
        "deployments": Answer([deployment() for _ in namespaces]),
        "configs": tuple(Answer({"namespaces": each}) for each in namespaces),
    }


def node(name="n", gpus="8", *, ready=True, cordoned=False):
    conditions = [{"type": "Ready", "status": str(ready)}]
    status = {"allocatable": {"nvidia.com/gpu": gpus}, "conditions": conditions}
    return {"metadata": {"name": name}, "spec": {"unschedulable": cordoned}, "status": status}


def crd(schema=check_crd.own):
    version = {"name": "v1alpha1", "served": True, "schema": {"openAPIV3Schema": schema()}}
    return {"spec": {"versions": [version]}, "status": {"conditions": [{"type": "Established", "status": "True"}]}}


def seen(**more):
    """A cluster in which nothing is wrong, but for ``more``."""
    well = {
        "namespace": "research",
        "now": NOW,
        "version": "v1.36.3",
        "rights": {(verb, what): True for verb, _, what, _ in RIGHTS},
        "crd": Answer(crd()),
        "sweep_crd": Answer(crd(check_crd.own_sweep)),
        "groups": Answer([{"name": "kueue.x-k8s.io"}]),
        "deployments": Answer([deployment()]),
        "operator_pods": Answer([]),
        "config": Answer({"gpuResource": "nvidia.com/gpu", "gang": "Auto", "namespaces": []}),
        "policies": Answer([{"metadata": {"name": "p"}}]),
        "bindings": Answer([{"metadata": {"name": "p"}, "spec": {"policyName": "p"}}]),
        "nodes": Answer([node()]),
        "jobs": Answer([running()]),
        "pods": Answer([]),
        "events": Answer([]),
        "network_policies": Answer([{"metadata": {"name": "ours", **OURS}, "spec": {"podSelector": {}}}]),
        "quotas": Answer([]),
    }
    return ClusterSnapshot(**{**well, **more})


def faults(**more):
    return {f.check: f.text for f in run_checks(seen(**more), "1.0") if f.level is Level.FAULT}


def levels(**more):
    return {f.check: f.level for f in run_checks(seen(**more), "1.0")}


def pod(state, **more):
    container = {"image": "registry/trainer:1", "state": {"waiting": state}, **more}
    return {"metadata": {"name": "op-x"}, "status": {"containerStatuses": [container]}}


def test_operators_of_different_namespaces_are_no_fault():
    assert faults(**operators(["research"], ["sales"], ["hr"])) == {}


def test_several_operators_whose_settings_may_not_be_read_are_said():
    more = {"deployments": Answer([deployment(), deployment()]), "configs": (DENIED, DENIED)}
    assert faults(**more) == {}
    unknown = [f.text for f in run_checks(seen(**more), "1.0") if f.level is Level.UNKNOWN]
    assert "there are several: sys/op, sys/op; you may not read which namespaces each of them serves" in unknown


def test_nothing_is_wrong():
    assert faults() == {}
    assert summary(run_checks(seen(), "1.0")) == "nothing keeps jobs from running"


UNAVAILABLE = Answer([deployment(status={})])
DEFAULT_STATUS = {"observedGeneration": 0, "state": "Pending", "reason": "Pending", "conditions": [], "attempts": []}
PULL = {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}
INSPECT = {"reason": "ImageInspectError", "message": "Failed to inspect image"}


@pytest.mark.parametrize(
    ("more", "check", "text"),
    [
        pytest.param({"version": "v1.29.4"}, "cluster", "Kubernetes v1.29.4 is older than 1.31", id="old-cluster"),
        pytest.param(
            {
                "deployments": UNAVAILABLE,
                "operator_pods": Answer(
                    [pod({"reason": "CrashLoopBackOff"}, lastState={"terminated": {"exitCode": 2}})]
                ),
            },
            "operator",
            "sys/op starts and ends again (CrashLoopBackOff, exit code 2)",
            id="crash-loop",
        ),
        pytest.param(
            {"deployments": UNAVAILABLE, "operator_pods": Answer([pod(PULL)])},
            "operator",
            "sys/op cannot start: ImagePullBackOff: Back-off pulling image",
            id="operator-image",
        ),
        pytest.param(
            {"deployments": UNAVAILABLE, "operator_pods": Answer([pod(INSPECT)])},
            "operator",
            "sys/op cannot start: ImageInspectError: Failed to inspect image",
            id="operator-image-that-cannot-be-inspected",
        ),
        pytest.param({"deployments": UNAVAILABLE}, "operator", "sys/op is not available", id="no-reason-seen"),
        pytest.param(
            operators(["research", "sales"], ["sales", "research"]),
            "operator",
            "sys/op and sys/op both serve namespaces research, sales; each replaces what the other one writes",
            id="two-operators-of-the-same-namespaces",
        ),
        pytest.param(
            operators(["research"], []),
            "operator",
            "sys/op and sys/op both serve namespaces research; each replaces what the other one writes",
            id="an-operator-of-all-namespaces-beside-one-of-some",
        ),
        pytest.param(
            operators([], []),
            "operator",
            "sys/op and sys/op both serve all namespaces; each replaces what the other one writes",
            id="two-operators-of-all-namespaces",
        ),
        pytest.param(
            {"policies": Answer([])},
            "admission",
            "the operator's admission policy is missing: whoever may create jobs can use any Secret there through one",
            id="no-policy",
        ),
        pytest.param(
            {"nodes": Answer([node(ready=False), node("m", cordoned=True)])},
            "gpus",
            "no node with nvidia.com/gpu is ready: m, n",
            id="not-ready",
        ),
        pytest.param(
            {"pods": Answer([pod(PULL)])},
            "image",
            "the image registry/trainer:1 cannot be pulled (ImagePullBackOff: Back-off pulling image)",
            id="trainer-image",
        ),
        pytest.param(
            {"pods": Answer([pod(INSPECT)])},
            "image",
            "the image registry/trainer:1 cannot be pulled (ImageInspectError: Failed to inspect image)",
            id="trainer-image-that-cannot-be-inspected",
        ),
        pytest.param(
            {"jobs": Answer([waiting()])},
            "jobs",
            'job "wide" waits (Unschedulable): no node has as many free nvidia.com/gpu as '
            "spec.parallelism.gpusPerWorker asks for",
            id="waits-for-a-hand",
        ),
        pytest.param(
            {"jobs": Answer([{**job(), "status": {}}])}, "jobs", "no operator has taken up support", id="nobody-looks"
        ),
        pytest.param(
            {"jobs": Answer([{**job(), "status": DEFAULT_STATUS}])},
            "jobs",
            "no operator has taken up support",
            id="nobody-looks-and-the-api-server-fills-in-defaults",
        ),
        pytest.param(
            {"crd": DENIED, "served": Answer({"resources": []})},
            "crd",
            "this cluster serves no QLoRAJobs",
            id="no-crd-unseen",
        ),
        pytest.param(
            {"rights": {("create", "qlorajobs"): False}},
            "rights",
            "you may not create qlorajobs in namespace research: submit, retry will be refused",
            id="one-right",
        ),
    ],
)
def test_faults(more, check, text):
    assert faults(**more) == {check: text}


def test_a_job_that_was_just_made_is_not_left_alone():
    young = {**job(), "status": {}}
    assert faults(jobs=Answer([young]), now=NOW - timedelta(hours=2, minutes=1, seconds=40)) == {}


@pytest.mark.parametrize(
    ("more", "check", "level"),
    [
        pytest.param({"nodes": DENIED}, "gpus", Level.UNKNOWN, id="nodes-not-to-be-seen"),
        pytest.param({"config": Answer({"gpuResource": None})}, "gpus", Level.OK, id="trains-on-cpus"),
        pytest.param({"groups": Answer([])}, "gang", Level.NOTE, id="no-gangs"),
        pytest.param(
            {"groups": Answer([{"name": "monitoring.coreos.com"}]), "monitors": Answer([])},
            "monitoring",
            Level.NOTE,
            id="no-monitor",
        ),
        pytest.param(
            {"groups": Answer([{"name": "monitoring.coreos.com"}]), "monitors": Answer([{"metadata": {"name": "m"}}])},
            "monitoring",
            Level.OK,
            id="monitor",
        ),
        pytest.param(
            {"crd": DENIED, "served": Answer({"resources": [{"kind": "QLoRAJob"}]})},
            "crd",
            Level.OK,
            id="crd-not-to-be-seen",
        ),
        pytest.param({"rights": {}}, "rights", Level.UNKNOWN, id="rights-not-told"),
        pytest.param(
            {
                "quotas": Answer(
                    [
                        {
                            "metadata": {"name": "q"},
                            "status": {
                                "hard": {"requests.nvidia.com/gpu": "8"},
                                "used": {"requests.nvidia.com/gpu": "8"},
                            },
                        }
                    ]
                )
            },
            "quota",
            Level.NOTE,
            id="quota-used-up",
        ),
    ],
)
def test_what_is_no_fault(more, check, level):
    assert levels(**more)[check] is level
    assert faults(**more) == {}


def policy(name, **spec):
    return {"metadata": {"name": name}, "spec": {"podSelector": {}, **spec}}


@pytest.mark.parametrize(
    ("policies", "shut"),
    [
        ([policy("deny", policyTypes=["Egress"])], True),
        ([policy("deny")], True),  # Ingress, by default
        ([policy("deny", policyTypes=["Egress"]), policy("allow", policyTypes=["Egress"], egress=[{}])], False),
        ([policy("others", podSelector={"matchLabels": {"app": "db"}}, policyTypes=["Egress"])], False),
        ([policy("some", policyTypes=["Egress"], egress=[{"ports": [{"port": 443}]}])], False),
        ([], False),
    ],
)
def test_policies_add_up(policies, shut):
    assert ("network" in faults(network_policies=Answer(policies))) is shut


def test_a_newer_definition_is_no_fault_and_other_bounds_are():
    import copy

    newer = copy.deepcopy(crd())
    fields = newer["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    fields["lora"]["properties"]["brandNew"] = {"type": "integer"}
    assert faults(crd=Answer(newer)) == {}
    assert levels(crd=Answer(newer))["crd"] is Level.NOTE
    fields["lora"]["properties"]["rank"]["maximum"] = 7
    assert "has other rules for spec.lora.rank" in faults(crd=Answer(newer))["crd"]


def test_without_the_definition_of_sweeps_jobs_run_and_another_version_of_it_is_a_fault():
    import copy

    assert faults(sweep_crd=Answer(missing=True)) == {}
    assert levels(sweep_crd=Answer(missing=True))["sweeps"] is Level.NOTE
    older = copy.deepcopy(crd(check_crd.own_sweep))
    fields = older["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    del fields["budgetGpuHours"]
    assert "lacks spec.budgetGpuHours" in faults(sweep_crd=Answer(older))["sweeps"]


def test_who_may_not_read_definitions_learns_whether_sweeps_are_served():
    jobs = Answer({"resources": [{"kind": "QLoRAJob"}]})
    found = levels(crd=DENIED, sweep_crd=DENIED, served=jobs)
    assert found["crd"] is Level.OK
    assert found["sweeps"] is Level.NOTE
    both = Answer({"resources": [{"kind": "QLoRAJob"}, {"kind": "QLoRASweep"}]})
    assert levels(crd=DENIED, sweep_crd=DENIED, served=both)["sweeps"] is Level.OK


PROFILES = {
    "a100": {"gpu": "a100-80gb", "nodeSelector": {"pool": "a"}},
    "mig": {"gpuResource": "nvidia.com/mig-1g.10gb"},
}


def profiled(jobs=(), nodes=(), manifests=(), **profiles):
    config = Answer({"gpuResource": "nvidia.com/gpu", "profiles": profiles})
    objects = {"jobs": Answer(list(jobs)), "manifests": tuple(manifests), "nodes": Answer([node(), *nodes])}
    found = run_checks(seen(config=config, **objects), "1.0")
    return [(f.level, f.text) for f in found if f.check == "profiles"]


def test_profiles_are_listed_with_those_that_no_node_suits():
    labelled = node("a") | {"metadata": {"name": "a", "labels": {"pool": "a"}}}
    assert profiled() == []
    assert profiled(nodes=[labelled], a100=PROFILES["a100"]) == [(Level.OK, "jobs may name a100 (a100-80gb)")]
    assert profiled(**PROFILES) == [
        (Level.NOTE, "no node has the labels and GPUs of profile a100 (pool=a, nvidia.com/gpu)"),
        (Level.NOTE, "no node has the labels and GPUs of profile mig (nvidia.com/mig-1g.10gb)"),
    ]


@pytest.mark.parametrize("place", ["jobs", "manifests"])
def test_a_job_that_names_no_profile_of_the_operators_is_a_fault(place):
    named = waiting()
    named["spec"]["scheduling"] = {"profile": "a10"}
    if place == "manifests":
        del named["status"]
    [(level, text)] = profiled(**{place: [named]}, cpu={"gpuResource": ""})[:1]
    assert level is Level.FAULT
    assert text.endswith("names profile a10, and there are cpu, default")


def test_what_jobs_name_is_named_once():
    first, second = job("a"), job("b")
    for each in (first, second):
        each["spec"] = {
            **each["spec"],
            "model": {"source": "hf://o/n", "credentials": "hub"},
            "dataset": {"train": {"source": "pvc://rows/x", "credentials": "s3"}},
            "output": {"destination": "s3://b/x", "credentials": "s3"},
            "scheduling": {"queue": "q", "gang": "Kueue", "priorityClassName": "high"},
        }
    found = [(n.kind, n.name, n.scheme) for n in of_jobs([first, second], "research")]
    assert found == [
        ("Secret", "hub", "hf"),
        ("Secret", "s3", "pvc"),
        ("PersistentVolumeClaim", "rows", ""),
        ("Secret", "s3", "s3"),
        ("PriorityClass", "high", ""),
        ("LocalQueue", "q", ""),
    ]


def test_keys_of_secrets():
    assert missing_keys({"data": {"AWS_ACCESS_KEY_ID": ""}}, "s3") == ["AWS_SECRET_ACCESS_KEY"]
    assert missing_keys({"data": {"AZURE_STORAGE_ACCOUNT_NAME": "", "AZURE_STORAGE_SAS_TOKEN": ""}}, "az") == []
    assert missing_keys({}, "pvc") == []


def test_keys_that_pods_do_not_take_do_not_count():
    assert {key for groups in NEEDED_KEYS.values() for group in groups for key in group} <= KEYS
    assert missing_keys({"data": {"GOOGLE_APPLICATION_CREDENTIALS": ""}}, "gs") == ["GOOGLE_SERVICE_ACCOUNT_KEY"]


@pytest.mark.parametrize(
    ("url", "trouble"),
    [
        ("minio:9000", "is no URL of the form https://host:port"),
        ("http://minio:9000", "there is no Service minio in namespace research"),
        ("http://minio.store.svc.cluster.local", "there is no Service minio in namespace store"),
        ("http://minio.store.svc.corp.example:9000", "there is no Service minio in namespace store"),
        ("http://minio.store.svc", "there is no Service minio in namespace store"),
    ],
)
def test_endpoints(url, trouble):
    import base64

    secret = Answer({"data": {"AWS_ENDPOINT_URL": base64.b64encode(url.encode()).decode()}})
    named = ReferencedObject(
        "Secret", "s3", "/api/v1/namespaces/research/secrets/s3", "job", "output.credentials", "s3"
    )
    assert list(endpoints([(named, secret)], lambda _: Answer(missing=True))) == [(url, "s3", trouble)]


def test_the_page(golden):
    findings = run_checks(
        seen(nodes=DENIED, deployments=Answer([]), operator_pods=Answer(), config=Answer(missing=True)), "1.0"
    )
    golden("doctor.txt", "\n".join(line.plain for line in lines(findings)) + "\n")


def test_a_busy_or_silent_api_server_is_asked_again_and_nothing_is_called_missing(monkeypatch):
    monkeypatch.setattr(cluster_snapshot._answer, "__defaults__", ((0.01, 0.01),))
    there = {"kind": "Node"}
    with FakeServer((429, {"message": "too many requests"}), (0, None), (200, there)) as server, server.api() as api:
        assert cluster_snapshot._get(api, "/api/v1/nodes/one").value == there
    away = [(503, {"message": "etcd is away"})] * 3
    with FakeServer(*away) as server, server.api() as api, pytest.raises(KubeApiError, match="etcd is away"):
        cluster_snapshot._get(api, "/api/v1/nodes/one")
    with FakeServer((404, {"message": "not found"})) as server, server.api() as api:
        assert cluster_snapshot._get(api, "/api/v1/nodes/one").missing
