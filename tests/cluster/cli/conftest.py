"""The command line against a real API server, with the operator running and fake nodes playing the pods."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from cluster.scenarios.operator import OperatorProcess
from qlora_cli.app import app

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster.control_plane import ControlPlane


@dataclass(frozen=True)
class Said:
    """Output of a command, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass(frozen=True)
class Qlora:
    """The command line as a user with a kubeconfig and a namespace calls it, in a folder."""

    kubeconfig: Path
    namespace: str
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return {"KUBECONFIG": str(self.kubeconfig), "NO_PROXY": "*"}

    def __call__(self, *arguments: object, stdin: str = "") -> Said:
        """In this process, which has loaded everything."""
        with chdir(self.folder):
            words = [*map(str, arguments), "-n", self.namespace]
            done = CliRunner().invoke(app, words, input=stdin, env=self.environment)
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        return Said(done.exit_code, done.stdout, done.stderr)

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        """As a process, for what does not end by itself."""
        return subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "qlora_cli", *map(str, arguments), "-n", self.namespace],
            env={**os.environ, **self.environment},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture(scope="module")
def served_namespace(crd_cluster: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A namespace of the module's, with an operator that serves it alone."""
    name = crd_cluster.create_namespace("cli")
    with OperatorProcess(tmp_path_factory.mktemp("operator"), crd_cluster.kubeconfig, namespaces=[name]):
        yield name
    crd_cluster.delete_namespace(name)


@pytest.fixture
def qlora_class() -> type[Qlora]:
    """For a test that has a cluster of its own."""
    return Qlora


@pytest.fixture
def qlora(crd_cluster: ControlPlane, served_namespace: str, tmp_path: Path) -> Qlora:
    """Called by the administrator, in a folder of the test's own."""
    return Qlora(crd_cluster.kubeconfig, served_namespace, tmp_path)


@pytest.fixture
def manifest(tmp_path: Path):
    """Write a manifest; its file's name."""
    import yaml

    from cluster.scenarios.jobs import qlora_job

    def write(name: str, **groups: Any) -> str:
        body = qlora_job(name, **groups)
        del body["metadata"]["namespace"]
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(body))
        return f"{name}.yaml"

    return write
