"""The status of a QLoRASweep, from its trials and what was decided. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from qlora_api.errors import FieldError
from qlora_api.status import Condition, ConditionType, Reason
from qlora_api.sweep.status import BestTrial, QLoRASweepStatus, TrialCounts
from qlora_api.sweep.sweep import QLoRASweep
from qlora_api.sweep.trials import Trial, TrialState
from qlora_operator.decide.conditions import is_condition_true, set_condition, unknown_fields_message
from qlora_operator.decide.decision import Note
from qlora_operator.decide.sweeps.sweep_plan import Trials
from qlora_operator.decide.sweeps.trial_state import gpu_hours
from qlora_sweep.decide import Decision, Finish, Hold, total_trials
from qlora_sweep.results import best_of, value_of

_ENDED = (TrialState.SUCCEEDED, TrialState.FAILED)


@dataclass(frozen=True)
class SweepView:
    """A sweep as it is now."""

    sweep: QLoRASweep
    now: datetime
    unknown_fields: tuple[str, ...] = ()

    @property
    def before(self) -> QLoRASweepStatus:
        return self.sweep.status or QLoRASweepStatus()


@dataclass(frozen=True)
class _Summary:
    """State of a sweep, its reason and a message for people."""

    state: ConditionType | Literal["Pending"]
    reason: Reason
    message: str


def is_finished(status: QLoRASweepStatus) -> bool:
    return is_condition_true(status.conditions, ConditionType.FINISHED)


def status_of(view: SweepView, trials: Trials, decision: Decision, refused: str = "") -> QLoRASweepStatus:
    """Return the status after a decision was carried out, or as far as the API server took it."""
    status = _with_trials(view, trials)
    return _with_summary(view, status, _summary(view, trials, decision, refused))


def invalid(view: SweepView, errors: Iterable[FieldError]) -> QLoRASweepStatus:
    """Return the status of a sweep that cannot be run: none of its trials is created."""
    text = "; ".join(map(str, errors))
    return _with_summary(view, _with_trials(view, {}), _Summary(ConditionType.FAILED, Reason.USER_ERROR, text))


def observed(view: SweepView) -> QLoRASweepStatus:
    """Return the status of a sweep that is over, of its generation as it is now."""
    return view.before.model_copy(update={"observed_generation": view.sweep.metadata.generation or 0})


def transitions(before: QLoRASweepStatus, after: QLoRASweepStatus) -> Iterator[Note]:
    """Give what has happened to a sweep from one status to the next."""
    if (before.state, before.reason) == (after.state, after.reason):
        return
    text = next((c.message for c in after.conditions if c.type is ConditionType.READY), "")
    if after.state == ConditionType.RUNNING:
        if before.start_time is None:
            yield Note("Normal", "Started", text)
        elif before.state == ConditionType.SUSPENDED or before.reason is Reason.SUSPENDING:
            yield Note("Normal", "Resumed", text)
    elif after.state in (ConditionType.SUSPENDED, ConditionType.SUCCEEDED):
        yield Note("Normal", after.reason.value, text)
    elif after.state == ConditionType.FAILED or after.reason is Reason.REFUSED:
        yield Note("Warning", after.reason.value, text)


def _with_trials(view: SweepView, trials: Trials) -> QLoRASweepStatus:
    found = [each.trial for _, each in sorted(trials.items())]
    states = [trial.state for trial in found]
    counts = TrialCounts(
        total=total_trials(view.sweep.spec),
        created=len(found),
        running=states.count(TrialState.RUNNING),
        suspended=states.count(TrialState.SUSPENDED),
        succeeded=states.count(TrialState.SUCCEEDED),
        failed=states.count(TrialState.FAILED),
    )
    seconds = sum(trial.gpu_seconds for trial in found)
    best = best_of(found, view.sweep.spec.objective.metric)
    return view.before.model_copy(
        update={
            "observed_generation": view.sweep.metadata.generation or 0,
            "trials": counts,
            "finished": f"{counts.succeeded + counts.failed}/{counts.total}",
            "best": _best(best) if best else None,
            "gpu_seconds": seconds,
            "gpu_hours": gpu_hours(seconds),
            "start_time": view.before.start_time or (view.now if found else None),
        }
    )


def _best(trial: Trial) -> BestTrial:
    assert value_of(trial) is not None
    return BestTrial(name=trial.name, value=trial.value or "", parameters=trial.parameters, adapter=trial.adapter)


def _summary(view: SweepView, trials: Trials, decision: Decision, refused: str) -> _Summary:
    states = [each.trial.state for each in trials.values()]
    if refused:
        return _Summary("Pending", Reason.REFUSED, refused)
    if isinstance(decision, Finish):
        kind = ConditionType.SUCCEEDED if decision.succeeded else ConditionType.FAILED
        reason = Reason.COMPLETED if decision.succeeded else Reason.TRIALS_FAILED
        return _Summary(kind, reason, decision.message)
    if isinstance(decision, Hold):
        if TrialState.RUNNING in states:
            return _Summary("Pending", Reason.SUSPENDING, f"{decision.message}; running trials write checkpoints")
        return _Summary(ConditionType.SUSPENDED, decision.reason, f"{decision.message}; no trial runs")
    spec = view.sweep.spec
    text = (
        f"{states.count(TrialState.RUNNING)} of at most {spec.parallel_trials} trials run, "
        f"{sum(state in _ENDED for state in states)} of {total_trials(spec)} have ended"
    )
    return _Summary(ConditionType.RUNNING, Reason.SEARCHING, text)


def _with_summary(view: SweepView, status: QLoRASweepStatus, summary: _Summary) -> QLoRASweepStatus:
    """Return the status with its conditions, as those of jobs; Ready, Finished and Stalled are for other tools."""
    conditions: list[Condition] = list(status.conditions)

    def set_to(
        kind: ConditionType, *, is_true: bool, reason: Reason = summary.reason, text: str = summary.message
    ) -> None:
        conditions[:] = set_condition(
            conditions,
            kind,
            reason,
            text,
            is_true=is_true,
            now=view.now,
            generation=view.sweep.metadata.generation or 0,
        )

    is_over = summary.state in (ConditionType.SUCCEEDED, ConditionType.FAILED)
    set_to(ConditionType.RUNNING, is_true=summary.state == ConditionType.RUNNING)
    if summary.state == ConditionType.SUSPENDED:
        set_to(ConditionType.SUSPENDED, is_true=True)
    elif is_condition_true(conditions, ConditionType.SUSPENDED) and not is_over:
        set_to(ConditionType.SUSPENDED, is_true=False)
    if is_over:
        set_to(ConditionType(summary.state), is_true=True)
        set_to(ConditionType.FINISHED, is_true=True)
    set_to(ConditionType.READY, is_true=summary.state == ConditionType.SUCCEEDED)
    if summary.state == ConditionType.FAILED:
        set_to(ConditionType.STALLED, is_true=True)
    if view.unknown_fields:
        text = unknown_fields_message(view.unknown_fields)
        set_to(ConditionType.DEGRADED, is_true=True, reason=Reason.NOT_UNDERSTOOD, text=text)
    elif is_condition_true(conditions, ConditionType.DEGRADED):
        set_to(ConditionType.DEGRADED, is_true=False, reason=Reason.UNDERSTOOD, text="")
    update: dict[str, object] = {"state": summary.state, "reason": summary.reason, "conditions": conditions}
    if is_over:
        update["completion_time"] = view.now
    return status.model_copy(update=update)
