"""The real Kueue beside a cluster's control plane, with the manifests and the configuration of its own release.

Two things differ from a release in a cluster. It is a process of this machine, so that the Service of its webhooks
leads by name to the control plane's address. And no kubelet mounts the Secret with the certificate that Kueue makes for
itself: the harness writes it into Kueue's folder.
"""

from __future__ import annotations

import base64
import os
from typing import TYPE_CHECKING, Any

import httpx
import yaml

from cluster.processes import ServerProcess
from services.binaries import find_or_build, module_dir
from services.tools import KUEUE
from testing.timeouts import PATIENCE_SECONDS

if TYPE_CHECKING:
    from cluster.api import Object
    from cluster.control_plane import ControlPlane

NAMESPACE = "kueue-system"
SERVICE, SECRET = "kueue-webhook-service", "kueue-webhook-server-cert"
WEBHOOK_PORT, HEALTH_PORT = 9443, 8081
KINDS = ("CustomResourceDefinition", "MutatingWebhookConfiguration", "ValidatingWebhookConfiguration", "Secret")
API = "/apis/kueue.x-k8s.io/v1beta2"
READY_SECONDS = PATIENCE_SECONDS


class Kueue:
    """One Kueue for one cluster, whose kinds are served as soon as it is made."""

    def __init__(self, cluster: ControlPlane) -> None:
        self._binary, self._sources = find_or_build(KUEUE), module_dir(KUEUE)
        self._cluster = cluster
        self._folder = cluster.folder / "kueue"
        self._certificates = self._folder / "certificates"
        self._process: ServerProcess | None = None
        self._install()

    def start(self, **settings: Any) -> None:
        """Start it and wait until its webhooks answer.

        Args:
            settings: over the release's configuration, such as ``manageJobsWithoutQueueName=True``.

        """
        self._certificates.mkdir(parents=True, exist_ok=True)
        config = self._folder / "config.yaml"
        config.write_text(yaml.safe_dump(self._configuration(settings)))
        kubeconfig = self._cluster.user_kubeconfig("kueue", ["system:masters"])
        self._process = ServerProcess(
            "kueue",
            [self._binary, f"--config={config}", "--zap-log-level=2"],
            self._cluster.logs,
            {**os.environ, "KUBECONFIG": str(kubeconfig), "NO_PROXY": "*"},
        )
        self._process.wait_until(self._is_certified, READY_SECONDS)
        self._process.wait_until(self._is_ready, READY_SECONDS)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()

    def restart(self, **settings: Any) -> None:
        """Start it anew with other settings."""
        self.stop()
        self.start(**settings)

    # ------------------------------------------------------------------------------------------------------- its parts

    def _install(self) -> None:
        manifests = list(yaml.safe_load_all(self._cluster.kubectl("kustomize", self._sources / "config" / "default")))
        kept = [self._with_port(manifest) for manifest in manifests if manifest["kind"] in KINDS]
        service = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": SERVICE, "namespace": NAMESPACE},
            "spec": {"type": "ExternalName", "externalName": self._cluster.address},
        }
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
        text = yaml.safe_dump_all([namespace, service, *kept])
        self._cluster.kubectl("apply", "--server-side", "-f", "-", stdin=text)
        self._cluster.api.wait_for(f"{API}/clusterqueues", bool, what="ClusterQueues are served")

    def _with_port(self, manifest: Object) -> Object:
        """Return a manifest whose webhooks, if any, are at Kueue's own port: a Service by name translates none."""
        clients = [webhook["clientConfig"] for webhook in manifest.get("webhooks", ())]
        conversion = manifest.get("spec", {}).get("conversion", {}).get("webhook")
        for client in (*clients, *([conversion["clientConfig"]] if conversion else ())):
            client["service"]["port"] = WEBHOOK_PORT
        return manifest

    def _configuration(self, settings: Object) -> Object:
        path = self._sources / "config" / "components" / "manager" / "controller_manager_config.yaml"
        release: Object = yaml.safe_load(path.read_text())
        address = self._cluster.address
        return {
            **release,
            "namespace": NAMESPACE,
            "health": {"healthProbeBindAddress": f"{address}:{HEALTH_PORT}"},
            "metrics": {"bindAddress": "0"},
            "webhook": {"host": address, "port": WEBHOOK_PORT, "certDir": str(self._certificates)},
            "leaderElection": {"leaderElect": False},
            "featureGates": {"VisibilityOnDemand": False},  # its port would be every address's
            **settings,
        }

    def _is_certified(self) -> bool:
        """Mount the certificate, as a kubelet does; whether there is one."""
        data = self._cluster.api.get(f"/api/v1/namespaces/{NAMESPACE}/secrets/{SECRET}").get("data") or {}
        for name, value in data.items():
            (self._certificates / name).write_bytes(base64.b64decode(value))
        return "tls.crt" in data

    def _is_ready(self) -> bool:
        try:
            url = f"http://{self._cluster.address}:{HEALTH_PORT}/readyz"
            return httpx.get(url, timeout=5, trust_env=False).is_success
        except httpx.TransportError:
            return False
