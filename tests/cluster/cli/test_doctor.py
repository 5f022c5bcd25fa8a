"""The doctor on a real cluster with the chart installed: well, and then with one fault after the other."""

from __future__ import annotations

import base64
import json
import socket
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from charts.helm import Helm
from cluster.api import ClusterApiError
from cluster.control_plane import ControlPlane
from cluster.scenarios.jobs import GROUP, qlora_job, wait_until_served
from fixtures import skip_unless_ci
from services.binaries import ToolMissingError, find_or_build
from services.tools import HELM

if TYPE_CHECKING:
    from collections.abc import Iterator

SYSTEM = "qlora-system"
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
CRD = f"{CRDS}/qlorajobs.qlora.dev"
DEPLOYMENT = f"/apis/apps/v1/namespaces/{SYSTEM}/deployments/qlora-qlora-operator"
BINDINGS = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicybindings"
NAME = "qlora-qlora-operator"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[ControlPlane]:
    """Two nodes of 8 GPUs and the chart: nothing is wrong."""
    try:
        cluster = ControlPlane(tmp_path_factory.mktemp("cluster"))
        helm = Helm(find_or_build(HELM), tmp_path_factory.mktemp("helm"))
    except ToolMissingError as error:
        skip_unless_ci(str(error))
    with cluster:
        cluster.add_kwok_nodes(2)
        api = cluster.api
        api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SYSTEM}})
        objects = helm.render()
        for body in sorted(objects, key=lambda o: o["kind"] != "CustomResourceDefinition"):
            api.apply(body, SYSTEM)
        cluster.objects = {(body["kind"], body["metadata"]["name"]): body for body in objects}
        wait_until_served(api)
        wait_until_available(api)
        yield cluster


@pytest.fixture
def api(cluster):
    return cluster.api


@pytest.fixture
def doctor(cluster, qlora_class, tmp_path):
    """Call the doctor for a namespace of the test's own; a call gives the faults by check."""
    namespace = cluster.create_namespace()
    call = qlora_class(cluster.kubeconfig, namespace, tmp_path)

    def faults(*arguments, kubeconfig=None):
        said = (replace(call, kubeconfig=kubeconfig) if kubeconfig else call)("doctor", "-o", "json", *arguments)
        found = {f["check"]: f for f in said.json if f["level"] == "fault"}
        assert said.code == (1 if found else 0)
        assert all(f["remedy"] for f in found.values()), "each fault says what to do"
        return found

    faults.namespace, faults.call = namespace, call
    return faults


def wait_until_available(api):
    api.wait_for(DEPLOYMENT, lambda d: d["status"].get("availableReplicas"), what="the operator's Deployment")


def job_in(doctor, name="job", **groups):
    return qlora_job(name, doctor.namespace, **groups)


def secret(namespace, name="s3", **values):
    data = {key: base64.b64encode(value.encode()).decode() for key, value in values.items()}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": namespace}, "data": data}


KEYS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
WITH_SECRET = {"output": {"destination": "s3://adapters/job", "credentials": "s3"}}


def test_nothing_is_wrong(doctor, api):
    assert doctor() == {}
    text = doctor.call("doctor")
    assert text.code == 0
    assert "✓ operator      qlora-system/qlora-qlora-operator is available" in text.out
    assert "✓ crd           qlorajobs.qlora.dev is established and of this version" in text.out
    assert "✓ gpus          16 nvidia.com/gpu on 2 ready nodes, up to 8 on one" in text.out
    assert "nothing keeps jobs from running" in text.err


def test_the_definition_is_missing(doctor, api, cluster):
    api.delete(CRD)
    api.wait_gone(CRD)
    try:
        found = doctor()
    finally:
        api.apply(cluster.objects["CustomResourceDefinition", "qlorajobs.qlora.dev"])
        wait_until_served(api)
    assert found.keys() == {"crd"}
    assert "is missing" in found["crd"]["text"]
    assert "helm upgrade --install" in found["crd"]["remedy"]


def test_the_definition_is_another_versions(doctor, api, cluster):
    rank = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/lora/properties/rank"
    api.patch(CRD, [{"op": "remove", "path": rank}, *_without_default_of("rank")], kind="json")
    try:
        found = doctor()
    finally:
        api.apply(cluster.objects["CustomResourceDefinition", "qlorajobs.qlora.dev"])
    assert found.keys() == {"crd"}
    assert "lacks spec.lora.rank" in found["crd"]["text"]


def _without_default_of(_name):
    """The group's own default names the field too."""
    spec = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties"
    return [{"op": "remove", "path": f"{spec}/lora/default"}]


def test_the_operator_is_missing(doctor, api, cluster):
    api.delete(DEPLOYMENT)
    api.wait_gone(DEPLOYMENT)
    try:
        found = doctor()
    finally:
        api.apply(cluster.objects["Deployment", NAME])
        wait_until_available(api)
    assert found.keys() == {"operator"}
    assert "there is no Deployment of the operator" in found["operator"]["text"]


