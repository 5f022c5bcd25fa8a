"""Run a command in an image as the kubelet would run it in a pod of ours: not root, nothing writable but /tmp."""

from __future__ import annotations

import json
import subprocess
import uuid
from dataclasses import dataclass
from pathlib import Path

from testing.timeouts import PATIENCE_SECONDS

USER = 65532
RUN_SECONDS = PATIENCE_SECONDS


@dataclass(frozen=True)
class Outcome:
    code: int
    output: str
    """Text of stdout and stderr together."""


def run(root: Path, environment: list[str], command: list[str], bundle: Path) -> Outcome:
    """Run to the end. ``root`` is the image's root file system, ``environment`` the image's own."""
    bundle.mkdir()
    (bundle / "config.json").write_text(json.dumps(_specification(root, environment, command)))
    name = f"qlora-test-{uuid.uuid4().hex[:12]}"
    runc = ("runc", "--root", bundle / "state")
    try:
        done = subprocess.run(
            [*runc, "run", "--bundle", bundle, name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=RUN_SECONDS,
            check=False,
        )
    finally:
        subprocess.run([*runc, "delete", "--force", name], capture_output=True, check=False)
    return Outcome(done.returncode, done.stdout)


def _specification(root: Path, environment: list[str], command: list[str]) -> dict:
    """An OCI runtime specification: https://github.com/opencontainers/runtime-spec/blob/main/config.md"""
    own = ("pid", "network", "ipc", "uts", "mount")
    in_memory = {"type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=1777"]}
    return {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": USER, "gid": USER},
            "args": command,
            "env": environment,
            "cwd": "/tmp",
            "noNewPrivileges": True,
            "capabilities": {},
        },
        "root": {"path": str(root), "readonly": True},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/dev/shm", **in_memory},
            {"destination": "/tmp", **in_memory},
        ],
        "linux": {"namespaces": [{"type": kind} for kind in own]},
    }
