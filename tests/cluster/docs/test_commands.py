"""The documents' commands for clusters: real helm, kubectl, qlora, operator and S3, and pods on fake nodes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import pytest

from cluster.control_plane import ControlPlane, Settings
from cluster.scenarios.jobs import GROUP, in_state, job_path
from cluster.scenarios.operator import OperatorProcess
from cluster.scenarios.script import pods_do
from docs.blocks import PAGES, REPOSITORY, missing, shell_blocks
from fixtures import skip_unless_ci
from services.binaries import ToolMissingError, find_or_build
from services.tools import HELM
from services.versitygw import VersityGateway

JOB, BUCKET = "quickstart", "quickstart"
SECONDS = 120
TUTORIAL = REPOSITORY / "docs" / "tutorials" / "on-your-cluster.md"
WITH_BLOCKS = [page for page in PAGES if shell_blocks(page, "cluster")]
INSTALLING = [page for page in WITH_BLOCKS if page.parent.name != "guides" and "helm install" in page.read_text()]
LAST = [REPOSITORY / "docs" / "guides" / "operations.md"]
"""It ends with the operator's end."""


def in_order() -> list[Path]:
    """Those that install come first, and of them the tutorial last: what it installs is what the others find."""
    first = sorted(INSTALLING, key=lambda page: page == TUTORIAL)
    return [*first, *(page for page in WITH_BLOCKS if page not in (*first, *LAST)), *LAST]


