"""A real MLflow tracking server on loopback, with SQLite and a folder for artifacts.

It has a virtual environment of its own: the server's dependencies exclude versions that the trainer has.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

from services.binaries import tools_dir
from testing.ports import free_port
from testing.timeouts import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator

REQUIREMENTS = Path(__file__).with_name("mlflow-server.txt")
"""Pinned with hashes: ``uv pip compile --generate-hashes --universal --python-version 3.11``."""
STOP_SECONDS = 10


def find_or_install() -> Path:
    """Return the Python that has MLflow's server, installed if need be. Other processes that want it wait."""
    version = next(line.split()[0] for line in REQUIREMENTS.read_text().splitlines() if line.startswith("mlflow=="))
    folder = tools_dir() / version.replace("==", "-")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "installed").exists():
            uv = [Path(sys.executable).parent / "uv"]
            subprocess.run([*uv, "venv", "--quiet", "--clear", "--python", sys.executable, folder], check=True)
            install = [*uv, "pip", "install", "--quiet", "--python", folder / "bin" / "python", "--require-hashes"]
            subprocess.run([*install, "--requirement", REQUIREMENTS], check=True)
            (folder / "installed").touch()
    return folder / "bin" / "python"


class MLflowServer:
    """One server. ``stop`` and ``start`` keep port and content: to a client, the server was away.

    Args:
        folder: for the database, artifacts and the log; made if missing.

    """

    def __init__(self, folder: Path) -> None:
        self._python = find_or_install()
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the server and wait until it answers."""
        command = [
            *(self._python, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--backend-store-uri", f"sqlite:///{self._folder / 'mlflow.db'}", "--workers", "1"),
            *("--serve-artifacts", "--artifacts-destination", str(self._folder / "artifacts")),
        ]
        settings = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        environment = {**os.environ, **settings, "PYTHONWARNINGS": "ignore"}
        log = self._folder / "server.log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=output, env=environment, cwd=self._folder, start_new_session=True
            )
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"MLflow does not start: {log.read_text()[-2000:]}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Stop this server and its workers."""
        if self._process is None:
            return
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(STOP_SECONDS)
        self._process = None

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Let the server take connections and answer none."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self._process.pid, signal.SIGCONT)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False
