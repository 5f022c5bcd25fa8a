"""The chart, installed by helm on a control plane."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import yaml

from charts.helm import CHART, NAMESPACE, RELEASE
from cluster.api import ClusterApiError
from cluster.control_plane import ControlPlane, KubectlError, Settings
from cluster.scenarios.jobs import qlora_job
from fixtures import skip_unless_ci
from services.binaries import ToolMissingError

if TYPE_CHECKING:
    from collections.abc import Iterator

FULL_NAME = f"{RELEASE}-qlora-operator"
CRD = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/qlorajobs.qlora.dev"
MEMORY = f"/api/v1/namespaces/{NAMESPACE}/configmaps/{FULL_NAME}-memory"
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
VALUES = {"admissionPolicy": {"priorityClassNames": ["research"]}}
ADMINISTRATOR = "kubernetes-admin"
ENFORCED_SECONDS = 30


@contextmanager
def running(folder, settings: Settings | None = None) -> Iterator[ControlPlane]:
    """A cluster without nodes, and in it a namespace for the release that refuses pods which are not restricted."""
    try:
        cluster = ControlPlane(folder, settings)
    except ToolMissingError as error:
        skip_unless_ci(str(error))
    with cluster:
        metadata = {"name": NAMESPACE, "labels": RESTRICTED}
        cluster.api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
        yield cluster


class InstalledChart:
    """A release on a cluster."""

    def __init__(self, helm, cluster, release=RELEASE, namespace=NAMESPACE):
        self.helm = replace(helm, kubeconfig=cluster.kubeconfig)
        self.cluster, self.release, self.namespace = cluster, release, namespace

    def upgrade(self, chart=CHART, **values):
        """Install, or upgrade; what helm says."""
        text = yaml.safe_dump(VALUES | values)
        options = ("--install", "--namespace", self.namespace, "--values", "-")
        return self.helm("upgrade", self.release, chart, *options, stdin=text)

    def uninstall(self):
        return self.helm("uninstall", self.release, "--namespace", self.namespace, "--wait")

    def objects(self):
        manifest = self.helm("get", "manifest", self.release, "--namespace", self.namespace)
        return [o for o in yaml.safe_load_all(manifest) if o]

    def left(self, objects):
        """Kinds and names of the objects that are there, and not about to go."""
        found = []
        for each in objects:
            try:
                there = self.cluster.api.get(self.cluster.api.path_of(each, self.namespace))
            except (ClusterApiError, KeyError):  # a kind that is not served any more
                continue
            if "deletionTimestamp" not in there["metadata"]:
                found.append((each["kind"], each["metadata"]["name"]))
        return found

    def wait_until_enforced(self):
        """A new policy is enforced a moment after it is made; until then everything passes."""
        job = qlora_job("probe", scheduling={"priorityClassName": "none-of-those"})
        until = time.monotonic() + ENFORCED_SECONDS
        while not refusal(self.cluster, job, ADMINISTRATOR):
            assert time.monotonic() < until, "the policy is not enforced"
            time.sleep(0.1)


def refusal(cluster, manifest, user, verb="create"):
    """Return why a user may not create or change an object; empty: allowed. Nothing is stored."""
    groups = ("--as-group", "system:masters") if user == ADMINISTRATOR else ()
    try:
        cluster.kubectl(verb, "-f", "-", "--dry-run=server", "--as", user, *groups, stdin=json.dumps(manifest))
    except KubectlError as error:
        return str(error)
    return ""