class ReaderCluster:
    """A cluster, a bucket, and a folder such as a reader has. A context manager."""

    def __init__(self, folder: Path) -> None:
        self.cluster = ControlPlane(folder / "cluster", Settings(quota_sync_seconds=2))
        self.s3 = VersityGateway(folder / "s3")
        self.programs = folder / "bin"
        self.folder, self.namespace = folder / "clone", ""
        self._helm = find_or_build(HELM)
        self._owned, self._scripts = ExitStack(), ExitStack()
        self._operator: OperatorProcess | None = None

    def __enter__(self) -> Self:
        with self._owned:
            self._owned.enter_context(self.cluster)
            self._owned.enter_context(self.s3)
            self.cluster.add_kwok_nodes(2)
            for name in ("examples", "charts"):
                shutil.copytree(REPOSITORY / name, self.folder / name)
            self._lay_data()
            self._publish()
            self.programs.mkdir()
            for binary in (self._helm, self.cluster.binaries["kubectl"]):
                (self.programs / binary.name).symlink_to(binary)
            self._owned.callback(self._end)
            self._owned = self._owned.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._owned.close()

    def _end(self) -> None:
        self._scripts.close()
        if self._operator:
            self._operator.kill()

    def _lay_data(self) -> None:
        data = self.folder / "runs" / "quickstart-data"
        (data / "base").mkdir(parents=True)
        for name in ("base/config.json", "train.jsonl", "eval.jsonl"):
            (data / name).write_text("{}\n")

    def _publish(self) -> None:
        """Publish what a trainer would have: the pods of fake nodes leave nothing."""
        destination = Path(self.s3.folder_of(self.s3.bucket(BUCKET).removeprefix("s3://"))) / "adapters" / JOB
        adapter = destination / "0a1b2c3d-attempt-1" / "adapter"
        adapter.mkdir(parents=True)
        files = []
        for name, content in (("adapter_config.json", b"{}"), ("adapter_model.safetensors", b"weights")):
            (adapter / name).write_bytes(content)
            path = (adapter / name).relative_to(destination).as_posix()
            files.append({"path": path, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()})
        folder = adapter.relative_to(destination).as_posix()
        manifest = {"schema": "qlora.dev/manifest/v1", "job": JOB, "adapter": folder, "files": files}
        (destination / "manifest.json").write_text(json.dumps(manifest))
        self.adapter = {
            "uri": f"s3://{BUCKET}/adapters/{JOB}/{manifest['adapter']}",
            "manifestUri": f"s3://{BUCKET}/adapters/{JOB}/manifest.json",
            "manifestSha256": hashlib.sha256((destination / "manifest.json").read_bytes()).hexdigest(),
        }

    # -------------------------------------------------------------------------------------------------------- one page

    def turn_to(self, page: Path) -> None:
        """An empty namespace, which is the reader's; and no operator where the page installs one."""
        self._scripts.close()
        if page in INSTALLING:
            self._remove_operator()
        self.namespace = self.cluster.create_namespace("docs")

    def _remove_operator(self) -> None:
        if self._operator:
            self._operator.kill()
            self._operator = None
        for line in self.shell("helm list --all-namespaces --output json").stdout.splitlines():
            for release in json.loads(line):
                self.shell(f"helm uninstall {release['name']} --namespace {release['namespace']} --wait")
        self.shell("kubectl delete crd qlorajobs.qlora.dev qlorasweeps.qlora.dev --ignore-not-found")

    def operator_begins(self) -> None:
        """As its pod would, if its node were no fake."""
        self.cluster.api.wait_for(f"{GROUP}/qlorajobs", bool, what="QLoRAJobs are served")
        if self._operator is None:
            self._operator = OperatorProcess(self.programs.parent / "operator", self.cluster.kubeconfig)
            self._operator.start()
        if not self._scripts._exit_callbacks:
            self.bring_about("")

    def bring_about(self, state: str) -> None:
        """Have a job quickstart in a state; none: what it will do once it is applied.

        Its first attempt runs until it is stopped in state Running, and the next one ends well.
        """
        self._scripts.close()
        word = {"exitCode": 0, "reason": "Completed", "message": "step 9 of 9", "adapter": self.adapter}
        done = {"run-seconds": 1, "exit-code": 0, "termination-message": json.dumps(word)}
        error = {"exitCode": 40, "reason": "UserError", "message": "no such column"}
        fails = {"run-seconds": 1, "exit-code": 40, "termination-message": json.dumps(error)}
        first = {"Running": {}, "Failed": fails}.get(state, done)
        for attempt, does in ((1, first), (2, done)):
            if does:
                script = pods_do(self.cluster.api, self.namespace, does, job=JOB, attempt=attempt)
                self._scripts.enter_context(script)
        if state:
            path = job_path(self.namespace, JOB)
            literals = " ".join(f"--from-literal {name}={value}" for name, value in self.s3.environment.items())
            self.shell(f"kubectl create secret generic s3 {literals}")
            self.shell(f"kubectl delete qlorajob {JOB} --ignore-not-found")
            applied = self.shell("kubectl apply --filename examples/cluster/quickstart.yaml")
            assert applied.returncode == 0, applied.stdout
            self.cluster.api.wait_for(path, in_state(state), seconds=60)

    def shell(self, text: str) -> subprocess.CompletedProcess[str]:
        kubeconfig = self.cluster.user_kubeconfig("reader", ["system:masters"], self.namespace or "default")
        places = {
            f"HELM_{kind}_HOME": str(self.programs.parent / "helm" / kind) for kind in ("CACHE", "CONFIG", "DATA")
        }
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=self.folder,
            env={
                **os.environ,
                **self.s3.environment,
                **places,
                "PATH": f"{self.programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
                "KUBECONFIG": str(kubeconfig),
                "NO_PROXY": "*",
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
            check=False,
        )


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    try:
        made = ReaderCluster(tmp_path_factory.mktemp("docs"))
    except ToolMissingError as error:
        skip_unless_ci(str(error))
    with made:
        yield made


@pytest.mark.parametrize("page", in_order(), ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_commands_for_a_cluster_do_what_the_page_says(page, reader):
    reader.turn_to(page)
    for block, shown in shell_blocks(page, "cluster"):
        if state := block.said("state"):
            reader.bring_about(state)
        done = reader.shell(block.text)
        assert done.returncode == block.exit_code, f"{block.where}\n{done.stdout}"
        assert not missing(shown, done.stdout), f"{block.where}\n{done.stdout}"
        if "helm install" in block.text:
            reader.operator_begins()