@contextmanager
def changed(api, path, patch, back):
    api.patch(path, patch)
    try:
        yield
    finally:
        api.patch(path, back)


def test_the_operator_finds_no_node(doctor, api):
    def template(selector):
        return {"spec": {"template": {"spec": {"nodeSelector": selector}}}}

    with changed(api, DEPLOYMENT, template({"no": "such"}), template(None)):
        api.wait_for(DEPLOYMENT, lambda d: not d["status"].get("availableReplicas"))
        api.wait_for(
            f"/api/v1/namespaces/{SYSTEM}/pods",
            lambda pods: any(
                c["type"] == "PodScheduled" and c["status"] == "False"
                for p in pods["items"]
                for c in p["status"].get("conditions", ())
            ),
        )
        found = doctor()
    wait_until_available(api)
    assert found.keys() == {"operator"}
    assert "finds no node: 0/2 nodes are available" in found["operator"]["text"]


def test_the_operator_is_scaled_to_nothing(doctor, api):
    with changed(api, DEPLOYMENT, {"spec": {"replicas": 0}}, {"spec": {"replicas": 1}}):
        found = doctor()
    wait_until_available(api)
    assert found["operator"]["remedy"] == f"kubectl scale deployment {NAME} -n {SYSTEM} --replicas=1"


def test_the_policy_has_no_binding(doctor, api, cluster):
    bindings = [b for (kind, _), b in cluster.objects.items() if kind == "ValidatingAdmissionPolicyBinding"]
    (body,) = (b for b in bindings if not b["metadata"]["name"].endswith(("keys", "trials", "sweeps")))
    api.delete(f"{BINDINGS}/{body['metadata']['name']}")
    try:
        found = doctor()
    finally:
        api.apply(body)
    assert found.keys() == {"admission"}
    assert "has no binding" in found["admission"]["text"]


def test_no_node_has_gpus(doctor, api):
    names = [node["metadata"]["name"] for node in api.list("/api/v1/nodes")]

    def gpus(count):
        for name in names:
            amounts = {"nvidia.com/gpu": count}
            api.patch(f"/api/v1/nodes/{name}/status", {"status": {"capacity": amounts, "allocatable": amounts}})

    gpus(None)
    try:
        found = doctor()
    finally:
        gpus("8")
    assert found.keys() == {"gpus"}
    assert found["gpus"]["text"] == "none of 2 nodes offers nvidia.com/gpu"


def test_a_pod_wants_more_gpus_than_a_node_has(doctor, api):
    api.create(job_in(doctor, parallelism={"gpusPerWorker": 16}))
    assert 'job "job" wants 16 GPUs in one pod, and no node has more than 8' in doctor()["gpus"]["text"]


def test_a_secret_is_missing_and_then_lacks_a_key(doctor, api, tmp_path):
    import yaml

    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job_in(doctor, **WITH_SECRET)))
    found = doctor("job.yaml")
    assert found.keys() == {"references"}
    assert f"Secret s3 is not in namespace {doctor.namespace}" in found["references"]["text"]
    assert found["references"]["remedy"].startswith(
        f"kubectl create secret generic s3 -n {doctor.namespace} --from-literal=AWS_ACCESS_KEY_ID=…"
    )
    api.create(secret(doctor.namespace, AWS_ACCESS_KEY_ID="a"))
    assert "Secret s3 has no AWS_SECRET_ACCESS_KEY, which s3:// needs" in doctor("job.yaml")["references"]["text"]


@pytest.mark.parametrize(
    ("group", "text"),
    [
        ({"model": {"source": "pvc://models/base"}}, "PersistentVolumeClaim models is not in namespace"),
        ({"scheduling": {"priorityClassName": "urgent"}}, "PriorityClass urgent is not there"),
    ],
)
def test_other_things_that_a_job_names_are_missing(doctor, api, tmp_path, group, text):
    import yaml

    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job_in(doctor, **group)))
    assert text in doctor("job.yaml")["references"]["text"]


def test_the_object_storage_does_not_answer(doctor, api, tmp_path):
    import yaml

    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        api.create(secret(doctor.namespace, AWS_ENDPOINT_URL=url, **KEYS))
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(job_in(doctor, **WITH_SECRET)))
        found = doctor("job.yaml")
    assert found.keys() == {"storage"}
    assert f"{url} (AWS_ENDPOINT_URL of Secret s3): does not answer from this machine" in found["storage"]["text"]


def test_the_object_storages_service_is_not_there(doctor, api, tmp_path):
    import yaml

    api.create(secret(doctor.namespace, AWS_ENDPOINT_URL="http://minio.storage.svc:9000", **KEYS))
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job_in(doctor, **WITH_SECRET)))
    assert "there is no Service minio in namespace storage" in doctor("job.yaml")["storage"]["text"]


