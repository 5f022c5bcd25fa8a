"""Script the pods of a QLoRAJob on fake nodes: annotations that kwok acts on (see ``kwok.py``).

The operator makes pods, and tests must not be in its manifests; so the API server adds the annotations as pods are
created, by a MutatingAdmissionPolicy.
"""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any

from cluster.kwok import PREFIX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from cluster.api import Api

TAKE_UP_SECONDS = 20
_numbers = count()
_API = "admissionregistration.k8s.io/v1"
_PROBE = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "probe"}}


@contextmanager
def pods_do(
    api: Api,
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
    name = f"script-{next(_numbers)}-{namespace}"
    policy, binding = (
        _policy(name, wanted, does),
        _binding(name, everywhere or {"kubernetes.io/metadata.name": namespace}),
    )
    api.create(policy)
    api.create(binding)
    _wait_until_it_holds(api, namespace, wanted, does)
    try:
        yield
    finally:
        for body, plural in ((binding, "mutatingadmissionpolicybindings"), (policy, "mutatingadmissionpolicies")):
            api.delete(f"/apis/{_API}/{plural}/{body['metadata']['name']}")


@contextmanager
def sidecar_in_pods(api: Api, namespace: str) -> Iterator[None]:
    """Have every pod of a namespace get a container more, as a service mesh or a log shipper does."""
    container = 'Object.spec.containers{name: "proxy", image: "mesh"}'
    spec = f"Object.spec{{containers: [{container}]}}"
    with _mutated(api, namespace, "pods", spec, lambda made: len(made["spec"]["containers"]) == 2):
        yield


@contextmanager
def gate_on_pods(api: Api, namespace: str, gate: str) -> Iterator[None]:
    """Have every pod of a namespace held back by a scheduling gate."""
    spec = f"Object.spec{{schedulingGates: [Object.spec.schedulingGates{{name: {json.dumps(gate)}}}]}}"
    with _mutated(api, namespace, "pods", spec, lambda made: made["spec"].get("schedulingGates")):
        yield


@contextmanager
def jobs_are_suspended(api: Api, namespace: str) -> Iterator[None]:
    """Have every Job of a namespace suspended as it is created, as Kueue's webhook does."""
    with _mutated(api, namespace, "jobs", "Object.spec{suspend: true}", lambda made: made["spec"].get("suspend")):
        yield


@contextmanager
def _mutated(
    api: Api, namespace: str, resource: str, spec: str, holds: Callable[[dict[str, Any]], object]
) -> Iterator[None]:
    """Have the spec of every new pod or Job of a namespace changed by an expression."""
    name = f"{resource}-{next(_numbers)}-{namespace}"
    policy, binding = _policy(name, {}, {}), _binding(name, {"kubernetes.io/metadata.name": namespace})
    policy["spec"]["mutations"] = [
        {"patchType": "ApplyConfiguration", "applyConfiguration": {"expression": f"Object{{spec: {spec}}}"}}
    ]
    pod: dict[str, Any] = {"containers": [{"name": "trainer", "image": "probe"}], "restartPolicy": "Never"}
    group, probe = "/api/v1", {**_PROBE, "spec": pod}
    if resource == "jobs":
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "probe"}}
        group, probe = "/apis/batch/v1", {**job, "spec": {"template": {"spec": pod}}}
        (rules,) = policy["spec"]["matchConstraints"]["resourceRules"]
        rules |= {"apiGroups": ["batch"], "resources": ["jobs"]}
    api.create(policy)
    api.create(binding)
    path = f"{group}/namespaces/{namespace}/{resource}"
    _wait_until(lambda: bool(holds(api.post(path, probe, dryRun="All"))), f"{resource} of {namespace} are not changed")
    try:
        yield
    finally:
        for body, plural in ((binding, "mutatingadmissionpolicybindings"), (policy, "mutatingadmissionpolicies")):
            api.delete(f"/apis/{_API}/{plural}/{body['metadata']['name']}")


def _policy(name: str, wanted: Mapping[str, str], does: Mapping[str, object]) -> dict[str, Any]:
    annotations = {f"{PREFIX}{key}": str(value) for key, value in does.items()}
    conditions = [
        f"has(object.metadata.labels) && {json.dumps(key)} in object.metadata.labels"
        f" && object.metadata.labels[{json.dumps(key)}] == {json.dumps(value)}"
        for key, value in wanted.items()
    ]
    return {
        "apiVersion": _API,
        "kind": "MutatingAdmissionPolicy",
        "metadata": {"name": name},
        "spec": {
            "matchConstraints": {
                "resourceRules": [
                    {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}
                ]
            },
            "matchConditions": [{"name": f"c{i}", "expression": text} for i, text in enumerate(conditions)],
            "failurePolicy": "Fail",
            "reinvocationPolicy": "Never",
            "mutations": [
                {"patchType": "ApplyConfiguration", "applyConfiguration": {"expression": _apply(annotations)}}
            ],
        },
    }


def _apply(annotations: Mapping[str, str]) -> str:
    pairs = ", ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in annotations.items())
    return f"Object{{metadata: Object.metadata{{annotations: {{{pairs}}}}}}}"


def _binding(name: str, namespace_labels: Mapping[str, str]) -> dict[str, Any]:
    selector = {"matchLabels": dict(namespace_labels)}
    return {
        "apiVersion": _API,
        "kind": "MutatingAdmissionPolicyBinding",
        "metadata": {"name": name},
        "spec": {"policyName": name, "matchResources": {"namespaceSelector": selector}},
    }


def _wait_until_it_holds(api: Api, namespace: str, wanted: Mapping[str, str], does: Mapping[str, object]) -> None:
    """The API server takes a policy up a moment after it is created: create pods for trial until it does."""
    pod = {
        **_PROBE,
        "metadata": {"name": "probe", "namespace": namespace, "labels": dict(wanted)},
        "spec": {"containers": [{"name": "trainer", "image": "probe"}]},
    }
    expected = {f"{PREFIX}{key}": str(value) for key, value in does.items()}

    def holds() -> bool:
        made = api.post(f"/api/v1/namespaces/{namespace}/pods", pod, dryRun="All")
        annotations = made["metadata"].get("annotations", {})
        return all(annotations.get(key) == value for key, value in expected.items())

    _wait_until(holds, f"pods of {namespace} do not do {dict(does)}")


def _wait_until(holds: Callable[[], bool], text: str) -> None:
    deadline = time.monotonic() + TAKE_UP_SECONDS
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(text)
        time.sleep(0.1)
