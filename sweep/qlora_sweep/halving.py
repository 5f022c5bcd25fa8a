"""Successive halving: which trials go on after a comparison, and to which step.

Jamieson and Talwalkar 2016. Comparisons are synchronous: all trials of a rung reach it before any goes on, so that the
result does not depend on which trial was faster. Trials go on best first, and whether one has gone on is told by the
step at which it is suspended next; so a decision that was carried out in part is completed and never made anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qlora_api.sweep.spec import EarlyStoppingSpec, ObjectiveMetric
from qlora_api.sweep.trials import Trial, TrialState
from qlora_sweep.results import ranked


@dataclass(frozen=True)
class Rung:
    """One comparison."""

    step: int
    """Optimizer step after which trials are compared."""
    survivors: int
    """Trials that go on."""
    next_step: int | None
    """Step of their next comparison; None: they train to the end."""


@dataclass(frozen=True)
class Promotion:
    """A trial that goes on, up to a step or to the end."""

    number: int
    pause_at_step: int | None


def rungs(stopping: EarlyStoppingSpec | None, trials: int) -> Iterator[Rung]:
    """Give the comparisons of so many trials, first to last; the last one leaves a single trial."""
    if stopping is None:
        return
    step, left = stopping.min_steps, trials
    while left > 1:
        left = max(1, left // stopping.reduction_factor)
        following = step * stopping.reduction_factor
        yield Rung(step, left, following if left > 1 else None)
        step = following


def first_pause(stopping: EarlyStoppingSpec | None, trials: int) -> int | None:
    """Return the step at which a new trial is suspended; None: never."""
    first = next(rungs(stopping, trials), None)
    return first.step if first else None


def promotions(
    stopping: EarlyStoppingSpec | None, total: int, trials: Sequence[Trial], metric: ObjectiveMetric
) -> list[Promotion]:
    """Return the trials that go on now, best first. A promoted trial that fails is replaced by the next best one."""
    for rung in rungs(stopping, total):
        at_rung = [trial for trial in trials if trial.pause_at_step == rung.step]
        if not all(_is_settled(trial) for trial in at_rung):
            return []
        beyond = [trial for trial in trials if _is_beyond(trial, rung.step) and trial.state is not TrialState.FAILED]
        candidates = ranked((t for t in at_rung if t.state is not TrialState.FAILED), metric)
        chosen = candidates[: max(0, rung.survivors - len(beyond))]
        # one that has succeeded before the comparison takes a place and needs nothing more
        found = [Promotion(trial.number, rung.next_step) for trial in chosen if trial.is_compared]
        if found:
            return found
    return []


def _is_settled(trial: Trial) -> bool:
    return trial.is_compared or trial.state in (TrialState.SUCCEEDED, TrialState.FAILED)


def _is_beyond(trial: Trial, step: int) -> bool:
    return trial.pause_at_step is None or trial.pause_at_step > step
