"""Script the pods of a QLoRAJob on fake nodes: annotations that kwok acts on (see ``kwok.py``).

The operator makes pods, and tests must not be in its manifests; so the API server adds the annotations as pods are
created, by a MutatingAdmissionPolicy.
"""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING

from cluster.kwok import PREFIX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from cluster.api import ClusterApi, Object

TAKE_UP_SECONDS = 20
_numbers = count()
_API = "admissionregistration.k8s.io/v1"
_METADATA = {"name": "probe"}
_POD_SPEC = {"containers": [{"name": "trainer", "image": "probe"}], "restartPolicy": "Never"}
_POD = {"apiVersion": "v1", "kind": "Pod", "metadata": _METADATA, "spec": _POD_SPEC}
_JOB = {"apiVersion": "batch/v1", "kind": "Job", "metadata": _METADATA, "spec": {"template": {"spec": _POD_SPEC}}}


@contextmanager
def pods_do(
    api: ClusterApi,
    namespace: str,
    does: Mapping[str, object],
    *,
    attempt: int | None = None,
    index: int | None = None,
    job: str | None = None,
    component: str | None = None,
    everywhere: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """Have all pods of a namespace, or those of a job, attempt, index or component, do something once created.

    Args:
        api: of the cluster.
        namespace: where it holds.
        does: names of ``kwok.py`` without prefix and their values, such as ``{"run-seconds": 1, "exit-code": 41}``.
        attempt: number of the attempt.
        index: the worker's.
        job: name of the QLoRAJob.
        component: ``trainer`` or ``prepare``.
        everywhere: labels of namespaces; it holds in all that have them, of which ``namespace`` is one.

    """
    labels = {
        "qlora.dev/attempt": attempt,
        "batch.kubernetes.io/job-completion-index": index,
        "qlora.dev/job": job,
        "app.kubernetes.io/component": component,
    }
    wanted = {name: str(value) for name, value in labels.items() if value is not None}
    annotations = {f"{PREFIX}{key}": str(value) for key, value in does.items()}
    policy = _policy(f"script-{next(_numbers)}-{namespace}", "pods", _annotated(annotations), wanted)
    probe = {**_POD, "metadata": {**_METADATA, "labels": wanted}}

    def holds(made: Object) -> bool:
        return annotations.items() <= made["metadata"].get("annotations", {}).items()

    with _in_force(api, policy, everywhere or _only(namespace), f"/api/v1/namespaces/{namespace}/pods", probe, holds):
        yield


@contextmanager
def sidecar_in_pods(api: ClusterApi, namespace: str) -> Iterator[None]:
    """Have every pod of a namespace get a container more, as a service mesh or a log shipper does."""
    container = 'Object.spec.containers{name: "proxy", image: "mesh"}'
    spec = f"Object.spec{{containers: [{container}]}}"
    with _mutated(api, namespace, "pods", spec, lambda made: len(made["spec"]["containers"]) == 2):
        yield


@contextmanager
def gate_on_pods(api: ClusterApi, namespace: str, gate: str) -> Iterator[None]:
    """Have every pod of a namespace held back by a scheduling gate."""
    spec = f"Object.spec{{schedulingGates: [Object.spec.schedulingGates{{name: {json.dumps(gate)}}}]}}"
    with _mutated(api, namespace, "pods", spec, lambda made: made["spec"].get("schedulingGates")):
        yield


@contextmanager
def jobs_are_suspended(api: ClusterApi, namespace: str) -> Iterator[None]:
    """Have every Job of a namespace suspended as it is created, as Kueue's webhook does."""
    with _mutated(api, namespace, "jobs", "Object.spec{suspend: true}", lambda made: made["spec"].get("suspend")):
        yield


@contextmanager
def _mutated(
    api: ClusterApi, namespace: str, resource: str, spec: str, holds: Callable[[Object], object]
) -> Iterator[None]:
    """Have the spec of every new pod or Job of a namespace changed by an expression."""
    policy = _policy(f"{resource}-{next(_numbers)}-{namespace}", resource, f"Object{{spec: {spec}}}", {})
    group, probe = ("/apis/batch/v1", _JOB) if resource == "jobs" else ("/api/v1", _POD)
    with _in_force(api, policy, _only(namespace), f"{group}/namespaces/{namespace}/{resource}", probe, holds):
        yield


@contextmanager
def _in_force(
    api: ClusterApi,
    policy: Object,
    namespace_labels: Mapping[str, str],
    path: str,
    probe: Object,
    holds: Callable[[Object], object],
) -> Iterator[None]:
    """Have a policy hold in the namespaces of these labels.

    The API server takes a policy up a moment after it is created: create objects for trial until it does.
    """
    name = policy["metadata"]["name"]
    api.create(policy)
    try:
        api.create(_binding(name, namespace_labels))
        deadline = time.monotonic() + TAKE_UP_SECONDS
        while not holds(api.post(path, probe, dryRun="All")):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name} is not in force at {path}: {policy['spec']['mutations']}")
            time.sleep(0.1)
        yield
    finally:
        for plural in ("mutatingadmissionpolicybindings", "mutatingadmissionpolicies"):
            api.delete(f"/apis/{_API}/{plural}/{name}")


def _policy(name: str, resource: str, expression: str, wanted: Mapping[str, str]) -> Object:
    """Return a policy that changes pods or Jobs with these labels as they are created."""
    conditions = [
        f"has(object.metadata.labels) && {json.dumps(key)} in object.metadata.labels"
        f" && object.metadata.labels[{json.dumps(key)}] == {json.dumps(value)}"
        for key, value in wanted.items()
    ]
    rule = {
        "apiGroups": ["batch" if resource == "jobs" else ""],
        "apiVersions": ["v1"],
        "operations": ["CREATE"],
        "resources": [resource],
    }
    return {
        "apiVersion": _API,
        "kind": "MutatingAdmissionPolicy",
        "metadata": {"name": name},
        "spec": {
            "matchConstraints": {"resourceRules": [rule]},
            "matchConditions": [{"name": f"c{i}", "expression": text} for i, text in enumerate(conditions)],
            "failurePolicy": "Fail",
            "reinvocationPolicy": "Never",
            "mutations": [{"patchType": "ApplyConfiguration", "applyConfiguration": {"expression": expression}}],
        },
    }


def _annotated(annotations: Mapping[str, str]) -> str:
    pairs = ", ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in annotations.items())
    return f"Object{{metadata: Object.metadata{{annotations: {{{pairs}}}}}}}"


def _binding(name: str, namespace_labels: Mapping[str, str]) -> Object:
    selector = {"matchLabels": dict(namespace_labels)}
    return {
        "apiVersion": _API,
        "kind": "MutatingAdmissionPolicyBinding",
        "metadata": {"name": name},
        "spec": {"policyName": name, "matchResources": {"namespaceSelector": selector}},
    }


def _only(namespace: str) -> dict[str, str]:
    return {"kubernetes.io/metadata.name": namespace}
