"""Write the page and the figures of a sweep for ``qlora report``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table

from qlora_api.sweep.result import RESULT_FILE, RESULT_SCHEMA
from qlora_api.sweep.trials import TrialState
from qlora_cli.local.processes import in_use
from qlora_cli.local.run_folder import RUN_RECORD, SWEEP_RECORD, RunError
from qlora_cli.report.sweep_figures import TrialHistory, sweep_figures
from qlora_cli.report.sweep_page import PARAMETER_HEADS, comparison, parameter_rows, sweep_page
from qlora_cli.sweeps import sweep_view
from qlora_cli.sweeps.sweep_folder import SweepFolder, last_message, trial_of, values_by_step
from qlora_storage.local_paths import read_regular, write_whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rich.console import RenderableType

    from qlora_api.sweep.spec import QLoRASweepSpec
    from qlora_cli.local.run_folder import RunFolder, RunRecord
    from qlora_cli.report.sweep_figures import SweepFigures
    from qlora_cli.sweeps.sweep_folder import SweepRecord

RECORDS = (RUN_RECORD, SWEEP_RECORD)


def find_sweep(name: str, runs_dir: Path) -> SweepFolder | None:
    """Return the folder of a sweep, by its name or path; None where that is none.

    Raises:
        RunError: its record is damaged, or it is the destination of a sweep.

    """
    for folder in (SweepFolder(place.absolute()) for place in (runs_dir / name, Path(name))):
        if sweep := _sweep_of_result(folder.path / RESULT_FILE):
            raise RunError(
                f"{folder.path} is the destination of sweep {sweep}: name its folder, such as {runs_dir / sweep}"
            )
        if folder.read() is not None:
            return folder
    return None


def _sweep_of_result(path: Path) -> str | None:
    """Return the sweep whose result a file is; None where it is none."""
    found = _read_object(path)
    return str(found.get("sweep")) if found.get("schema") == RESULT_SCHEMA else None


def write_sweep(folder: SweepFolder, out: Path) -> tuple[Path, RenderableType]:
    """Write the page, and beside it the figures as JSON; return where the figures are, and what to print.

    Raises:
        RunError: the sweep cannot be read, or the figures would take the place of the page or of another file.

    """
    record = folder.read()
    assert record is not None
    runs = [*folder.runs()]
    histories = [*_histories(runs, record)]
    figures = sweep_figures(record.name, record.uid, record.spec, histories)
    hours = "GPU-hours" if any(run.device == "CUDA" for _, _, run in runs) else "CPU-rank-hours"
    return write_figures(figures, record.spec, hours, out)


def write_figures(figures: SweepFigures, spec: QLoRASweepSpec, hours: str, out: Path) -> tuple[Path, RenderableType]:
    """Write the page of a sweep's figures, and them beside it as JSON; ``hours`` names the unit of time.

    Raises:
        RunError: the figures would take the place of the page or of another file.

    """
    figures_path = _figures_path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, sweep_page(figures, spec, hours))
    write_whole(figures_path, figures.model_dump_json(by_alias=True, indent=2) + "\n")
    return figures_path, _summary(figures, spec, hours)


def _figures_path(out: Path) -> Path:
    """Return where the figures of a page go.

    Raises:
        RunError: they would take the place of the page, of a record, or of a file that holds no figures.

    """
    path = out.with_suffix(".json")
    if path == out or path.name in RECORDS:
        raise RunError(
            f"--out {out}: the figures go to {path}; use a name that ends in .html, other than run.html and sweep.html"
        )
    if path.exists() and "comparedAtStep" not in _read_object(path):  # as figures of all versions have it
        raise RunError(f"--out {out}: the figures go to {path}, which holds something else; use another name")
    return path


def _read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty where there is none."""
    try:
        found = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _histories(runs: Iterable[tuple[int, RunFolder, RunRecord]], record: SweepRecord) -> Iterator[TrialHistory]:
    for number, run, found in runs:
        trial = trial_of(number, found, record.spec, last_message(run, found))
        if trial.state is TrialState.SUSPENDED and in_use(run.path):
            trial = trial.model_copy(update={"state": TrialState.RUNNING})
        yield TrialHistory(trial, values_by_step(run, found, record.spec.objective.metric))


def _summary(figures: SweepFigures, spec: QLoRASweepSpec, hours: str) -> RenderableType:
    best = next((trial.number for trial in figures.trials if trial.name == figures.best), None)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for head in PARAMETER_HEADS:
        table.add_column(head, justify="left" if head in ("Parameter", "Value") else "right")
    for row in parameter_rows(figures):
        table.add_row(*row)
    return Group(sweep_view.trials(figures.trials, spec, best), "", table, "", comparison(figures, hours))