def test_the_trainers_image_cannot_be_pulled(doctor, api):
    pod = {"kind": "Pod", "namespace": doctor.namespace, "name": "job-1-0-abcde"}
    event = {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": "e", "namespace": doctor.namespace},
        "involvedObject": pod,
        "type": "Warning",
        "reason": "Failed",
        "message": 'Failed to pull image "registry/trainer:1": not found',
    }
    api.create(event)
    found = doctor()
    assert found.keys() == {"image"}
    assert "the image registry/trainer:1 cannot be pulled" in found["image"]["text"]
    assert "trainer.image.repository" in found["image"]["remedy"]


def test_a_policy_cuts_trainers_off(doctor, api):
    shut = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    policy = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "deny-all", "namespace": doctor.namespace},
        "spec": shut,
    }
    api.create(policy)
    found = doctor()
    assert found.keys() == {"network"}
    assert "NetworkPolicy deny-all cuts trainers off (Ingress, Egress)" in found["network"]["text"]


def test_what_starts_gangs_is_not_there(doctor, api):
    path = f"/api/v1/namespaces/{SYSTEM}/configmaps/{NAME}"
    text = api.get(path)["data"]["config.yaml"]
    with changed(api, path, _config(text.replace("gang: Auto", "gang: Volcano")), _config(text)):
        found = doctor()
    assert found.keys() == {"gang"}
    assert "configured for Volcano, and this cluster serves Native" in found["gang"]["text"]


def test_the_operator_does_not_serve_the_namespace(doctor, api):
    path = f"/api/v1/namespaces/{SYSTEM}/configmaps/{NAME}"
    text = api.get(path)["data"]["config.yaml"]
    with changed(api, path, _config(text.replace("namespaces: []", "namespaces: [research]")), _config(text)):
        found = doctor()
    assert f"it serves only namespaces research, and not {doctor.namespace}" in found["operator"]["text"]


@contextmanager
def second_release(api, cluster, **namespaces):
    """Have a second Deployment with its ConfigMap; namespaces are those of either release by its name."""
    path = f"/api/v1/namespaces/{SYSTEM}/configmaps"
    text = api.get(f"{path}/{NAME}")["data"]["config.yaml"]

    def config(release):
        return _config(text.replace("namespaces: []", f"namespaces: {json.dumps(namespaces[release])}"))

    other = {"name": "other", "namespace": SYSTEM}
    deployment = cluster.objects["Deployment", NAME]
    api.create({**deployment, "metadata": {**deployment["metadata"], **other}}, SYSTEM)
    api.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": other, **config("other")}, SYSTEM)
    try:
        with changed(api, f"{path}/{NAME}", config("first"), _config(text)):
            yield
    finally:
        api.delete(DEPLOYMENT.replace(NAME, "other"))
        api.delete(f"{path}/other")


def test_a_second_release_is_a_fault_only_over_the_same_namespaces(doctor, api, cluster):
    here = doctor.namespace
    with second_release(api, cluster, first=["research"], other=[here]):
        api.wait_for(DEPLOYMENT.replace(NAME, "other"), lambda d: d["status"].get("availableReplicas"))
        assert doctor() == {}
        assert f"✓ operator      {SYSTEM}/other is available" in doctor.call("doctor").out
    with second_release(api, cluster, first=[here], other=["research", here]):
        assert f"both serve namespaces {here};" in doctor()["operator"]["text"]


def _config(text):
    return {"data": {"config.yaml": text}}


def test_rights_are_missing_and_what_one_may_not_see_is_no_fault(doctor, cluster):
    stranger = cluster.user_kubeconfig("jane")
    found = doctor(kubeconfig=stranger)
    assert found.keys() == {"rights"}
    assert f"--clusterrole=edit --user=jane -n {doctor.namespace}" in found["rights"]["remedy"]
    said = replace(doctor.call, kubeconfig=stranger)("doctor", "-o", "json").json
    unknown = {f["check"] for f in said if f["level"] == "unknown"}
    assert unknown >= {"operator", "admission", "gpus", "image", "network", "jobs"}


def test_the_remedy_for_rights_is_one(doctor, cluster, api):
    """Whoever has the chart's own aggregated role edit may do all that the command line does."""
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": {"name": "qlora-edit", "namespace": doctor.namespace},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "edit"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "joan"}],
    }
    api.create(binding)
    joan = cluster.user_kubeconfig("joan")
    deadline = time.monotonic() + 20  # a new role counts a moment after it is made
    while found := doctor(kubeconfig=joan):
        assert time.monotonic() < deadline, found


def test_the_names_of_faults_are_for_scripts(doctor, api):
    with pytest.raises(ClusterApiError):
        api.get(f"{GROUP}/namespaces/{doctor.namespace}/qlorajobs/none")
    api.create(job_in(doctor, parallelism={"gpusPerWorker": 16}))
    assert doctor.call("doctor", "-o", "name").out == "gpus\n"
    assert json.loads(doctor.call("doctor", "-o", "json").out)
