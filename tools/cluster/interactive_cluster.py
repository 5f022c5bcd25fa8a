"""A cluster to play with, until Ctrl-C: a real control plane, a real node that says it has GPUs, fake nodes if wanted.

python tools/cluster/interactive_cluster.py [--gpus 8] [--fake-nodes 0]
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from cluster.control_plane import ControlPlane, Settings
from cluster.node.images import BUSYBOX_IMAGE
from services.binaries import ToolMissingError, find_or_build
from services.tools import HELM

FAKE_TAINT = {"key": "kwok.x-k8s.io/node", "value": "fake", "effect": "NoSchedule"}
"""Or pods that should run for real could be placed on a node where nothing does."""


def main() -> None:
    parser = argparse.ArgumentParser(description="A cluster to play with, until Ctrl-C.")
    parser.add_argument("--gpus", type=int, default=8, help="that the real node says it has")
    parser.add_argument("--fake-nodes", type=int, default=0, help="nodes by kwok, 8 GPUs each, tainted")
    asked = parser.parse_args()
    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # explicitly: a shell's background job ignores Ctrl-C
        signal.signal(ending, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(prefix="qlora-cluster-") as folder:
            _play(Path(folder), asked.gpus, asked.fake_nodes)
    except KeyboardInterrupt:
        _say("Gone.")
    except ToolMissingError as error:
        sys.exit(f"No cluster: {error}")


def _play(folder: Path, gpus: int, fake_nodes: int) -> None:
    _say("Starting; the first time, Kubernetes is built from source, which takes 10 minutes.")
    with ControlPlane(folder, Settings(real_nodes=True)) as cluster:
        cluster.add_node(gpus=gpus)
        if fake_nodes:
            cluster.add_kwok_nodes(fake_nodes, taints=[FAKE_TAINT])
        tools = {str(binary.parent) for binary in (cluster.binaries["kubectl"], find_or_build(HELM))}
        _say(
            f"export KUBECONFIG={shlex.quote(str(cluster.kubeconfig))}",
            f"export PATH={shlex.quote(':'.join(sorted(tools)))}:$PATH",
            f"# try: kubectl run hello --image={BUSYBOX_IMAGE} --restart=Never -- echo hello",
            f"# logs: {cluster.logs}",
            "# Ctrl-C ends it",
        )
        while True:
            signal.pause()


def _say(*lines: str) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
