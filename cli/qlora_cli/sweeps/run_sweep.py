"""``qlora sweep``: run the trials of a sweep on this machine, one after the other, until it is over.

What comes next is decided by ``qlora_sweep``, for this and for a cluster alike; a trial is a run of ``qlora run``. All
state is in the trials' folders, so the same command resumes a sweep that was stopped or killed.
"""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from qlora_api.contract import ExitCode
from qlora_api.errors import FieldError, ManifestError
from qlora_api.job import ObjectMeta, QLoRAJob
from qlora_api.sweep.result import RESULT_FILE, SweepResult
from qlora_api.sweep.spec import AlgorithmType
from qlora_api.sweep.trials import trial_spec
from qlora_cli.local import local_spec, machine, run_folder
from qlora_cli.local.attempt_loop import INTERRUPTED, AttemptSettings, LocalRun, next_commands
from qlora_cli.local.run import (
    PATIENCE_SECONDS,
    put_manifest_aside,
    read_record,
    release_claim,
    require_adapter,
    require_even_split,
)
from qlora_cli.local.run_folder import RunError
from qlora_cli.local.trainer_process import cache_dir, stop_on_signals
from qlora_cli.manifest import sweep_manifest
from qlora_cli.sweeps import sweep_view
from qlora_cli.sweeps.sweep_folder import SweepFolder, new_record, read_trials, resumed, trial_of
from qlora_storage.errors import JobError, NotFoundError
from qlora_storage.object_store import is_place_in, open_store
from qlora_sweep.decide import Create, Finish, Hold, decide, total_trials
from qlora_sweep.results import used_gpu_hours
from qlora_sweep.suggest import suggest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from qlora_api.sweep.spec import QLoRASweepSpec
    from qlora_api.sweep.sweep import QLoRASweep
    from qlora_api.sweep.trials import Trial
    from qlora_cli.local.machine import Machine, World
    from qlora_cli.local.run_folder import RunRecord
    from qlora_cli.local.trainer_process import Commands, StopRequests
    from qlora_cli.sweeps.sweep_folder import SweepRecord
    from qlora_storage.object_store import Store
    from qlora_sweep.decide import Resume

DESTINATION = "spec.template.spec.output.destination"
FAILED = 1
"""The sweep is over without an adapter."""
HELD = int(ExitCode.PREEMPTED)
"""The budget is used up; all trials have checkpoints."""


@dataclass(frozen=True)
class SweepRequest:
    """The command line of one call."""

    manifest: Path
    runs_dir: Path = Path("runs")
    ranks: int | None = None
    fresh: bool = False


@dataclass(frozen=True)
class SweepSettings:
    """All that stays the same over the trials of one call."""

    record: SweepRecord
    folder: SweepFolder
    world: World
    commands: Commands
    console: Console

    @property
    def spec(self) -> QLoRASweepSpec:
        return self.record.spec


def run_sweep(request: SweepRequest, console: Console, commands: Commands, here: Machine | None = None) -> int:
    """Run or resume a sweep on this machine; return the exit code of the call.

    Raises:
        RefusedError, ManifestError, FieldError: the manifest cannot be run here.
        RunError: the sweep is in use, another one, or damaged.

    """
    sweep = sweep_manifest.one_sweep(request.manifest)
    world = machine.choose_world(here or machine.look(), request.ranks)
    name, spec = sweep.metadata.name, _localized(sweep)
    require_even_split(spec.template.spec, world)
    _require_optuna(spec)
    with run_folder.locked(request.runs_dir, name), stop_on_signals() as stop:
        folder = SweepFolder(request.runs_dir.absolute() / name)
        _require_destination_elsewhere(spec, folder)
        record = _open(folder, name, spec, console, fresh=request.fresh)
        _require_own_destination(record)
        folder.write(record)
        console.print(sweep_view.plan(record, world, folder.trials), crop=False)
        return _LocalSweep(SweepSettings(record, folder, world, commands, console), stop).run()


def _localized(sweep: QLoRASweep) -> QLoRASweepSpec:
    """Return the spec with the paths of this machine."""
    template = sweep.spec.template
    try:
        spec = local_spec.localize(template.spec, Path.cwd())
    except ManifestError as error:
        raise ManifestError(
            [FieldError(f"spec.template.{each.field}", each.value, each.allowed) for each in error.errors]
        ) from None
    return sweep.spec.model_copy(update={"template": template.model_copy(update={"spec": spec})})


