"""Read all that may matter, at once. What may not be read is remembered as such."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from qlora_cli.doctor import references
from qlora_cli.doctor.answer import Answer
from qlora_cli.kube.errors import KubeApiError, UnreachableError
from qlora_cli.kube.names import (
    CRD,
    GROUP,
    OPERATOR_SELECTOR,
    PART_OF_OPERATOR,
    PLURAL,
    SWEEP_CRD,
    SWEEP_PLURAL,
    core_path,
    jobs_path,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qlora_cli.doctor.references import ReferencedObject
    from qlora_cli.kube.api_client import ApiClient, Object
    from qlora_cli.kube.target import Cluster

TRAINERS = "app.kubernetes.io/managed-by=qlora-operator"
WORKERS = 8
PAUSES = (0.5, 2.0)
"""Seconds before a question is asked again."""
BUSY = 429
"""This code and those above it speak of the API server, not of what was asked for."""
RIGHTS: tuple[tuple[str, str, str, str], ...] = (
    # verb, group, resource, what of this command line needs it
    ("create", GROUP, PLURAL, "submit, retry"),
    ("get", GROUP, PLURAL, "show"),
    ("list", GROUP, PLURAL, "list"),
    ("watch", GROUP, PLURAL, "watch"),
    ("patch", GROUP, PLURAL, "suspend, resume"),
    ("delete", GROUP, PLURAL, "cancel"),
    ("create", GROUP, SWEEP_PLURAL, "submit of a sweep"),
    ("get", GROUP, SWEEP_PLURAL, "report"),
    ("list", GROUP, SWEEP_PLURAL, "list"),
    ("patch", GROUP, SWEEP_PLURAL, "suspend, resume"),
    ("delete", GROUP, SWEEP_PLURAL, "cancel"),
    ("list", "", "pods", "logs"),
    ("watch", "", "pods", "logs"),
    ("get", "", "pods/log", "logs"),
    ("list", "", "events", "events"),
)


MISSING = Answer(missing=True)


@dataclass(frozen=True)
class ClusterSnapshot:
    """All that was read. Everything is optional but the server's answer."""

    namespace: str
    now: datetime
    server: str = ""
    version: str = ""
    user: str = ""
    rights: dict[tuple[str, str], bool] = field(default_factory=dict)
    """By verb and resource."""
    crd: Answer = MISSING
    sweep_crd: Answer = MISSING
    served: Answer = MISSING
    """Resources of the API group, for users who may not read its CustomResourceDefinitions."""
    groups: Answer = MISSING
    gang_resources: Answer = MISSING
    """Resources of the API group scheduling.k8s.io."""
    deployments: Answer = MISSING
    """Deployments of operators; one that serves the namespace comes first."""
    operator_pods: Answer = MISSING
    """Pods of the first of these operators."""
    config: Answer = MISSING
    """Configuration of the first operator, parsed."""
    configs: tuple[Answer, ...] = ()
    """Configurations of all operators, in the order of the Deployments."""
    policies: Answer = MISSING
    bindings: Answer = MISSING
    nodes: Answer = MISSING
    jobs: Answer = MISSING
    manifests: tuple[Object, ...] = ()
    """Jobs that are not submitted yet."""
    pods: Answer = MISSING
    """Pods of trainers and of Prepare in the namespace."""
    events: Answer = MISSING
    network_policies: Answer = MISSING
    monitors: Answer = MISSING
    quotas: Answer = MISSING
    named: tuple[tuple[ReferencedObject, Answer], ...] = ()
    """Secrets, claims and the like that jobs name, each as it was found."""
    endpoints: tuple[tuple[str, str, str], ...] = ()
    """Endpoints of object storage: URL, the object that names it, and what is wrong with it, or ""."""


def read_cluster(cluster: Cluster, manifests: Sequence[Object] = ()) -> ClusterSnapshot:
    """Read it all. ``manifests``: jobs that are not submitted yet, whose references are looked at too.

    Raises:
        UnreachableError: there is no cluster to read from.

    """
    api, namespace = cluster.api, cluster.namespace
    version = api.get("/version").get("gitVersion", "")
    definitions = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    admission = "/apis/admissionregistration.k8s.io/v1"
    with ThreadPoolExecutor(WORKERS) as pool:
        asked: dict[str, Future[Any]] = {
            "user": pool.submit(_user, api),
            "rights": pool.submit(_rights, api, namespace),
            "crd": pool.submit(_get, api, f"{definitions}/{CRD}"),
            "sweep_crd": pool.submit(_get, api, f"{definitions}/{SWEEP_CRD}"),
            "served": pool.submit(_get, api, f"/apis/{GROUP}/v1alpha1"),
            "groups": pool.submit(_group_names, api),
            "gang_resources": pool.submit(_gang_resources, api),
            "deployments": pool.submit(_deployments, api, namespace),
            "policies": pool.submit(_list, api, f"{admission}/validatingadmissionpolicies", PART_OF_OPERATOR),
            "bindings": pool.submit(_list, api, f"{admission}/validatingadmissionpolicybindings", PART_OF_OPERATOR),
            "nodes": pool.submit(_list, api, "/api/v1/nodes"),
            "jobs": pool.submit(_list, api, jobs_path(namespace)),
            "pods": pool.submit(_list, api, core_path(namespace, "pods"), TRAINERS),
            "events": pool.submit(_list, api, core_path(namespace, "events"), None, "type=Warning"),
            "network_policies": pool.submit(
                _list, api, f"/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies"
            ),
            "monitors": pool.submit(_list, api, "/apis/monitoring.coreos.com/v1/podmonitors", PART_OF_OPERATOR),
            "quotas": pool.submit(_list, api, core_path(namespace, "resourcequotas")),
        }
        found: dict[str, Any] = {name: future.result() for name, future in asked.items()}
        found |= _operators(pool, api, found["deployments"], namespace)
        bodies = [*manifests, *(j for j in found["jobs"].items if not _is_finished(j))]
        named = references.of_jobs(bodies, namespace)
        answers = [pool.submit(_get, api, each.path) for each in named]
        pairs = tuple((each, answer.result()) for each, answer in zip(named, answers, strict=True))
    return ClusterSnapshot(
        namespace=namespace,
        now=datetime.now(UTC),
        server=api.server,
        version=version,
        manifests=tuple(manifests),
        named=pairs,
        endpoints=tuple(references.endpoints(pairs, lambda path: _get(api, path))),
        **found,
    )


