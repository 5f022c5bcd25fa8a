"""The product on this machine: a cluster, the operator by its chart, and the quickstart as a QLoRAJob, until Ctrl-C.

python tools/demo/demo.py QUICKSTART_DATA
"""

from __future__ import annotations

import shlex
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from cluster.scenarios.jobs import job_path
from demo.installed_cluster import CHART, InstalledCluster
from services.binaries import ToolMissingError, find_or_build
from services.tools import HELM

MANIFEST = CHART.parents[1] / "examples" / "cluster" / "quickstart.yaml"
LOOK_SECONDS = 3


def main() -> None:
    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # explicitly: a shell's background job ignores Ctrl-C
        signal.signal(ending, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(prefix="qlora-demo-") as folder:
            show(Path(folder), Path(sys.argv[1]))
    except KeyboardInterrupt:
        say("Gone.")
    except ToolMissingError as error:
        sys.exit(f"No demo: {error}")


def show(folder: Path, data: Path) -> None:
    say("Starting a cluster; the first time, Kubernetes is built from source, which takes 10 minutes.")
    with InstalledCluster(folder) as installed:
        bucket = installed.s3.folder_of(installed.s3.bucket("quickstart").removeprefix("s3://"))
        shutil.copytree(data, bucket, dirs_exist_ok=True)
        say("helm install …")
        installed.install()
        team = installed.tenant()
        tools = {str(binary.parent) for binary in (installed.cluster.binaries["kubectl"], find_or_build(HELM))}
        say(
            "The operator is ready. In another shell:",
            f"  export KUBECONFIG={shlex.quote(str(installed.cluster.kubeconfig))}",
            f"  export PATH={shlex.quote(':'.join(sorted(tools)))}:$PATH",
            f"  kubectl get qlorajobs,pods -n {team} --watch",
            f"kubectl apply -n {team} -f {MANIFEST.name} …",
        )
        installed.cluster.kubectl("apply", "-n", team, "-f", MANIFEST)
        follow(installed, team)
        say("Ctrl-C ends it.")
        while True:
            signal.pause()


def follow(installed: InstalledCluster, team: str) -> None:
    """Print the job's row as kubectl shows it, whenever it changes, until the job is over."""
    shown = ""
    while True:
        rows = installed.cluster.kubectl("get", "qlorajob", "quickstart", "-n", team).splitlines()
        row = rows[-1].rsplit(maxsplit=1)[0]
        if row != shown:
            say(*([rows[0]] if not shown else []), rows[-1])
            shown = row
        status = installed.cluster.api.get(job_path(team, "quickstart")).get("status", {})
        if status.get("state") in ("Succeeded", "Failed"):
            say(next(c["message"] for c in status["conditions"] if c["type"] == status["state"]))
            say(status.get("adapter", {}).get("uri", ""))
            return
        time.sleep(LOOK_SECONDS)


def say(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
