"""Decisions of a sweep: from the trials alone, the same at any timing and after any crash."""

from __future__ import annotations

import random

import pytest

from qlora_api.status import Reason
from qlora_api.sweep.trials import TrialState
from qlora_sweep.decide import Create, Finish, Hold, Proceed, decide
from qlora_sweep.suggest import suggest

from .builders import RANK, RATE, RATES, SECONDS_A_STEP, STEPS, Simulation, loss, sweep_spec

HALVING = {"minSteps": 10, "reductionFactor": 3}
SPECS = {
    "grid": sweep_spec(parallelTrials=2),
    "grid-with-halving": sweep_spec(parallelTrials=2, earlyStopping=HALVING),
    "random": sweep_spec(parallelTrials=3, algorithm={"type": "Random", "seed": 1}, parameters=[RANK, RATES]),
    "tpe": sweep_spec(parallelTrials=3, algorithm={"type": "TPE", "seed": 1}, parameters=[RANK, RATES], maxTrials=16),
    "tpe-with-halving": sweep_spec(
        parallelTrials=3, algorithm={"type": "TPE"}, parameters=[RANK, RATES], maxTrials=16, earlyStopping=HALVING
    ),
}


def outcome(machine):
    return {n: (t.parameters, t.state, t.step) for n, t in sorted(machine.trials.items())}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_trials_depend_neither_on_timing_nor_on_crashes(spec):
    first = Simulation(spec, seed=0)
    end = first.run()
    assert isinstance(end, Finish)
    assert end.succeeded
    for seed in (1, 2, 3):
        other, crash = Simulation(spec, seed), random.Random(seed)
        assert other.run(lambda actions, crash=crash: crash.randint(0, actions)) == end
        assert outcome(other) == outcome(first)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_no_more_trials_run_than_may(spec):
    machine = Simulation(spec)
    machine.run()
    assert machine.most_running == spec.parallel_trials


def test_a_grid_has_each_combination_once_and_its_best_is_the_lowest_loss():
    machine = Simulation(SPECS["grid"])
    end = machine.run()
    seen = {tuple(t.parameters.values()) for t in machine.trials.values()}
    assert seen == {(str(rank), rate) for rank in RANK["choices"] for rate in RATE["choices"]}
    assert machine.trials[end.best].parameters == {"lora.rank": "16", "training.learningRate": "1e-3"}
    assert machine.steps == 12 * STEPS


def test_halving_finds_the_best_of_the_grid_in_less_than_half_of_its_steps():
    machine = Simulation(SPECS["grid-with-halving"])
    end = machine.run()
    assert machine.trials[end.best].parameters == {"lora.rank": "16", "training.learningRate": "1e-3"}
    # 12 trials to step 10, 4 of them to 30, 1 to the end
    assert machine.steps == 12 * 10 + 4 * 20 + 60
    states = [trial.state for trial in machine.trials.values()]
    assert states.count(TrialState.SUCCEEDED) == 1
    assert states.count(TrialState.SUSPENDED) == 11


def test_a_promoted_trial_that_fails_is_replaced_by_the_next_best():
    best = Simulation(SPECS["grid-with-halving"]).run().best
    machine = Simulation(SPECS["grid-with-halving"], fails=(best,), fails_after=10)
    end = machine.run()
    assert end.succeeded
    assert end.best != best
    assert sum(trial.step > 10 for trial in machine.trials.values()) == 5


def test_tpe_draws_more_trials_near_the_best_than_chance_does():
    near = {}
    for algorithm in ("Random", "TPE"):
        spec = sweep_spec(algorithm={"type": algorithm}, parameters=[RATES], maxTrials=40)
        machine = Simulation(spec)
        machine.run()
        losses = [loss(trial.parameters, STEPS) for trial in machine.trials.values()]
        near[algorithm] = sum(value < 1.02 for value in losses)
    assert near["TPE"] > near["Random"]


