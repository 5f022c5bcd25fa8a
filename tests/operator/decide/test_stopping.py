"""The table of what follows a stop: it is whole, and decisions do what it says."""

from __future__ import annotations

from datetime import timedelta
from itertools import product

import pytest

from operator_builders import NOW, attempt, child, decide, held, job, observed, pod, running
from qlora_api.contract import TerminationMessage
from qlora_api.status import Condition, QLoRAJobStatus, Reason
from qlora_operator.decide.stopping import RULES, AttemptState, StopCause, StopOutcome, outcome_of
from qlora_operator.state.observed import JobState

COMBINATIONS = list(product(StopCause, AttemptState, (True, False)))
ENDED = frozenset(AttemptState) - {AttemptState.NONE, AttemptState.RUNNING}
CLOSES = {StopOutcome.CLOSE_WITH_ITS_REASON, StopOutcome.CLOSE_AS_SUSPENDED, StopOutcome.CLOSE_AS_DEADLINE_EXCEEDED}
KEPT = (StopCause.NONE, AttemptState.NEVER_RAN)
"""The one end that is none: the attempt is made anew."""


@pytest.mark.parametrize(("stop", "state", "pods"), COMBINATIONS)
def test_every_combination_is_in_exactly_one_row(stop, state, pods):
    rules = [rule for rule in RULES if stop in rule.stops and state in rule.attempts and pods in rule.pods]
    assert [rule.outcome for rule in rules] == [outcome_of(stop, state, pods=pods)]


@pytest.mark.parametrize(("stop", "state", "pods"), COMBINATIONS)
def test_an_attempt_is_closed_where_it_has_ended_and_only_there(stop, state, pods):
    is_over = stop in (StopCause.DELETED, StopCause.FINISHED)
    assert (outcome_of(stop, state, pods=pods) in CLOSES) is (state in ENDED and not is_over and (stop, state) != KEPT)


STOPS = {  # a pause follows from an attempt that has ended
    StopCause.SUSPEND: {"suspend": True},
    StopCause.BUDGET: {"policy": {"budgetGpuHours": "0.01"}},
    StopCause.DEADLINE: {"policy": {"activeDeadlineSeconds": 60}},
    StopCause.NONE: {},
}
LATE = 100
"""Seconds after which both limits are used up."""
DISRUPTED = pod(code=43, word="stopped", disruption="EvictionByEvictionAPI")
REMOVED = pod(code=43, word="stopped", gone=True)
PAUSED = TerminationMessage(exit_code=43, reason="Paused", message="paused at step 5", progress={"step": 5})
ENDS = {
    AttemptState.PAUSED: (child(state=JobState.FAILED), pod(code=43, message=PAUSED.to_bytes().decode())),
    AttemptState.COMPLETED: (child(state=JobState.COMPLETE), pod(code=0, word="done")),
    AttemptState.NODE_LOST: (child(), pod(deletion_due=NOW, disruption="DeletionByTaintManager")),
    AttemptState.DISRUPTED: (child(state=JobState.FAILED), DISRUPTED),
    AttemptState.REMOVED: (REMOVED,),
    AttemptState.FAILED: (child(state=JobState.FAILED), pod(code=1)),
}
SEEN = {
    AttemptState.PAUSED: Reason.PAUSED,
    AttemptState.COMPLETED: Reason.COMPLETED,
    AttemptState.NODE_LOST: Reason.NODE_LOST,
    AttemptState.DISRUPTED: Reason.PREEMPTED,
    AttemptState.REMOVED: Reason.PREEMPTED,
    AttemptState.FAILED: Reason.CRASHED,
}
RECORDED = {
    StopOutcome.CLOSE_AS_SUSPENDED: Reason.SUSPENDED,
    StopOutcome.CLOSE_AS_DEADLINE_EXCEEDED: Reason.DEADLINE_EXCEEDED,
}


@pytest.mark.parametrize(("stop", "state"), list(product(STOPS, ENDS)))
def test_an_attempt_is_closed_as_the_table_says(stop, state):
    open_attempt = running().attempts[0].model_copy(update={"running_time": NOW})
    status = running().model_copy(update={"attempts": [open_attempt]})
    decision = decide(job(status, **STOPS[stop]), observed(*ENDS[state], after=LATE))
    outcome = outcome_of(stop, state, pods=True)
    assert decision.status.attempts[0].reason is RECORDED.get(outcome, SEEN[state])


FINISHED = QLoRAJobStatus(
    conditions=[
        Condition(type="Failed", status="True", reason="UserError", last_transition_time=NOW, observed_generation=1)
    ],
    completion_time=NOW,
)
ENDED_LATE = QLoRAJobStatus(
    attempts=[attempt(1, "Preempted", runningTime=NOW - timedelta(seconds=LATE))], start_time=NOW
)
AT_PAUSE = QLoRAJobStatus(attempts=[attempt(1, "Paused")], start_time=NOW)
JOBS = {
    StopCause.DELETED: job(running(), deleted=True),
    StopCause.FINISHED: job(FINISHED),
    **{stop: job(ENDED_LATE, **more) for stop, more in STOPS.items()},
    StopCause.PAUSE: job(AT_PAUSE, policy={"pauseAtStep": 5}),
}


@pytest.mark.parametrize(
    ("stop", "there", "state", "deleted"),
    [
        pytest.param(StopCause.DELETED, (child(), pod()), "Pending", [], id="deleted-left-to-the-garbage-collector"),
        pytest.param(
            StopCause.FINISHED, (child(), pod()), "Pending", ["job-1"], id="finished-with-containers-that-still-run"
        ),
        pytest.param(StopCause.FINISHED, (), "Pending", [], id="finished-and-gone"),
        pytest.param(StopCause.DEADLINE, (child(), pod()), "Failed", ["job-1"], id="deadline-with-a-job-left-over"),
        pytest.param(StopCause.DEADLINE, (), "Failed", [], id="deadline"),
        pytest.param(StopCause.SUSPEND, (child(), pod()), "Pending", ["job-1"], id="suspended-with-pods"),
        pytest.param(StopCause.SUSPEND, (pod(),), "Pending", [], id="suspended-with-pods-whose-job-is-gone"),
        pytest.param(StopCause.SUSPEND, (REMOVED,), "Suspended", [], id="suspended"),
        pytest.param(StopCause.BUDGET, (child(), pod()), "Pending", ["job-1"], id="budget-with-pods"),
        pytest.param(StopCause.BUDGET, (), "Suspended", [], id="budget"),
        pytest.param(StopCause.PAUSE, (), "Suspended", [], id="pause"),
    ],
)
def test_a_job_without_an_open_attempt_stops_as_the_table_says(stop, there, state, deleted):
    decision = decide(JOBS[stop], observed(*there))
    assert decision.status.state == state
    assert [one.name for one in decision.delete] == deleted
    assert decision.create == ()


@pytest.mark.parametrize("stop", STOPS)
def test_the_generation_of_a_job_that_runs_is_observed_whatever_it_is_asked_to_do(stop):
    decision = decide(job(held(), **STOPS[stop]), observed(child(ready=1), pod(), after=LATE))
    assert decision.status.observed_generation == 1


def test_status_of_a_job_that_is_deleted_is_not_written_once_more():
    assert decide(JOBS[StopCause.DELETED], observed(child(), pod())).status == running()
