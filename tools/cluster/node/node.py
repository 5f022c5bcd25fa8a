"""A real node: containerd, runc, kubelet, kube-proxy and CoreDNS, and pods that run as real containers.

The node is a set of Linux namespaces around one first process (``node-init``), as a container would be. When that
process ends, by ``stop`` or with the harness, the kernel ends all others of the node, containers included, and drops
its mounts, interfaces and iptables rules. What is left is control groups, which are removed at ``stop``.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.node import cgroups
from cluster.node.images import BUSYBOX, write_busybox_archive
from cluster.node.node_config import cni_config, coredns_config, kubelet_config
from cluster.node.nodes import is_usable
from cluster.processes import ServerProcess
from services.binaries import ToolMissingError, find_or_build
from services.tools import NODE
from testing.timeouts import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cluster.control_plane import ControlPlane

HERE = Path(__file__).parent
NAMESPACES = ("--pid", "--mount", "--net", "--uts", "--ipc")
DEBIAN_FILES = (Path("/usr/sbin/runc"), Path("/usr/lib/cni/ptp"), Path("/usr/sbin/iptables"), BUSYBOX)
READY_SECONDS = PATIENCE_SECONDS
IMPORT_SECONDS = PATIENCE_SECONDS
STOP_SECONDS = 30
GPU = "nvidia.com/gpu"


class Node:
    """One node of a cluster with ``Settings(real_nodes=True)``; made by ``ControlPlane.add_node``.

    ``stop`` is what pulling its plug is; ``start`` afterwards is a boot of the same machine: images are kept,
    containers are not.
    """

    def __init__(self, cluster: ControlPlane, index: int, name: str, gpus: int, labels: Mapping[str, str]) -> None:
        require_node_tools()
        self.name, self.gpus = name, gpus
        self._binaries = {tool.name: find_or_build(tool) for tool in NODE}
        self._cluster, self._index, self._labels = cluster, index, labels
        self.address = cluster.addresses.node_address(index)
        self.folder = cluster.folder / name
        self._logs = cluster.logs / name
        self._control_group = f"{cluster.addresses.bridge}-{name}"
        self._running = ExitStack()
        self._kubelet: ServerProcess | None = None

    # ------------------------------------------------------------------------------------------------ start and stop

    def start(self) -> None:
        """Boot it and wait until pods can be placed on it.

        Raises:
            ComponentError: a component ended or is not ready in time.

        """
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End everything on it at once. The control plane is not told."""
        self._running.close()

    def start_kubelet(self) -> None:
        """Start kubelet and wait until the node is ready, with its GPUs."""
        started = datetime.now(UTC).replace(microsecond=0)
        self._kubelet = self._run(
            "kubelet",
            "--config=/run/node/kubelet.json",
            f"--kubeconfig={self._kubeconfig}",
            *("--root-dir=/run/node/kubelet", "--cert-dir=/run/node/kubelet/pki"),
            *(f"--hostname-override={self.name}", f"--node-ip={self.address}"),
            f"--node-labels={','.join(f'{k}={v}' for k, v in self._labels.items())}",
        )
        self._kubelet.wait_until(lambda: self._has_reported_since(started), READY_SECONDS)
        self._show_gpus()
        self._kubelet.wait_until(self._is_ready, READY_SECONDS)

    def stop_kubelet(self) -> None:
        """End kubelet as a crash does. Containers go on; the control plane finds out by missing heartbeats."""
        assert self._kubelet is not None
        self._kubelet.kill()

    # ------------------------------------------------------------------------------------------------------- for tests

    def import_image(self, archive: Path) -> None:
        """Import the images of a docker or OCI archive, under the names it gives them."""
        self.run(self._binaries["ctr"], "--namespace", "k8s.io", "images", "import", "--local", archive.absolute())

    def run(self, *command: str | Path) -> str:
        """Run a command of this machine in the node's namespaces; what it prints.

        Raises:
            RuntimeError: it fails.

        """
        done = subprocess.run(
            [*self._enter, *command], capture_output=True, text=True, timeout=IMPORT_SECONDS, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{self.name}: {' '.join(map(str, command))}: {done.stderr or done.stdout}")
        return done.stdout

    # ------------------------------------------------------------------------------------------------------- the parts

    def _start(self) -> None:
        for folder in (self._logs, self.folder / "cni"):
            folder.mkdir(parents=True, exist_ok=True)
        self._running.callback(self._remove_control_groups)
        cgroups.create(self._control_group)
        self._boot()
        self._configure()
        self._run("containerd", "--config", HERE / "containerd.toml").wait_until(self._answers_ctr, READY_SECONDS)
        self.import_image(write_busybox_archive(self.folder / "busybox.tar"))
        self._run("coredns", "-conf=/run/node/Corefile")
        self._run(
            "kube-proxy",
            f"--kubeconfig={self._kubeconfig_of('system:kube-proxy')}",
            *("--proxy-mode=iptables", "--conntrack-max-per-core=0", f"--hostname-override={self.name}"),
            f"--cluster-cidr={self._cluster.addresses.pod_range(self._index)}",
        )
        self.start_kubelet()

    def _boot(self) -> None:
        up = self.folder / "is-up"
        up.unlink(missing_ok=True)
        command = ("unshare", *NAMESPACES, "--fork", "--kill-child=KILL", "--mount-proc", HERE / "node-init")
        outer = ServerProcess("node-init", [*command, self.folder, self.name], self._logs)
        self._running.callback(outer.kill)
        outer.wait_until(up.exists, READY_SECONDS)
        self._pid = int(Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text())
        self._running.callback(self._pull_the_plug, outer)
        self._cluster.bridge.join(self._index, self._pid)

    def _pull_the_plug(self, outer: ServerProcess) -> None:
        os.kill(self._pid, signal.SIGKILL)
        outer.wait(STOP_SECONDS)  # until the last process of the node has ended

    def _configure(self) -> None:
        addresses, authority = self._cluster.addresses, self._cluster.authority
        serving = authority.issue(f"kubelet-{self.name}", hosts=[self.name, self.address])
        kubelet = kubelet_config(self.address, self._control_group, authority.certificate, serving)
        (self.folder / "kubelet.json").write_text(kubelet)
        (self.folder / "cni" / "10-pods.conflist").write_text(cni_config(addresses.pod_range(self._index)))
        coredns = coredns_config(self.address, self._kubeconfig_of("coredns", "system:masters"))
        (self.folder / "Corefile").write_text(coredns)
        self._kubeconfig = self._kubeconfig_of(f"system:node:{self.name}", "system:nodes")

    def _kubeconfig_of(self, user: str, *groups: str) -> Path:
        return self._cluster.user_kubeconfig(user, groups)

    def _run(self, name: str, *flags: str | Path) -> ServerProcess:
        path = f"{self._binaries['containerd-shim-runc-v2'].parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
        process = ServerProcess(
            name,
            [*self._enter, self._binaries[name], *flags],
            self._logs,
            {**os.environ, "PATH": path, "NO_PROXY": "*"},
        )
        self._running.callback(process.kill)
        return process

    @property
    def _enter(self) -> tuple[str, ...]:
        # The program is a child of nsenter, since a process cannot change its own process namespace: it ends with it.
        return "nsenter", f"--target={self._pid}", *NAMESPACES, "--", "setpriv", "--pdeathsig", "KILL", "--"

    def _answers_ctr(self) -> bool:
        try:
            self.run(self._binaries["ctr"], "version")
        except RuntimeError:
            return False
        return True

    @property
    def _path(self) -> str:
        return f"/api/v1/nodes/{self.name}"

    def _has_reported_since(self, moment: datetime) -> bool:
        nodes = self._cluster.api.list("/api/v1/nodes", fieldSelector=f"metadata.name={self.name}")
        beats = [c["lastHeartbeatTime"] for node in nodes for c in node["status"].get("conditions", ())]
        return any(datetime.fromisoformat(beat) >= moment for beat in beats)

    def _is_ready(self) -> bool:
        return is_usable(self._cluster.api.get(self._path))

    def _show_gpus(self) -> None:
        # Kubelet leaves what it does not know in capacity as it is, but for its first report.
        if self.gpus:
            patch = [{"op": "add", "path": f"/status/capacity/{GPU.replace('/', '~1')}", "value": str(self.gpus)}]
            self._cluster.api.patch(f"{self._path}/status", patch, kind="json")

    def _remove_control_groups(self) -> None:
        cgroups.remove(self._control_group)
        shutil.rmtree(self.folder / "containerd", ignore_errors=True)


def require_node_tools() -> None:
    """Check what cannot be built.

    Raises:
        ToolMissingError: the user is not root, or a Debian package is missing.

    """
    if os.geteuid():
        raise ToolMissingError("a real node needs root")
    missing = [str(path) for path in DEBIAN_FILES if not path.exists()]
    if missing:
        raise ToolMissingError(f"a real node needs {', '.join(missing)}: .ci/system-packages installs them")
