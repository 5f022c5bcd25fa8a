"""Limits of a job: its deadline, its budget, and the time it gets to stop."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta

import pytest

from operator_builders import NOW, PREPARING, attempt, child, decide, held, job, names, observed, pod, running
from qlora_api.contract import ProgressReport, TerminationMessage
from qlora_api.status import Memory, QLoRAJobStatus, Reason
from qlora_operator.state.observed import JobState

DEADLINE = {"activeDeadlineSeconds": 60}


def test_the_deadline_wakes_the_job_by_itself():
    assert decide(job(held(), policy=DEADLINE), observed(child(ready=1), pod(), after=20)).wake_after == 40


def test_the_deadline_acts_on_a_pod_in_which_another_container_is_not_ready_or_does_not_end():
    unready = observed(child(), pod(ready=False, trainer_ready=True), after=61)
    planned = decide(job(held(), policy=DEADLINE), unready)
    assert (planned.status.reason, [c.name for c in planned.delete]) == (Reason.SUSPENDING, ["job-1"])
    kept = pod(code=43, word="stopped", phase="Running", held=True)
    ended = decide(job(planned.status, policy=DEADLINE), observed(child(deleting=True), kept, after=70))
    assert (ended.status.state, ended.status.reason) == ("Failed", Reason.DEADLINE_EXCEEDED)


def test_time_of_earlier_attempts_counts_towards_the_deadline_and_time_between_them_does_not():
    ran = attempt(1, "Preempted", runningTime=NOW - timedelta(seconds=5000), endTime=NOW - timedelta(seconds=4970))
    later = observed(child(2, ready=1), pod(2), after=20)
    assert decide(job(held(ran), policy=DEADLINE), later).wake_after == 10
    ended = decide(job(held(ran), policy=DEADLINE), replace(later, now=NOW + timedelta(seconds=30)))
    assert (ended.status.reason, [c.name for c in ended.delete]) == (Reason.SUSPENDING, ["job-2"])
    left = pod(2, code=43, word="stopped", gone=True)
    gone = decide(job(ended.status, policy=DEADLINE), observed(left, after=40))
    assert (gone.status.state, gone.status.reason) == ("Failed", Reason.DEADLINE_EXCEEDED)
    assert gone.status.attempts[-1].reason is Reason.DEADLINE_EXCEEDED
    assert [n.reason for n in gone.notes] == ["DeadlineExceeded"]


@pytest.mark.parametrize(
    ("status", "what_is_seen", "more"),
    [
        pytest.param(
            running(), observed(child(), pod(unschedulable="no room", ready=False), after=9000), {}, id="no-room"
        ),
        pytest.param(running(), observed(child(state=JobState.SUSPENDED), after=9000), {}, id="queued"),
        pytest.param(None, observed(child(0), pod(0), after=9000), {"config": PREPARING}, id="preparing"),
        pytest.param(
            QLoRAJobStatus(attempts=[attempt(1, "Suspended", runningTime=NOW - timedelta(seconds=59))]),
            observed(after=9000),
            {},
            id="suspended-before",
        ),
    ],
)
def test_a_job_that_does_not_run_comes_no_nearer_to_its_deadline(status, what_is_seen, more):
    planned = decide(job(status, policy=DEADLINE), what_is_seen, **more)
    assert planned.status.state == "Pending"
    assert planned.wake_after is None


def test_an_attempt_that_its_queue_took_back_neither_runs_nor_pays_until_it_is_admitted_again():
    limits = {**DEADLINE, "budgetGpuHours": "1"}
    leaving = decide(job(held(), policy=limits), observed(child(state=JobState.SUSPENDED), pod(), after=20)).status
    assert leaving.attempts[-1].running_time == NOW  # its GPUs are held until its pods have gone
    gone = pod(code=43, word="stopped", gone=True)
    back = decide(job(leaving, policy=limits), observed(child(state=JobState.SUSPENDED), gone, after=30))
    assert (back.status.reason, back.wake_after) == (Reason.QUEUED, None)
    assert (back.status.attempts[-1].running_time, back.status.gpu_seconds) == (None, 30)
    later = decide(job(back.status, policy=limits), observed(child(state=JobState.SUSPENDED), gone, after=9000))
    assert later.status == back.status
    again = observed(child(ready=1), gone, pod(uid="another"), after=9000)
    trains = decide(job(later.status, policy=limits), again)
    assert (trains.status.reason, trains.wake_after) == (Reason.TRAINING, 30)
    over = observed(child(state=JobState.COMPLETE), gone, pod(uid="another", code=0, word="done"), after=9010)
    done = decide(job(trains.status, policy=limits), over).status
    assert (done.reason, done.gpu_seconds, done.attempts[-1].message) == (Reason.COMPLETED, 40, "done")


def test_a_job_whose_budget_is_used_up_is_suspended_and_goes_on_with_more():
    training = observed(child(ready=1), pod())
    early = decide(job(held(), policy={"budgetGpuHours": "0.5"}), training)
    assert (early.status.reason, early.wake_after) == (Reason.TRAINING, 1800)
    due = decide(job(held(), policy={"budgetGpuHours": "0.5"}), replace(training, now=NOW + timedelta(seconds=1800)))
    assert ([c.name for c in due.delete], due.status.reason) == (["job-1"], Reason.SUSPENDING)
    gone = decide(job(due.status, policy={"budgetGpuHours": "0.5"}), observed(after=1810))
    assert (gone.status.state, gone.status.reason) == ("Suspended", "BudgetReached")
    assert gone.status.gpu_seconds == 1810
    assert decide(job(gone.status, policy={"budgetGpuHours": "0.5"}), observed(after=9000)).status == gone.status
    more = decide(job(gone.status, policy={"budgetGpuHours": "1"}), observed(after=9000))
    assert names(more) == ["job-2"]


def test_a_job_pauses_at_its_step_and_goes_on_when_that_is_raised_or_removed():
    said = TerminationMessage(
        exit_code=43, reason="Paused", message="paused at step 5 of 10", progress={"step": 5, "totalSteps": 10}
    )
    at_pause = observed(child(state=JobState.FAILED), pod(code=43, message=said.to_bytes().decode()), after=60)
    pause = {"policy": {"pauseAtStep": 5}}
    stopped = decide(job(held(), **pause), at_pause)
    assert (stopped.status.state, stopped.status.reason) == ("Suspended", "Paused")
    assert (stopped.status.attempts[0].reason, stopped.status.restarts) == (Reason.PAUSED, 0)
    assert [(n.kind, n.reason) for n in stopped.notes] == [("Normal", "Paused")]
    (condition,) = [c for c in stopped.status.conditions if c.type == "Suspended"]
    assert condition.message == ("no pod runs; spec.policy.pauseAtStep (5) is reached; raise or remove it to resume")
    assert decide(job(stopped.status, **pause), observed(after=9000)).status == stopped.status
    for later in ({"policy": {"pauseAtStep": 6}}, {}):
        assert names(decide(job(stopped.status, **later), observed(after=60))) == ["job-2"]


def test_an_attempt_that_was_told_to_stop_at_the_step_of_a_pause_has_not_paused():
    """It may have stopped before the evaluation of that step."""
    said = TerminationMessage(
        exit_code=43, reason="Preempted", message="stopped by SIGTERM at step 5", progress={"step": 5}
    )
    told = observed(child(state=JobState.FAILED), pod(code=43, message=said.to_bytes().decode()), after=60)
    assert names(decide(job(held(), policy={"pauseAtStep": 5}), told)) == ["job-2"]


def report(**more) -> ProgressReport:
    return ProgressReport(job="job", attempt=1, section="Train", step=3, memory=Memory(), **more)


@pytest.mark.parametrize(
    ("step", "save", "ranks", "begins"),
    [
        pytest.param(0, 0, 1, 1800, id="nothing-is-known"),
        pytest.param(0.5, 1, 1, 1770, id="no-less-than-half-a-minute"),
        pytest.param(60, 20, 1, 1640, id="two-steps-and-a-save-and-a-half"),
        pytest.param(60, 20, 4, 290, id="of-each-rank"),
        pytest.param(3600, 60, 1, 900, id="no-more-than-pods-are-given"),
    ],
)
def test_a_job_begins_to_stop_while_its_budget_still_pays_for_the_stop(step, save, ranks, begins):
    budget = {"budgetGpuHours": "0.5"}
    held_by = QLoRAJobStatus(attempts=[attempt(1, worldSize=ranks, runningTime=NOW)], start_time=NOW)
    told = report(longest_step_seconds=step, longest_save_seconds=save)
    a_job = job(held_by, policy=budget, parallelism={"gpusPerWorker": ranks})
    trains = decide(a_job, observed(child(ready=1), pod(), report=told))
    assert (trains.status.reason, trains.wake_after) == (Reason.TRAINING, begins)
    more = {"policy": budget, "parallelism": {"gpusPerWorker": ranks}}
    due = decide(job(trains.status, **more), observed(child(ready=1), pod(), after=begins))
    assert ([c.name for c in due.delete], due.status.reason) == (["job-1"], Reason.SUSPENDING)
    left = pod(code=43, word="stopped", gone=True)
    gone = decide(job(due.status, **more), observed(left, after=begins + 1))  # much faster than it might have been
    assert (gone.status.reason, gone.status.attempts[-1].reason) == (Reason.BUDGET_REACHED, Reason.SUSPENDED)
    assert decide(job(gone.status, **more), observed(after=9000)).status == gone.status


def grace(planned) -> int:
    return planned.create[-1]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]


@pytest.mark.parametrize(
    ("step", "save", "seconds"),
    [
        pytest.param(1, 2, 120, id="the-operators-own-setting-is-enough"),
        pytest.param(60, 20, 160, id="two-steps-and-a-save-and-a-half-and-ten-seconds"),
        pytest.param(61, 20, 170, id="rounded-up"),
        pytest.param(3600, 60, 900, id="no-more-than-a-node-may-be-kept-waiting"),
        pytest.param(float("inf"), 0, 900, id="a-figure-that-is-none"),
    ],
)
def test_the_next_attempts_pods_get_the_time_that_steps_and_saves_were_seen_to_take(step, save, seconds):
    assert grace(decide(job(), observed())) == 120
    trains = replace(
        observed(child(ready=1), pod()), report=report(longest_step_seconds=step, longest_save_seconds=save)
    )
    told = decide(job(held()), trains).status
    assert told.attempts[-1].grace_seconds is None  # an attempt never changes
    again = decide(job(told), observed(child(state=JobState.FAILED), pod(code=41, word="oom")))
    assert grace(again) == seconds
    assert again.status.attempts[-1].grace_seconds == (seconds if seconds > 120 else None)


def test_what_one_step_took_is_not_forgotten_for_a_faster_one():
    slow, fast = report(longest_step_seconds=300), report(longest_step_seconds=1)
    status = decide(job(held()), replace(observed(child(ready=1), pod()), report=slow)).status
    assert decide(job(status), replace(observed(child(ready=1), pod()), report=fast)).status.grace_seconds == 610


def test_names_of_components_that_a_pod_makes_up_neither_get_into_status_nor_keep_a_job_from_its_deadline():
    status = held()
    for number in range(3):
        made_up = {f"key{number * 25 + key}": key for key in range(25)}
        told = report().model_copy(update={"memory": Memory(predicted=made_up, measured={**made_up, "peak": 7})})
        trains = replace(observed(child(ready=1), pod(), after=20 + number), report=told)
        status = decide(job(status, policy=DEADLINE), trains).status
    assert (status.memory.predicted, status.memory.measured) == ({}, {"peak": 7})
    late = decide(job(status, policy=DEADLINE), replace(trains, now=NOW + timedelta(seconds=61)))
    assert (late.status.reason, [c.name for c in late.delete]) == (Reason.SUSPENDING, ["job-1"])


@pytest.mark.parametrize("batch", [(64, 1, 1), (1, 4, 2)], ids=["more-ranks", "another-batch"])
def test_a_plan_that_is_not_the_jobs_makes_no_pods(batch):
    plan = dict(zip(("worldSize", "microBatchSize", "gradientAccumulationSteps"), batch, strict=True))
    found = {"modelRevision": "r", "dataHash": "d", "trainRows": 1, "trainTokens": 9, "trainSequences": 1}
    word = {"exitCode": 0, "reason": "Completed", "prepared": {**found, "gradientCheckpointing": True, "batch": plan}}
    over = observed(child(0, state=JobState.COMPLETE), pod(0, code=0, message=json.dumps(word)))
    refused = decide(job(), over, PREPARING)
    assert (refused.status.state, refused.status.reason, names(refused)) == ("Failed", Reason.CRASHED, [])
    forged = observed(child(7, plan=json.dumps(plan)), pod(7))
    assert [a.number for a in decide(job(), forged).status.attempts] == [1]
