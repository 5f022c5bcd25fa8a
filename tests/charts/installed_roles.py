"""The chart's roles and policies on a cluster, for an operator that is a process of the test's."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from charts.helm import CHART, Helm
from cluster.control_plane import ControlPlane, KubectlError
from cluster.scenarios.whole_life import SETTINGS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@dataclass(frozen=True)
class InstalledRoles:
    """The chart's objects on a cluster, but for the operator's Deployment, which is a process of the test's."""

    cluster: ControlPlane
    served: str
    """A namespace in the operator's care."""
    settings: dict[str, Any]
    """The operator's, as the chart writes them."""
    account: str
    """The operator's user name."""
    kubeconfig: Path
    """The operator's."""
    rights: frozenset[tuple[str, str]]
    """Verb and resource of all that its roles grant."""


def install(cluster: ControlPlane, helm: Helm, system: str, served: str, **values: Any) -> InstalledRoles:
    """``helm template | kubectl apply``, and the operator's own kubeconfig and settings out of it."""
    cluster.api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": system}})
    text = helm("template", "qlora", CHART, "--namespace", system, "--values", "-", stdin=yaml.safe_dump(values))
    objects = [each for each in yaml.safe_load_all(text) if each and each["kind"] != "Deployment"]
    cluster.kubectl("apply", "--server-side", "-f", "-", stdin="\n---\n".join(map(json.dumps, objects)))
    (account,) = (each["metadata"]["name"] for each in objects if each["kind"] == "ServiceAccount")
    (config,) = (each["data"]["config.yaml"] for each in objects if each["kind"] == "ConfigMap" and "data" in each)
    settings = {key: value for key, value in yaml.safe_load(config).items() if value is not None}
    settings |= SETTINGS | {"trainer": {"nodeLostSeconds": 1}, "progressSeconds": 1}
    settings.pop("metricsPort")
    return InstalledRoles(
        cluster,
        served,
        settings,
        f"system:serviceaccount:{system}:{account}",
        cluster.service_account_kubeconfig(system, account),
        frozenset(granted(objects, account)),
    )


def granted(objects: list[dict[str, Any]], account: str) -> Iterator[tuple[str, str]]:
    """Verb and resource of each right that the bindings give an account."""
    bindings = [o for o in objects if o["kind"].endswith("RoleBinding")]
    bound = {(b["roleRef"]["kind"], b["roleRef"]["name"]) for b in bindings if b["subjects"][0]["name"] == account}
    for role in (o for o in objects if (o["kind"], o["metadata"]["name"]) in bound):
        for rule in role["rules"]:
            yield from itertools.product(rule["verbs"], rule["resources"])


def can_i(cluster: ControlPlane, account: str, verb: str, resource: str, namespace: str) -> bool:
    """``kubectl auth can-i``."""
    place = ("--namespace", namespace) if namespace else ("--all-namespaces",)
    try:
        return cluster.kubectl("auth", "can-i", verb, resource, "--as", account, *place).strip() == "yes"
    except KubectlError as error:
        if str(error).rstrip().endswith("no"):
            return False
        raise
