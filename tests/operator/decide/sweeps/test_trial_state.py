"""State of a trial, as its QLoRAJob has it."""

from __future__ import annotations

from datetime import timedelta

import pytest

from operator_builders import NOW
from qlora_api.sweep.trials import TrialState
from qlora_operator.decide.sweeps.trial_state import gpu_hours, observe_trial
from qlora_sweep.trial_jobs import trial_number
from sweep_builders import attempt, observed, says, sweep, trial_job

PROGRESS = {"step": 4, "totalSteps": 10, "bestEvalLoss": "1.25", "loss": "1.5"}


@pytest.mark.parametrize(
    ("job", "number"),
    [
        ("search-0", 0),
        ("search-12", 12),
        ("search-01", None),
        ("search-", None),
        ("search--1", None),
        ("search-1-2", None),
        ("other-1", None),
        ("search-\u0661", None),
        ("search-9999999999", None),
    ],
)
def test_a_trials_number_is_in_the_name_that_it_was_given(job, number):
    assert trial_number("search", job) == number


@pytest.mark.parametrize(
    ("job", "state"),
    [
        pytest.param(trial_job(), TrialState.RUNNING, id="new"),
        pytest.param(trial_job(conditions=[says("Running", "Training")]), TrialState.RUNNING, id="runs"),
        pytest.param(trial_job(conditions=[says("Suspended", "Paused")]), TrialState.SUSPENDED, id="suspended"),
        pytest.param(
            trial_job(generation=2, observedGeneration=1, conditions=[says("Suspended", "Paused")]),
            TrialState.RUNNING,
            id="was-suspended-and-may-go-on-since",
        ),
        pytest.param(trial_job(conditions=[says("Succeeded", "Completed")]), TrialState.SUCCEEDED, id="succeeded"),
        pytest.param(trial_job(conditions=[says("Failed", "UserError", "no")]), TrialState.FAILED, id="failed"),
    ],
)
def test_the_state_of_a_trial_is_that_of_its_job(job, state):
    (found,) = observed(job).values()
    assert found.trial.state is state
    assert found.trial.message == ("no" if state is TrialState.FAILED else "")


def test_settings_and_results_are_the_jobs():
    (found,) = observed(trial_job(progress=PROGRESS)).values()
    assert found.trial.parameters == {"lora.rank": "8", "training.learningRate": "1e-4"}
    assert (found.trial.value, found.trial.step) == ("1.25", 4)


@pytest.mark.parametrize(
    ("reason", "step"), [pytest.param("Paused", 4, id="paused"), pytest.param("Suspended", 3, id="stopped-before")]
)
def test_a_trial_is_compared_only_where_it_paused_and_so_was_evaluated(reason, step):
    job = trial_job(
        policy={"pauseAtStep": 4},
        progress=PROGRESS,
        attempts=[attempt(reason, lastStep=4)],
        conditions=[says("Suspended", reason)],
    )
    (found,) = observed(job).values()
    assert (found.trial.step, found.trial.is_compared) == (step, reason == "Paused")


def test_the_time_of_what_runs_counts_up_to_now():
    job = trial_job(attempts=[attempt(runningTime=NOW)], gpuSeconds=3)
    found = observe_trial(0, job, sweep().spec, NOW + timedelta(seconds=10))
    assert (found.trial.gpu_seconds, found.gpus) == (20, 2)


@pytest.mark.parametrize("value", ["", "much", "1e"])
def test_a_value_that_is_no_number_is_none(value):
    (found,) = observed(trial_job(progress=PROGRESS | {"bestEvalLoss": value})).values()
    assert found.trial.value is None


@pytest.mark.parametrize(("seconds", "text"), [(0, "0"), (1, "0"), (36, "0.01"), (3600, "1"), (36_000_000, "10000")])
def test_gpu_hours_are_short(seconds, text):
    assert gpu_hours(seconds) == text
