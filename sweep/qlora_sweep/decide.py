"""Decide what a sweep does next, from its spec and its trials alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_api.status import Reason
from qlora_api.sweep.check import grid_size
from qlora_api.sweep.spec import AlgorithmType, QLoRASweepSpec
from qlora_api.sweep.trials import Trial, TrialState
from qlora_sweep.grid import Suggest, texts_of
from qlora_sweep.halving import first_pause, promotions
from qlora_sweep.results import Result, best_of, has_result, used_gpu_hours, value_of


@dataclass(frozen=True)
class Create:
    """Create a trial."""

    number: int
    values: Mapping[str, Any]
    """Value of each parameter by path."""
    pause_at_step: int | None


@dataclass(frozen=True)
class Resume:
    """Resume a suspended trial from its checkpoint."""

    number: int
    pause_at_step: int | None


@dataclass(frozen=True)
class Proceed:
    """Create and resume trials; with no actions, wait for those that run."""

    actions: tuple[Create | Resume, ...]


@dataclass(frozen=True)
class Hold:
    """Suspend what runs and create nothing."""

    reason: Reason
    message: str
    suspend: tuple[int, ...]


@dataclass(frozen=True)
class Finish:
    """The sweep is over. Trials that are suspended stay so, with their checkpoints."""

    succeeded: bool
    message: str
    best: int | None
    suspend: tuple[int, ...] = ()


Decision = Proceed | Hold | Finish


def total_trials(spec: QLoRASweepSpec) -> int:
    """Return how many trials there will be."""
    return grid_size(spec) if spec.algorithm.type is AlgorithmType.GRID else spec.max_trials


def decide(spec: QLoRASweepSpec, trials: Sequence[Trial], suggest: Suggest, *, suspended: bool = False) -> Decision:
    """Return what follows from the state of all trials; ``suggest`` gives the parameters of new ones.

    The same spec and trials give the same decision, and trials do not depend on timing: TPE draws trial n from the
    results of those before n - parallelTrials + 1, for which it waits, and counts later ones as running.
    """
    running = tuple(trial.number for trial in trials if trial.state is TrialState.RUNNING)
    failed = [trial for trial in trials if trial.state is TrialState.FAILED]
    if len(failed) > spec.max_failed_trials:
        allowed = f"spec.maxFailedTrials: {spec.max_failed_trials}"
        message = f"{len(failed)} trials failed ({allowed}); the last: {failed[-1].name}: {failed[-1].message}"
        return Finish(False, message, None, running)
    waiting = [*_interrupted(trials), *_promoted(spec, trials)]
    if not running and not waiting and _next_number(spec, trials) is None:
        return _finish(spec, trials)
    if suspended:
        return Hold(Reason.SUSPENDED, "spec.suspend is true", running)
    used = used_gpu_hours(trials)
    if spec.budget_gpu_hours is not None and used >= float(spec.budget_gpu_hours):
        message = f"{used:.3g} of {spec.budget_gpu_hours} GPU-hours are used; raise spec.budgetGpuHours to resume"
        return Hold(Reason.BUDGET_REACHED, message, running)
    free = max(0, spec.parallel_trials - len(running))
    actions: list[Create | Resume] = [*waiting[:free]]
    while len(actions) < free and (created := _next_trial(spec, trials, actions, suggest)) is not None:
        actions.append(created)
    return Proceed(tuple(actions))


def _interrupted(trials: Sequence[Trial]) -> list[Resume]:
    """Return trials that were suspended before the step at which they are compared."""
    stopped = [t for t in trials if t.state is TrialState.SUSPENDED and not t.is_compared]
    return [Resume(trial.number, trial.pause_at_step) for trial in sorted(stopped, key=lambda t: t.number)]


def _promoted(spec: QLoRASweepSpec, trials: Sequence[Trial]) -> list[Resume]:
    if _next_number(spec, trials) is not None:
        return []
    found = promotions(spec.early_stopping, total_trials(spec), trials, spec.objective.metric)
    return [Resume(each.number, each.pause_at_step) for each in found]


def _next_number(spec: QLoRASweepSpec, trials: Sequence[Trial], more: Sequence[int] = ()) -> int | None:
    """Return the smallest number without a trial; None where there are all."""
    taken = {*(trial.number for trial in trials), *more}
    return next((number for number in range(total_trials(spec)) if number not in taken), None)


def _next_trial(
    spec: QLoRASweepSpec, trials: Sequence[Trial], actions: Sequence[Create | Resume], suggest: Suggest
) -> Create | None:
    """Return the next new trial; None where there is none, or TPE waits for a result."""
    new = {action.number: action for action in actions if isinstance(action, Create)}
    number = _next_number(spec, trials, tuple(new))
    if number is None:
        return None
    earlier: list[Result] = []
    if spec.algorithm.type is not AlgorithmType.GRID:
        existing = {trial.number: trial for trial in trials}
        for before in range(number):
            if before in new:
                earlier.append(Result(texts_of(new[before].values), None))
                continue
            trial = existing[before]
            is_known = spec.algorithm.type is AlgorithmType.TPE and before <= number - spec.parallel_trials
            if is_known and not has_result(trial):
                return None
            value = value_of(trial) if is_known and trial.state is not TrialState.FAILED else None
            earlier.append(Result(trial.parameters, value, failed=is_known and value is None))
    values = suggest(spec, number, earlier)
    return Create(number, values, first_pause(spec.early_stopping, total_trials(spec)))


def _finish(spec: QLoRASweepSpec, trials: Sequence[Trial]) -> Finish:
    best = best_of(trials, spec.objective.metric)
    if best is None:
        failed = next((t for t in reversed(trials) if t.state is TrialState.FAILED), None)
        why = f"; the last to fail: {failed.name}: {failed.message}" if failed else ""
        return Finish(False, f"no trial succeeded with a value of {spec.objective.metric}{why}", None)
    settings = ", ".join(f"{path} {text}" for path, text in best.parameters.items())
    return Finish(
        True,
        f"best of {len(trials)} trials: {best.name}, {spec.objective.metric} {best.value}, {settings}",
        best.number,
    )
