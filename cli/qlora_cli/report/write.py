"""Write the page of ``qlora report``."""

from __future__ import annotations

from pathlib import Path

from qlora_cli.report.facts import gather
from qlora_cli.report.page import page
from qlora_storage.local_paths import write_whole

PAGE = "report.html"


def write(run: str, runs_dir: Path, out: Path | None) -> Path:
    """Write the page of a run, by its name or folder, or of a published adapter by its folder; where it is.

    Raises:
        RunError: there is no such run, or it cannot be read.

    """
    facts, beside = gather(run, runs_dir)
    path = out or beside / PAGE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page(facts))
    return path