@pytest.mark.parametrize("algorithm", ["Random", "TPE"])
def test_no_trial_is_repeated(algorithm):
    machine = Simulation(sweep_spec(algorithm={"type": algorithm}, parallelTrials=2))
    machine.run()
    seen = {tuple(trial.parameters.values()) for trial in machine.trials.values()}
    assert len(seen) == 12  # all combinations of the choices


def test_tpe_waits_for_the_results_that_a_trial_is_drawn_from():
    spec = SPECS["tpe"]
    machine = Simulation(spec)
    for action in decide(spec, [], suggest).actions:
        machine.do(action)
    assert [*machine.trials] == [0, 1, 2]
    done = {"state": TrialState.SUCCEEDED, "step": STEPS, "value": "1.5"}
    machine.trials[2] = machine.trials[2].model_copy(update=done)  # trial 3 is drawn from the result of trial 0
    assert decide(spec, [*machine.trials.values()], suggest) == Proceed(())
    machine.trials[0] = machine.trials[0].model_copy(update=done)
    assert [action.number for action in decide(spec, [*machine.trials.values()], suggest).actions] == [3]


def test_the_budget_stops_the_sweep_and_more_of_it_goes_on():
    hours = 300 * SECONDS_A_STEP / 3600
    spec = sweep_spec(parallelTrials=2, budgetGpuHours=f"{hours:.4f}")
    machine = Simulation(spec)
    held = machine.run()
    assert isinstance(held, Hold)
    assert held.reason is Reason.BUDGET_REACHED
    assert "raise spec.budgetGpuHours to resume" in held.message
    assert machine.steps <= 310
    for number in held.suspend:
        machine.suspend(number)
    machine.spec = sweep_spec(parallelTrials=2)
    whole = Simulation(machine.spec)
    assert machine.run() == whole.run()
    assert outcome(machine) == outcome(whole)


def test_a_suspended_sweep_suspends_its_trials_and_a_finished_one_is_finished():
    machine = Simulation(SPECS["grid"])
    for action in decide(machine.spec, [], suggest).actions:
        machine.do(action)
    held = decide(machine.spec, [*machine.trials.values()], suggest, suspended=True)
    assert held == Hold(Reason.SUSPENDED, "spec.suspend is true", (0, 1))
    end = machine.run()
    assert decide(machine.spec, [*machine.trials.values()], suggest, suspended=True) == end


def test_more_failures_than_allowed_end_the_sweep():
    machine = Simulation(sweep_spec(maxFailedTrials=1), fails=(0, 1, 2))
    end = machine.run()
    assert not end.succeeded
    assert end.message.startswith("2 trials failed (spec.maxFailedTrials: 1); the last: search-1: out of memory")


def test_a_sweep_of_which_no_trial_succeeds_says_why():
    machine = Simulation(sweep_spec(parameters=[{**RATE, "choices": ["1e-4"]}], maxTrials=1), fails=(0,))
    end = machine.run()
    assert not end.succeeded
    assert end.message == "no trial succeeded with a value of EvalLoss; the last to fail: search-0: out of memory"


def test_a_trial_that_was_deleted_is_made_anew_with_the_same_parameters():
    machine = Simulation(SPECS["tpe"])
    machine.run()
    gone = machine.trials.pop(7)
    (action,) = decide(machine.spec, [*machine.trials.values()], suggest).actions
    assert isinstance(action, Create)
    machine.do(action)
    assert machine.trials[7].parameters == gone.parameters


def test_trials_that_end_before_they_are_compared_take_part_in_the_comparison():
    spec = sweep_spec(parallelTrials=2, earlyStopping={"minSteps": 40, "reductionFactor": 3})
    machine = Simulation(spec, steps=90)
    end = machine.run()
    assert end.succeeded
    assert machine.steps == 12 * 40 + 4 * 50  # the second comparison would be at step 120
