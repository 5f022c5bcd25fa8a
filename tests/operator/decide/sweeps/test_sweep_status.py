"""The status of a sweep, and what people are told of its transitions."""

from __future__ import annotations

from dataclasses import replace

import pytest

from operator_builders import NOW
from qlora_api.errors import FieldError
from qlora_api.status import Reason
from qlora_api.sweep.status import QLoRASweepStatus
from qlora_operator.decide.sweeps.sweep_status import SweepView, invalid, is_finished, status_of, transitions
from qlora_sweep.decide import Finish, Hold, Proceed
from sweep_builders import observed, says, sweep, trial_job

GO_ON = Proceed(())
RUNS = trial_job(0, conditions=[says("Running", "Training")])
DONE = trial_job(1, conditions=[says("Succeeded", "Completed")], progress={"bestEvalLoss": "1.5"}, gpuSeconds=360)
HELD = Hold(Reason.BUDGET_REACHED, "1 of 1 GPU-hours are used", (0,))


def view(status: QLoRASweepStatus | None = None) -> SweepView:
    return SweepView(sweep().model_copy(update={"status": status}), NOW)


def conditions(status):
    return {c.type.value: f"{c.status} {c.reason}" for c in status.conditions}


def test_a_sweep_that_runs_counts_its_trials_and_names_the_best_so_far():
    status = status_of(view(), observed(RUNS, DONE), GO_ON)
    assert (status.state, status.reason, status.finished, status.gpu_hours) == ("Running", "Searching", "1/2", "0.1")
    assert (status.best.name, status.best.value) == ("search-1", "1.5")
    assert (status.trials.running, status.trials.succeeded, status.trials.created) == (1, 1, 2)
    assert conditions(status) == {"Running": "True Searching", "Ready": "False Searching"}
    assert status.start_time == NOW


def test_a_sweep_is_suspended_once_none_of_its_trials_runs():
    waits = status_of(view(), observed(RUNS), HELD)
    assert (waits.state, waits.reason) == ("Pending", "Suspending")
    stopped = trial_job(0, suspend=True, conditions=[says("Suspended", "Suspended")])
    held = status_of(view(waits), observed(stopped), HELD)
    assert (held.state, held.reason) == ("Suspended", "BudgetReached")
    again = status_of(view(held), observed(RUNS), GO_ON)
    assert conditions(again)["Suspended"] == "False Searching"


@pytest.mark.parametrize(
    ("end", "state", "told"),
    [
        pytest.param(
            Finish(True, "best", 1),
            "Succeeded",
            {"Running": "False", "Succeeded": "True", "Finished": "True", "Ready": "True"},
            id="succeeded",
        ),
        pytest.param(
            Finish(False, "none", None),
            "Failed",
            {"Running": "False", "Failed": "True", "Finished": "True", "Ready": "False", "Stalled": "True"},
            id="failed",
        ),
    ],
)
def test_the_end_of_a_sweep_is_told_as_that_of_a_job(end, state, told):
    status = status_of(view(), observed(DONE), end)
    assert status.state == state
    assert {c.type.value: c.status for c in status.conditions} == told
    assert (is_finished(status), status.completion_time) == (True, NOW)


def test_a_sweep_that_cannot_be_run_says_all_that_is_wrong():
    status = invalid(view(), [FieldError("spec.maxTrials", 1, "must be at least 2"), FieldError("spec.a", 1, "no")])
    assert (status.state, status.reason) == ("Failed", "UserError")
    assert status.conditions[0].message == "spec.maxTrials: 1 must be at least 2; spec.a: 1 no"


def test_fields_of_a_later_version_are_named():
    newer = replace(view(), unknown_fields=("spec.newer",))
    status = status_of(newer, {}, GO_ON)
    assert conditions(status)["Degraded"] == "True NotUnderstood"
    assert conditions(status_of(view(status), {}, GO_ON))["Degraded"] == "False Understood"


def test_each_transition_is_told_once():
    states = [
        status_of(view(), observed(RUNS), GO_ON),
        status_of(view(), observed(RUNS), GO_ON, "quota"),
        status_of(view(), observed(RUNS), HELD),
        status_of(view(), observed(trial_job(0, conditions=[says("Suspended", "Suspended")])), HELD),
        status_of(view(), observed(RUNS), GO_ON),
        status_of(view(), observed(DONE), Finish(True, "best", 1)),
    ]
    before, told = QLoRASweepStatus(), []
    for after in states:
        told += [(note.kind, note.reason) for note in transitions(before, after)]
        assert list(transitions(after, after)) == []
        before = after
    assert told == [
        ("Normal", "Started"),
        ("Warning", "Refused"),
        ("Normal", "BudgetReached"),
        ("Normal", "Resumed"),
        ("Normal", "Completed"),
    ]
