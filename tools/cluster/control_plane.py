"""A real control plane on this machine: etcd, API server, controller manager, scheduler, each its own process."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Self

import httpx

from cluster.addresses import claim_addresses
from cluster.api import ClusterApi, ClusterApiError
from cluster.audit import read_audit_log
from cluster.credentials import Authority, KeyPair, write_kubeconfig
from cluster.kueue import Kueue
from cluster.kwok import Kwok
from cluster.leftovers import remove_leftovers
from cluster.network import Bridge
from cluster.node.node import Node, require_node_tools
from cluster.processes import ServerProcess
from services.binaries import find_or_build
from services.tools import ETCD, KUBE_APISERVER, KUBE_CONTROLLER_MANAGER, KUBE_SCHEDULER, KUBECTL
from testing.timeouts import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cluster.api import Object
    from cluster.audit import Request

READY_SECONDS = PATIENCE_SECONDS
KUBECTL_SECONDS = PATIENCE_SECONDS
TOKEN_SECONDS = 3600
ETCD_PORT, ETCD_PEER_PORT, API_PORT, CONTROLLER_PORT, SCHEDULER_PORT = 2379, 2380, 6443, 10257, 10259
CLIENT_LIMITS = ("--kube-api-qps=500", "--kube-api-burst=1000")
"""Kubernetes' own 20 requests a second would make the controllers, not the code under test, what is measured."""
API_SERVER_NAMES = ("localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc")
AUDIT_POLICY = Path(__file__).with_name("audit-policy.yaml")


class KubectlError(Exception):
    """kubectl ended with an error; the text is what it says."""


@dataclass(frozen=True)
class Settings:
    """Settings in which clusters may differ. The defaults are Kubernetes' own, but for gang scheduling."""

    gang_scheduling: bool = True
    """Native: the Job controller makes a Workload and a PodGroup of a parallel Indexed Job (alpha in 1.36)."""
    node_grace_seconds: int = 50
    """A node that was silent this long is not ready."""
    eviction_seconds: int = 300
    """Pods without tolerations of their own stay this long on a node that is not ready."""
    quota_sync_seconds: int = 300
    """ResourceQuotas are counted anew after this time, also for kinds that are new."""
    real_nodes: bool = False
    """Listen on a bridge that real nodes and their pods reach, not on loopback. Needs root."""
    api_server_flags: tuple[str, ...] = ()

    def gates(self, *gates: str) -> tuple[str, ...]:
        return (f"--feature-gates={','.join(f'{g}=true' for g in gates)}",) if self.gang_scheduling else ()


