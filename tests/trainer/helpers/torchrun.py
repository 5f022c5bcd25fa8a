"""Workers under torchrun: scripts that run cases on real ranks, and leave what they saw in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from testing.forks import start_program
from testing.shared import shared_folder
from testing.timeouts import PATIENCE_SECONDS

SEEN = "out.json"


def torchrun_once(
    factory: pytest.TempPathFactory, worker: str, ranks: int, models: Path, cases: dict[str, Any]
) -> dict[str, Any]:
    """Return what :func:`torchrun` returns, which all pytest workers share."""
    folder = shared_folder(
        factory, f"{Path(worker).stem}-{ranks}", lambda folder: torchrun(worker, ranks, models, cases, folder)
    )
    found: dict[str, Any] = json.loads((folder / SEEN).read_text())
    return found


def torchrun(worker: str, ranks: int, models: Path, cases: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run ``worker MODELS CASES.json OUT.json`` on ranks of this machine; what the first of them wrote."""
    given, seen, log = folder / "cases.json", folder / SEEN, folder / "log.txt"
    given.write_text(json.dumps(cases))
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    script = Path(__file__).with_name(worker)
    process = start_program([*command, str(script), str(models), str(given), str(seen)], log)
    try:
        code = process.wait(timeout=PATIENCE_SECONDS)
    finally:
        process.terminate()
    assert code == 0, log.read_text()[-3000:]
    found: dict[str, Any] = json.loads(seen.read_text())
    return found