def _is_finished(job: Object) -> bool:
    return (job.get("status") or {}).get("state") in ("Succeeded", "Failed")


def _answer(question: Callable[[], Any], pauses: Sequence[float] = PAUSES) -> Answer:
    """Ask, and again where the API server is busy or silent: that says nothing of what is there.

    Raises:
        ClusterError: it stays so.

    """
    try:
        return Answer(question())
    except (KubeApiError, UnreachableError) as error:
        if isinstance(error, KubeApiError) and error.code < BUSY:
            return Answer(denied=error.forbidden, missing=not error.forbidden, text=str(error))
        if not pauses:
            raise
    time.sleep(pauses[0])
    return _answer(question, pauses[1:])


def _get(api: ApiClient, path: str) -> Answer:
    return _answer(lambda: api.get(path))


def _list(api: ApiClient, path: str, labels: str | None = None, fields: str | None = None) -> Answer:
    return _answer(lambda: api.list(path, labelSelector=labels, fieldSelector=fields)[0])


def _group_names(api: ApiClient) -> Answer:
    return _answer(
        lambda: [{"name": g["name"], "versions": g.get("versions") or []} for g in api.get("/apis")["groups"]]
    )


def _gang_resources(api: ApiClient) -> Answer:
    """Resources of scheduling.k8s.io in whatever versions are served."""

    def question() -> list[Object]:
        group = api.get("/apis/scheduling.k8s.io")
        return [r for v in group["versions"] for r in api.get(f"/apis/{v['groupVersion']}")["resources"]]

    return _answer(question)


def _user(api: ApiClient) -> str:
    """Return the user as the API server identifies them."""
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
    answer = _answer(lambda: api.ask("/apis/authentication.k8s.io/v1/selfsubjectreviews", body))
    status = (answer.value or {}).get("status") or {}
    return str((status.get("userInfo") or {}).get("username", ""))


def _rights(api: ApiClient, namespace: str) -> dict[tuple[str, str], bool]:
    found = {}
    for verb, group, resource, _ in RIGHTS:
        name, _, subresource = resource.partition("/")
        attributes = {
            "namespace": namespace,
            "verb": verb,
            "group": group,
            "resource": name,
            "subresource": subresource,
        }
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        }
        path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
        answer = _answer(lambda body=body, path=path: api.ask(path, body))  # type: ignore[misc]
        if answer.there:
            found[verb, resource] = bool((answer.value.get("status") or {}).get("allowed"))
    return found


def _deployments(api: ApiClient, namespace: str) -> Answer:
    """Return the operator's Deployments in all namespaces, or in this one if the user may not list all."""
    everywhere = _list(api, "/apis/apps/v1/deployments", OPERATOR_SELECTOR)
    if not everywhere.denied:
        return everywhere
    here = _list(api, f"/apis/apps/v1/namespaces/{namespace}/deployments", OPERATOR_SELECTOR)
    return here if here.items else everywhere


def _operators(pool: ThreadPoolExecutor, api: ApiClient, deployments: Answer, namespace: str) -> dict[str, Any]:
    """Configurations of all operators there are, and pods of the one that serves the namespace."""
    if not deployments.items:
        return {}
    metas = [deployment["metadata"] for deployment in deployments.items]
    asked = [pool.submit(_get, api, core_path(m["namespace"], "configmaps", m["name"])) for m in metas]
    read = list(zip(deployments.items, [_parsed(answer.result()) for answer in asked], strict=True))
    read.sort(key=lambda operator: not serves(operator[1], namespace))
    deployment, config = read[0]
    selector = deployment["spec"]["selector"].get("matchLabels") or {}
    labels = ",".join(f"{name}={value}" for name, value in selector.items())
    return {
        "deployments": Answer([each for each, _ in read]),
        "operator_pods": _list(api, core_path(deployment["metadata"]["namespace"], "pods"), labels),
        "config": config,
        "configs": tuple(each for _, each in read),
    }


def serves(config: Answer, namespace: str) -> bool:
    """Return whether an operator with this configuration serves a namespace; one that cannot be read does not."""
    return config.there and namespace in (config.value.get("namespaces") or [namespace])


def _parsed(answer: Answer) -> Answer:
    import yaml  # noqa: PLC0415

    if not answer.there:
        return answer
    try:
        config = yaml.safe_load((answer.value.get("data") or {}).get("config.yaml", ""))
    except yaml.YAMLError as error:
        return Answer(missing=True, text=f"config.yaml: {error}")
    return Answer(config) if isinstance(config, dict) else Answer(missing=True, text="it has no config.yaml")
