"""A real MLflow tracking server on loopback, with SQLite and a folder for artifacts.

It has a virtual environment of its own: the server's dependencies exclude versions that the trainer has.
"""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
from pathlib import Path

from services.binaries import tools_dir
from services.server import Server

REQUIREMENTS = Path(__file__).with_name("mlflow-server.txt")
"""Pinned with hashes: ``uv pip compile --generate-hashes --universal --python-version 3.11``."""


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


class MLflowServer(Server):
    """One server.

    Args:
        folder: for the database, artifacts and the log; made if missing.

    """

    def __init__(self, folder: Path) -> None:
        self._python = find_or_install()
        settings = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        super().__init__("mlflow", folder, variables={**settings, "PYTHONWARNINGS": "ignore"})

    def stop(self) -> None:
        """Stop this server and its workers, which its own process leaves behind."""
        if self._process is not None:
            self._process.signal_group(signal.SIGKILL)
        super().stop()

    def _command(self) -> list[str | Path]:
        return [
            *(self._python, "-m", "mlflow", "server", "--host", self.address, "--port", str(self.port)),
            *("--backend-store-uri", f"sqlite:///{self._folder / 'mlflow.db'}", "--workers", "1"),
            *("--serve-artifacts", "--artifacts-destination", str(self._folder / "artifacts")),
        ]
