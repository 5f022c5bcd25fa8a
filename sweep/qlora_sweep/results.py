"""Results of trials, as the algorithms compare them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qlora_api.status import Memory, MemoryComponent, Progress
from qlora_api.sweep.spec import ObjectiveMetric
from qlora_api.sweep.trials import Trial, TrialState


@dataclass(frozen=True)
class Result:
    """Result of one trial for the algorithm that draws parameters."""

    parameters: dict[str, str]
    value: float | None
    """None: it has none yet."""
    failed: bool = False


def objective_value(metric: ObjectiveMetric, progress: Progress | None, memory: Memory | None) -> str | None:
    """Return the value of an objective's metric, as a trial's progress and memory have it."""
    if metric is ObjectiveMetric.PEAK_MEMORY:
        peak = memory.measured.get(MemoryComponent.PEAK) if memory else None
        return None if peak is None else str(peak)
    if progress is None:
        return None
    return {
        ObjectiveMetric.EVAL_LOSS: progress.best_eval_loss,
        ObjectiveMetric.TRAINING_LOSS: progress.loss,
        ObjectiveMetric.TOKENS_PER_SECOND: progress.tokens_per_second,
    }[metric]


def value_of(trial: Trial) -> float | None:
    """Return the objective's value; None where there is none, or it is not finite."""
    value = None if trial.value is None else float(trial.value)
    return value if value is not None and math.isfinite(value) else None


def has_result(trial: Trial) -> bool:
    """Return whether an algorithm can learn from a trial: it has ended, or waits to be compared or goes on since."""
    return trial.state in (TrialState.SUCCEEDED, TrialState.FAILED) or trial.is_compared


def ranked(trials: Iterable[Trial], metric: ObjectiveMetric) -> list[Trial]:
    """Return the trials best first; those without a value last, equal ones by number."""
    sign = -1 if metric.is_maximized else 1

    def key(trial: Trial) -> tuple[float, int]:
        value = value_of(trial)
        return (math.inf if value is None else sign * value, trial.number)

    return sorted(trials, key=key)


def best_of(trials: Sequence[Trial], metric: ObjectiveMetric) -> Trial | None:
    """Return the best trial that has succeeded."""
    succeeded = [t for t in trials if t.state is TrialState.SUCCEEDED and value_of(t) is not None]
    return ranked(succeeded, metric)[0] if succeeded else None


def used_gpu_hours(trials: Sequence[Trial]) -> float:
    """Return the time that all trials together have used."""
    return sum(trial.gpu_seconds for trial in trials) / 3600
