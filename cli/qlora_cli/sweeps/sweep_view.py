"""Tables and paragraphs of a sweep, on this machine or in a cluster. No decisions, no I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from qlora_api.sweep.parameters import Scale
from qlora_api.sweep.spec import AlgorithmType, ObjectiveMetric, QLoRASweepSpec
from qlora_api.sweep.trials import Trial, TrialState
from qlora_cli.text import units
from qlora_cli.text.paragraphs import LabelledLines
from qlora_sweep.decide import total_trials
from qlora_sweep.results import ranked

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from qlora_api.sweep.parameters import Parameter
    from qlora_cli.local.machine import World
    from qlora_cli.sweeps.sweep_folder import SweepRecord
    from qlora_sweep.decide import Finish


def plan(record: SweepRecord, world: World, folder: Path) -> LabelledLines:
    """Print what will happen."""
    spec = record.spec
    rows = [
        ("Sweep", f"{record.name} ({record.uid[:8]}), at most {total_trials(spec)} trials, one after the other"),
        ("Model", spec.template.spec.model.source),
        *settings(spec),
        ("Budget", f"{spec.budget_gpu_hours} {gpu_hours(world)}" if spec.budget_gpu_hours else ""),
        ("Machine", world.description),
        ("Trials", str(folder)),
        ("Output", spec.template.spec.output.destination),
    ]
    return LabelledLines([row for row in rows if row[1]])


def settings(spec: QLoRASweepSpec) -> list[tuple[str, str]]:
    """Return what is searched for and how, as labels and values."""
    return [
        ("Parameters", "; ".join(_values(parameter) for parameter in spec.parameters)),
        ("Algorithm", _algorithm(spec)),
        ("Objective", f"{'highest' if spec.objective.metric.is_maximized else 'lowest'} {spec.objective.metric}"),
    ]


def gpu_hours(world: World) -> str:
    return "GPU-hours" if world.device == "CUDA" else "CPU-rank-hours"


def _values(parameter: Parameter) -> str:
    if parameter.range is not None:
        scale = ", log" if parameter.range.scale is Scale.LOG else ""
        return f"{parameter.path} {parameter.range.min} to {parameter.range.max}{scale}"
    return f"{parameter.path} {', '.join(parameter.texts)}"


def _algorithm(spec: QLoRASweepSpec) -> str:
    seed = "" if spec.algorithm.type is AlgorithmType.GRID else f", seed {spec.algorithm.seed}"
    stopping = spec.early_stopping
    if stopping is None:
        return f"{spec.algorithm.type}{seed}"
    return f"{spec.algorithm.type}{seed}; from step {stopping.min_steps} on one in {stopping.reduction_factor} goes on"


def trial_begins(trial: Trial, total: int) -> str:
    """Return which trial begins or resumes, and how far it goes."""
    settings = ", ".join(f"{path} {text}" for path, text in trial.parameters.items())
    begins = f" from step {trial.step}" if trial.step else ""
    until = f" to step {trial.pause_at_step}" if trial.pause_at_step is not None else " to the end"
    return f"Trial {trial.number} ({trial.number + 1} of {total}): {settings};{begins}{until}"


def trials(found: Sequence[Trial], spec: QLoRASweepSpec, best: int | None = None) -> Table:
    """Return one row for each trial: those that went furthest first, and of these the best first."""
    metric = spec.objective.metric
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("Trial", no_wrap=True)
    for parameter in spec.parameters:
        table.add_column(parameter.path.rpartition(".")[2])
    for head in ("State", "Step", str(metric), "Time"):
        table.add_column(head, justify="left" if head == "State" else "right")
    order = {trial.number: place for place, trial in enumerate(ranked(found, metric))}
    ended = TrialState.SUCCEEDED
    for trial in sorted(found, key=lambda t: (t.state is not ended, -t.step, order[t.number])):
        mark = " *" if trial.number == best else ""
        table.add_row(
            f"{trial.name}{mark}",
            *(trial.parameters[parameter.path] for parameter in spec.parameters),
            str(trial.state),
            units.number(trial.step),
            _figure(trial.value, metric),
            units.duration(trial.gpu_seconds),
        )
    return table


def _figure(value: str | None, metric: ObjectiveMetric) -> str:
    if value is None:
        return ""
    return units.size(int(value)) if metric is ObjectiveMetric.PEAK_MEMORY else value


def result(end: Finish, found: Sequence[Trial], uri: str, spent: str, commands: Sequence[str]) -> Group:
    """Return the end of a sweep that succeeded."""
    best = next(trial for trial in found if trial.number == end.best)
    rows = [
        ("Best", end.message),
        ("Adapter", best.adapter.uri if best.adapter else ""),
        ("Result", uri),
        ("Steps", f"{units.number(sum(trial.step for trial in found))} of all trials together"),
        ("Time", spent),
    ]
    lines = (Text(f"  {command}", no_wrap=True, overflow="ignore") for command in commands)
    return Group("", LabelledLines([row for row in rows if row[1]]), "", Text("Next:", style="dim"), *lines)