def _open(folder: SweepFolder, name: str, spec: QLoRASweepSpec, console: Console, *, fresh: bool) -> SweepRecord:
    """Return the record to go on with; a new one where there is none, or the sweep there is put aside."""
    run_folder.RunFolder(folder.path).require_not(run_folder.RUN_RECORD, "the run of a job")
    record = folder.read() if not fresh else None
    if record is not None:
        return resumed(folder, record, spec)
    if folder.path.exists():
        _put_published_aside(folder, console)
        moved = folder.move_aside(run_folder.now())
        console.print(f"The folder of an earlier sweep is now {moved}", soft_wrap=True)
    return new_record(name, spec, run_folder.now())


def _put_published_aside(folder: SweepFolder, console: Console) -> None:
    """Rename what the sweep before has published, its trials' manifests and its result, and release their claims."""
    for path in sorted(folder.trials.glob(f"*/{run_folder.RUN_RECORD}")):
        run = run_folder.RunFolder(path.parent)
        try:
            trial = run.read()
        except RunError:  # unreadable; where it published cannot be told
            continue
        if trial is not None:
            put_manifest_aside(run, trial.spec.output.destination, console)
            release_claim(run)
    _put_result_aside(folder, console)


def _require_optuna(spec: QLoRASweepSpec) -> None:
    """Check that Optuna is installed where the sweep needs it; it comes with an extra of its own.

    Raises:
        RunError: it is not.

    """
    if spec.algorithm.type is not AlgorithmType.GRID and importlib.util.find_spec("optuna") is None:
        raise RunError(
            f"spec.algorithm.type {spec.algorithm.type} needs Optuna, which is not installed here: install qlora with "
            'the extras "trainer" and "sweep", or set Grid'
        )


# ------------------------------------------------------------------------------------------------------------ the loop


class _LocalSweep:
    """One call of 'qlora sweep': goes on until the sweep is over, held or told to stop."""

    def __init__(self, setting: SweepSettings, stop: StopRequests) -> None:
        self._setting = setting
        self._stop = stop

    def run(self) -> int:
        """Return the exit code of the call."""
        setting = self._setting
        while True:
            trials = read_trials(setting.folder, setting.spec)
            decision = decide(setting.spec, trials, suggest)
            if isinstance(decision, Finish):
                return self._finish(decision, trials)
            if isinstance(decision, Hold) or self._stop.over_budget:
                return self._held(trials)
            self._run_trial(decision.actions[0], trials)
            if self._stop.asked:
                setting.console.print("Stopped. The same command resumes this sweep.", style="bold")
                return INTERRUPTED

    def _run_trial(self, action: Create | Resume, trials: Sequence[Trial]) -> None:
        """Run a trial until it ends, is suspended for a comparison, or is told to stop."""
        setting = self._setting
        spec, run = setting.spec, setting.folder.trial(action.number)
        with run_folder.locked(setting.folder.trials, run.path.name) as lock:
            record = self._record(action)
            run.write(record)
            setting.console.print(
                sweep_view.trial_begins(trial_of(action.number, record, spec, None), total_trials(spec)),
                style="bold",
                soft_wrap=True,
            )
            LocalRun(
                AttemptSettings(
                    QLoRAJob(metadata=ObjectMeta(name=record.name), spec=record.spec),
                    setting.world,
                    run,
                    cache_dir(),
                    setting.commands,
                    lock,
                    setting.console,
                    seconds=_seconds_left(spec, trials, setting.world),
                    brief=True,
                ),
                record,
                self._stop,
            ).run()

    def _record(self, action: Create | Resume) -> RunRecord:
        """Return the record of a trial's run, a new one for a new trial."""
        spec, run = self._setting.spec, self._setting.folder.trial(action.number)
        if isinstance(action, Create):
            made = trial_spec(spec, run.path.name, action.values)
            record = run_folder.new_record(run.path.name, made, run_folder.now())
        else:
            found = read_record(run)
            assert found is not None
            record = found
        update = {"pause_at_step": action.pause_at_step, "device": self._setting.world.device}
        return record.model_copy(update=update)

    def _held(self, trials: Sequence[Trial]) -> int:
        """Say that the budget is used up, the only reason to hold a sweep here."""
        spec, console = self._setting.spec, self._setting.console
        used = f"{used_gpu_hours(trials):.3g} of {spec.budget_gpu_hours} {sweep_view.gpu_hours(self._setting.world)}"
        console.print(sweep_view.trials(trials, spec), crop=False)
        console.print(
            f"The budget is used up: {used}. With a larger spec.budgetGpuHours the same command resumes this sweep.",
            style="bold",
            soft_wrap=True,
        )
        return HELD

    def _finish(self, end: Finish, trials: Sequence[Trial]) -> int:
        setting = self._setting
        setting.console.print(sweep_view.trials(trials, setting.spec, end.best), crop=False)
        if not end.succeeded:
            setting.console.print(f"Failed: {end.message}", style="bold red", soft_wrap=True)
            return FAILED
        best = next(trial for trial in trials if trial.number == end.best)
        require_adapter(best.name, best.adapter)
        uri = _publish(setting.record, best, trials)
        spent = f"{used_gpu_hours(trials):.3g} {sweep_view.gpu_hours(setting.world)}"
        commands = next_commands(setting.folder.trial(best.number).path)
        setting.console.print(sweep_view.result(end, trials, uri, spent, commands), crop=False)
        return int(ExitCode.DONE)