class ControlPlane:
    """One cluster that has no nodes yet. A context manager; several run at once.

    Args:
        folder: for certificates, data and logs; made if missing. ``stop`` removes the data and keeps the logs.

    """

    def __init__(self, folder: Path, settings: Settings | None = None) -> None:
        self.folder, self.settings = folder.absolute(), settings or Settings()
        if self.settings.real_nodes:
            require_node_tools()
        tools = (ETCD, KUBE_APISERVER, KUBE_CONTROLLER_MANAGER, KUBE_SCHEDULER, KUBECTL)
        self.binaries = {tool.name: find_or_build(tool) for tool in tools}
        self.admin_token = secrets.token_hex(16)
        self.logs = self.folder / "logs"
        self._data = self.folder / "data"
        self._processes: dict[str, ServerProcess] = {}
        self._namespace_numbers = count()
        self._owned = ExitStack()
        self._kwok: Kwok | None = None
        self._kueue: Kueue | None = None
        self._nodes: list[Node] = []

    # ------------------------------------------------------------------------------------------------ start and stop

    def start(self) -> None:
        """Start everything and wait until pods could be scheduled.

        Raises:
            ComponentError: a component ended or is not ready in time.

        """
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop what was added to the cluster, then the cluster, at once: nothing of its state is kept."""
        self._owned.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop_api_server(self) -> None:
        """End the API server as a crash does. An orderly stop would wait a minute for its watches to end."""
        self._processes.pop("kube-apiserver").kill()

    def start_api_server(self) -> None:
        """Start it, at the same address and with the same data, and wait until it is ready."""
        self._run_api_server()
        self._wait_for_api_server()

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by component."""
        return {name: process.pid for name, process in self._processes.items()}

    # ------------------------------------------------------------------------------------------------------- clients

    @property
    def url(self) -> str:
        return f"https://{self.address}:{API_PORT}"

    @property
    def kubeconfig(self) -> Path:
        """For the administrator, ``admin`` in ``system:masters``."""
        return self.folder / "admin.kubeconfig"

    def user_kubeconfig(self, user: str, groups: Sequence[str] = (), namespace: str = "") -> Path:
        """Kubeconfig of a user, by client certificate. Users exist by being named; RBAC says what they may do."""
        client = self.authority.issue(user, groups)
        return self._kubeconfig(user, client=client, namespace=namespace)

    def service_account_kubeconfig(self, namespace: str, name: str) -> Path:
        """Kubeconfig of a service account that exists, by a token that lasts an hour."""
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token"
        answer = self.api.post(path, {"spec": {"expirationSeconds": TOKEN_SECONDS}})
        return self._kubeconfig(f"{namespace}.{name}", token=answer["status"]["token"], namespace=namespace)

    def kubectl(self, *arguments: str | Path, stdin: str = "", kubeconfig: Path | None = None) -> str:
        """Run kubectl; what it prints.

        Raises:
            KubectlError: it fails.

        """
        done = subprocess.run(
            [self.binaries["kubectl"], "--cache-dir", self.folder / "kubectl", *arguments],
            input=stdin,
            env={**os.environ, "KUBECONFIG": str(kubeconfig or self.kubeconfig), "NO_PROXY": "*"},
            capture_output=True,
            text=True,
            timeout=KUBECTL_SECONDS,
            check=False,
        )
        if done.returncode:
            raise KubectlError(f"kubectl {' '.join(map(str, arguments))}: {done.stderr or done.stdout}")
        return done.stdout

    # ------------------------------------------------------------------------------------------------------ for tests

    def add_kwok_nodes(
        self,
        count: int,
        *,
        gpus: int = 8,
        labels: Mapping[str, str] | None = None,
        taints: Sequence[Object] = (),
        prefix: str = "fake",
    ) -> list[str]:
        """Add fake nodes, on which pods run by their annotations (see ``kwok.py``); their names."""
        if self._kwok is None:
            self._kwok = Kwok(self)
            self._owned.callback(self._kwok.stop)
        return self._kwok.add_nodes(count, gpus=gpus, labels=labels or {}, taints=taints, prefix=prefix)

    def add_kueue(self) -> Kueue:
        """Return the cluster's Kueue, started if there is none."""
        if self._kueue is None:
            self._kueue = Kueue(self)
            self._owned.callback(self._kueue.stop)
            self._kueue.start()
        return self._kueue

    def add_node(self, name: str = "", *, gpus: int = 0, labels: Mapping[str, str] | None = None) -> Node:
        """Boot a real node, on which pods run as containers. Needs ``Settings(real_nodes=True)``.

        Raises:
            ToolMissingError: see ``require_node_tools``.

        """
        index = len(self._nodes) + 1
        node = Node(self, index, name or f"node-{index}", gpus, labels or {})
        self._nodes.append(node)
        self._owned.callback(node.stop)
        node.start()
        if index == 1:
            self.bridge.route_services_to(index)
        return node

    def create_namespace(self, prefix: str = "test", labels: Mapping[str, str] | None = None) -> str:
        """Create a namespace with a name of its own and wait until pods can be made there; its name."""
        name = f"{prefix}-{next(self._namespace_numbers)}"
        self.api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels or {}}})
        self.api.wait_for(f"/api/v1/namespaces/{name}/serviceaccounts/default", bool)
        return name

    def delete_namespace(self, name: str, seconds: float = 60) -> None:
        """Delete a namespace and wait until its pods are gone; the rest the namespace controller deletes later."""
        path = f"/api/v1/namespaces/{name}"
        self.api.delete(path)
        # The namespace controller begins after 5 s; nothing new can be made there meanwhile.
        self.api.delete(f"/apis/batch/v1/namespaces/{name}/jobs")
        self.api.delete(f"{path}/pods", gracePeriodSeconds=0)
        self.api.wait_for(f"{path}/pods", lambda pods: not pods["items"], seconds=seconds, what=f"no pods in {name}")

    def audit_mark(self) -> int:
        """Return where the audit log ends now, for ``requests_since``."""
        return self._audit_log.stat().st_size

    def requests_since(self, mark: int = 0) -> list[Request]:
        """Finished requests: all writes, and reads by others than the control plane and the administrator."""
        return read_audit_log(self._audit_log, mark)

    # ------------------------------------------------------------------------------------------------------ the parts

    def _start(self) -> None:
        if self.settings.real_nodes:
            remove_leftovers()
        addresses = claim_addresses()
        self._owned.callback(addresses.release)
        self.addresses, self.bridge = addresses, Bridge(addresses)
        self.address = addresses.gateway if self.settings.real_nodes else addresses.loopback
        if self.settings.real_nodes:
            self._owned.callback(self.bridge.stop)
            self.bridge.start()
        self._owned.callback(self._kill_all)
        for folder in (self.logs, self._data):
            folder.mkdir(parents=True, exist_ok=True)
        self._run_etcd()
        self._make_credentials()
        self.api = ClusterApi(self.url, self.authority.certificate, self.admin_token)
        self._owned.callback(self.api.close)
        self._run_api_server()
        self._wait_for_api_server()
        self._run_controller_manager()
        self._run_scheduler()
        for name, port in (("kube-controller-manager", CONTROLLER_PORT), ("kube-scheduler", SCHEDULER_PORT)):
            self._processes[name].wait_until(lambda port=port: self._is_healthy(port), READY_SECONDS)
        self.api.wait_for("/api/v1/namespaces/default/serviceaccounts/default", bool)

    def _kill_all(self) -> None:
        for process in reversed(self._processes.values()):
            process.kill()
        self._processes.clear()
        shutil.rmtree(self._data, ignore_errors=True)

    def _make_credentials(self) -> None:
        certificates = self.folder / "certificates"
        self.authority = Authority.create(certificates)
        hosts = (*API_SERVER_NAMES, self.address, self.addresses.api_service)
        self._serving = self.authority.issue("kube-apiserver", ["system:masters"], hosts)
        self._account_key = self.authority.signing_key("service-accounts")
        tokens = {name: secrets.token_hex(16) for name in ("system:kube-controller-manager", "system:kube-scheduler")}
        rows = [f'{self.admin_token},admin,admin,"system:masters"', *(f"{t},{n},{n}" for n, t in tokens.items())]
        self._tokens = certificates / "tokens.csv"
        self._tokens.write_text("\n".join(rows) + "\n")
        self._kubeconfig("admin", token=self.admin_token)
        for name, token in tokens.items():
            self._kubeconfig(name.removeprefix("system:"), token=token)

    def _kubeconfig(self, user: str, *, token: str = "", client: KeyPair | None = None, namespace: str = "") -> Path:
        path = self.folder / f"{user.replace('/', '_').replace(':', '-')}.kubeconfig"
        return write_kubeconfig(path, self.url, self.authority, token=token, client=client, namespace=namespace)

    def _run(self, name: str, *flags: str) -> None:
        self._processes[name] = ServerProcess(name, [self.binaries[name], *flags], self.logs)

    def _run_etcd(self) -> None:
        client, peer = f"http://{self.address}:{ETCD_PORT}", f"http://{self.address}:{ETCD_PEER_PORT}"
        self._run(
            "etcd",
            f"--data-dir={self._data / 'etcd'}",
            *(f"--listen-client-urls={client}", f"--advertise-client-urls={client}"),
            *(
                f"--listen-peer-urls={peer}",
                f"--initial-advertise-peer-urls={peer}",
                f"--initial-cluster=default={peer}",
            ),
            *("--unsafe-no-fsync", "--log-level=warn"),
        )

    def _run_api_server(self) -> None:
        # The object of the Service `kubernetes` may not point at loopback; without one, the Service has no endpoint.
        reconciler = "none" if self.address == self.addresses.loopback else "lease"
        gang = ("--runtime-config=scheduling.k8s.io/v1alpha2=true",) if self.settings.gang_scheduling else ()
        eviction = self.settings.eviction_seconds
        self._run(
            "kube-apiserver",
            f"--etcd-servers=http://{self.address}:{ETCD_PORT}",
            *(f"--bind-address={self.address}", f"--advertise-address={self.address}", f"--secure-port={API_PORT}"),
            *(f"--service-cluster-ip-range={self.addresses.service_range}", f"--endpoint-reconciler-type={reconciler}"),
            *self._serving_flags("tls-cert-file", "tls-private-key-file"),
            *self._serving_flags("kubelet-client-certificate", "kubelet-client-key"),
            f"--client-ca-file={self.authority.certificate}",
            f"--token-auth-file={self._tokens}",
            "--service-account-issuer=https://kubernetes.default.svc",
            *(f"--service-account-{use}-file={self._account_key}" for use in ("key", "signing-key")),
            *(
                "--authorization-mode=Node,RBAC",
                "--enable-admission-plugins=NodeRestriction",
                "--allow-privileged=true",
            ),
            "--kubelet-preferred-address-types=InternalIP",
            *(f"--default-{state}-toleration-seconds={eviction}" for state in ("not-ready", "unreachable")),
            *(f"--audit-policy-file={AUDIT_POLICY}", f"--audit-log-path={self._audit_log}"),
            *self.settings.gates("GenericWorkload", "WorkloadWithJob"),
            *gang,
            *self.settings.api_server_flags,
        )

    def _run_controller_manager(self) -> None:
        self._run(
            "kube-controller-manager",
            *self._controller_flags("kube-controller-manager", CONTROLLER_PORT),
            "--use-service-account-credentials=true",
            f"--service-account-private-key-file={self._account_key}",
            f"--root-ca-file={self.authority.certificate}",
            f"--cluster-signing-cert-file={self.authority.certificate}",
            f"--cluster-signing-key-file={self.authority.key}",
            *(f"--node-monitor-grace-period={self.settings.node_grace_seconds}s", "--node-monitor-period=1s"),
            f"--resource-quota-sync-period={self.settings.quota_sync_seconds}s",
            *self.settings.gates("GenericWorkload", "WorkloadWithJob"),
        )

    def _run_scheduler(self) -> None:
        self._run(
            "kube-scheduler",
            *self._controller_flags("kube-scheduler", SCHEDULER_PORT),
            *self.settings.gates("GenericWorkload", "GangScheduling"),
        )

    def _controller_flags(self, name: str, port: int) -> tuple[str, ...]:
        return (
            f"--kubeconfig={self.folder / name}.kubeconfig",
            *(f"--bind-address={self.address}", f"--secure-port={port}", "--leader-elect=false", *CLIENT_LIMITS),
            *self._serving_flags("tls-cert-file", "tls-private-key-file"),
        )

    def _serving_flags(self, certificate: str, key: str) -> tuple[str, str]:
        return f"--{certificate}={self._serving.certificate}", f"--{key}={self._serving.key}"

    def _wait_for_api_server(self) -> None:
        self._processes["kube-apiserver"].wait_until(self._is_ready, READY_SECONDS)

    def _is_ready(self) -> bool:
        try:
            self.api.text("/readyz")
        except (ClusterApiError, httpx.TransportError):
            return False
        return True

    def _is_healthy(self, port: int) -> bool:
        try:
            self.api.text(f"https://{self.address}:{port}/healthz")
        except (ClusterApiError, httpx.TransportError):
            return False
        return True

    @property
    def _audit_log(self) -> Path:
        return self.logs / "audit.log"
