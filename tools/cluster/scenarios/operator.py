"""The operator as a process beside a cluster, started, killed, stopped, asked for its metrics."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, Self

import httpx
import yaml

from cluster.processes import ServerProcess
from testing.ports import free_port
from testing.timeouts import PATIENCE_SECONDS

if TYPE_CHECKING:
    from pathlib import Path

READY_SECONDS = PATIENCE_SECONDS
STOP_SECONDS = 20
TRAINER_IMAGE = "qlora-trainer:test"


class OperatorProcess:
    """``python -m qlora_operator`` with settings of the test's own. A context manager.

    Args:
        folder: for its settings and its log.
        kubeconfig: whose rights it has.
        settings: over the defaults below; nested groups are merged.

    """

    program: tuple[str | Path, ...] = ("-m", "qlora_operator")
    """Arguments of the interpreter, before the operator's own."""

    def __init__(self, folder: Path, kubeconfig: Path, **settings: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self._kubeconfig = kubeconfig
        self._config, self.log = folder / "operator.yaml", folder / "operator.log"
        merged: dict[str, Any] = {
            "metricsPort": self.port,
            "progressSeconds": 0.5,
            **settings,
            "prepare": {"enabled": False, **settings.get("prepare", {})},
            "trainer": {"image": TRAINER_IMAGE, "nodeLostSeconds": 1, **settings.get("trainer", {})},
        }
        self._config.write_text(yaml.safe_dump(merged))
        self._process: ServerProcess | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it and wait until it watches everything."""
        self.spawn()
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        assert self._process is not None
        self._process.wait_until(self._is_ready, READY_SECONDS)

    def spawn(self) -> None:
        """Start it and do not wait."""
        self._process = ServerProcess(
            "operator",
            [sys.executable, *self.program, "--config", self._config],
            self.log.parent,
            {**os.environ, "KUBECONFIG": str(self._kubeconfig), "NO_PROXY": "*"},
        )

    def stop(self) -> int:
        """SIGTERM, and wait; its exit code."""
        self.terminate()
        code = self.wait(0)
        self._process = None
        return code

    def terminate(self) -> None:
        """SIGTERM, and wait until it has ended."""
        assert self._process is not None
        self._process.terminate(STOP_SECONDS)

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.running

    def wait(self, seconds: float) -> int:
        """Wait until it ends by itself; its exit code."""
        assert self._process is not None
        return self._process.wait(seconds)

    def healthz(self) -> tuple[int, str]:
        """Return what a liveness probe gets: status and text."""
        answer = httpx.get(f"http://127.0.0.1:{self.port}/healthz", timeout=5, trust_env=False)
        return answer.status_code, answer.text

    def kill(self) -> None:
        """SIGKILL: it dies between any two instructions."""
        if self._process is not None:
            self._process.kill()
            self._process = None

    def metrics(self) -> dict[str, float]:
        """Every sample by ``name{label="value",…}``; waited for, where it was just started again."""
        self.wait_until_ready()
        text = httpx.get(f"http://127.0.0.1:{self.port}/metrics", trust_env=False).text
        rows = (line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in rows}

    def metric_sum(self, name: str) -> float:
        """Return the sum of a metric over its labels."""
        return sum(value for sample, value in self.metrics().items() if sample.partition("{")[0] == name)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/readyz", timeout=2, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False