def _seconds_left(spec: QLoRASweepSpec, trials: Sequence[Trial], world: World) -> float:
    """Return how long a trial may take within the budget."""
    if spec.budget_gpu_hours is None:
        return math.inf
    return (float(spec.budget_gpu_hours) - used_gpu_hours(trials)) * 3600 / world.ranks


# ---------------------------------------------------------------------------------------------------------- the result


def _store(spec: QLoRASweepSpec) -> Store:
    return open_store(spec.template.spec.output.destination, DESTINATION, PATIENCE_SECONDS)


def _result_uid(store: Store) -> str | None:
    """Return the sweep whose result is at the destination; None where there is none."""
    try:
        found = json.loads(store.get(RESULT_FILE))
        return str(found.get("uid", "unknown"))
    except NotFoundError:
        return None
    except (ValueError, AttributeError):
        return "unknown"


def _require_destination_elsewhere(spec: QLoRASweepSpec, folder: SweepFolder) -> None:
    """Check that the result of the sweep does not take the place of its record.

    Raises:
        FieldError: the destination is the sweep's own folder, or in it.

    """
    destination = spec.template.spec.output.destination
    if is_place_in(destination, str(folder.path), DESTINATION):
        raise FieldError(DESTINATION, destination, f"must not be in {folder.path}, the folder of the sweep itself")


def _require_own_destination(record: SweepRecord) -> None:
    """Check before any trial that the destination has no other sweep's result.

    Raises:
        RunError: it has, or cannot be read.

    """
    try:
        store = _store(record.spec)
        uid = _result_uid(store)
    except JobError as error:
        raise RunError(str(error)) from None
    if uid not in (None, record.uid):
        raise RunError(
            f"{DESTINATION}: {store.uri(RESULT_FILE)} is the result of sweep {uid}: choose another destination, or "
            "--fresh where it was a sweep of this name and folder"
        )


def _put_result_aside(folder: SweepFolder, console: Console) -> None:
    """Rename the result that the sweep before has left at its destination.

    Raises:
        RunError: the destination cannot be read or written.

    """
    try:
        earlier = folder.read()
    except RunError:  # unreadable; whose result that is cannot be told
        return
    if earlier is None:
        return
    try:
        store = _store(earlier.spec)
        if _result_uid(store) != earlier.uid:
            return
        kept = f"sweep-{earlier.uid[:8]}.json"
        store.put(kept, store.get(RESULT_FILE))
        store.delete(RESULT_FILE)
    except JobError as error:
        raise RunError(str(error)) from None
    console.print(f"{store.uri(RESULT_FILE)} is now {kept}", soft_wrap=True)


def _publish(record: SweepRecord, best: Trial, trials: Sequence[Trial]) -> str:
    """Write the result to the destination, unless it is there already; return its address.

    Raises:
        RunError: the destination cannot be written.

    """
    result = SweepResult(
        sweep=record.name,
        uid=record.uid,
        created=record.created,
        finished=run_folder.now(),
        best=best,
        trials=[*trials],
        spec=record.spec,
    )
    try:
        store = _store(record.spec)
        if not _has_result(store, result):
            store.put(RESULT_FILE, result.to_bytes())
    except JobError as error:
        raise RunError(str(error)) from None
    return store.uri(RESULT_FILE)


def _has_result(store: Store, result: SweepResult) -> bool:
    """Return whether the destination has this result, whenever it was written."""
    try:
        found = SweepResult.model_validate_json(store.get(RESULT_FILE))
    except (NotFoundError, ValidationError):
        return False
    return found.model_copy(update={"finished": result.finished}).to_bytes() == result.to_bytes()
