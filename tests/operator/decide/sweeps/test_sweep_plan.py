"""Trials that are created and changed for a sweep, and the time at which it is decided on again."""

from __future__ import annotations

from operator_builders import NOW
from qlora_api.status import Reason
from qlora_operator.decide.sweeps.sweep_plan import actions_of, budget_wake
from qlora_sweep.decide import Create, Finish, Hold, Proceed, Resume, decide
from qlora_sweep.grid import of_grid
from sweep_builders import UID, attempt, observed, says, sweep, trial_job

RUNS = {"conditions": [says("Running", "Training")]}
SUSPENDED = {"conditions": [says("Suspended", "Suspended")]}


def test_a_new_trial_is_a_job_that_the_sweep_controls():
    values = {"lora.rank": 8, "training.learningRate": "3e-4"}
    (job,) = actions_of(sweep(), {}, Proceed((Create(1, values, 4),))).create
    assert job["metadata"]["name"] == "search-1"
    assert job["metadata"]["labels"]["qlora.dev/sweep"] == "search"
    (owner,) = job["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"], owner["controller"]) == ("QLoRASweep", UID, True)
    assert (job["spec"]["lora"]["rank"], job["spec"]["training"]["learningRate"]) == (8, "3e-4")
    assert job["spec"]["policy"]["pauseAtStep"] == 4
    assert job["spec"]["output"]["destination"] == "s3://adapters/search/trials/search-1"


def test_a_trial_is_suspended_once():
    trials = observed(trial_job(0, **RUNS), trial_job(1, suspend=True, **RUNS))
    (patch,) = actions_of(sweep(), trials, Hold(Reason.SUSPENDED, "", (0, 1))).patch
    assert (patch.name, patch.body) == (
        "search-0",
        {"metadata": {"resourceVersion": "7"}, "spec": {"suspend": True}},
    )
    assert len(actions_of(sweep(), trials, Finish(False, "", None, (0, 1))).patch) == 1


def test_a_trial_is_resumed_up_to_its_next_comparison_or_the_end():
    trials = observed(trial_job(0, suspend=True, policy={"pauseAtStep": 4}, **SUSPENDED))
    for step in (8, None):
        (patch,) = actions_of(sweep(), trials, Proceed((Resume(0, step),))).patch
        assert patch.body["spec"] == {"suspend": False, "policy": {"pauseAtStep": step}}


def test_a_trial_that_may_go_on_already_is_left_alone():
    trials = observed(trial_job(0, policy={"pauseAtStep": 4}, **SUSPENDED))
    assert actions_of(sweep(), trials, Proceed((Resume(0, 4),))).patch == ()


def test_the_budget_wakes_the_sweep_by_itself():
    trials = observed(trial_job(0, attempts=[attempt(runningTime=NOW)], gpuSeconds=1800, **RUNS))
    assert budget_wake(sweep(budgetGpuHours="1").spec, trials) == 900  # of two GPUs
    assert budget_wake(sweep(budgetGpuHours="0.1").spec, trials) == 1
    assert budget_wake(sweep().spec, trials) is None
    assert budget_wake(sweep(budgetGpuHours="1").spec, observed(trial_job(0))) is None


def test_what_was_carried_out_is_asked_for_no_more():
    trials = observed(trial_job(0, **RUNS))
    decision = decide(sweep().spec, [each.trial for each in trials.values()], of_grid)
    (created,) = actions_of(sweep(), trials, decision).create
    assert created["metadata"]["name"] == "search-1"
