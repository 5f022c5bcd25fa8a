"""Decisions, from values alone. One row a case; its id says the behaviour."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from operator_builders import (
    NOW,
    PREPARED,
    PREPARING,
    UID,
    attempt,
    child,
    decide,
    held,
    job,
    names,
    observed,
    pod,
    running,
)
from qlora_api.contract import ProgressReport
from qlora_api.status import MAX_ATTEMPTS, ConditionType, Memory, QLoRAJobStatus, Reason
from qlora_operator.state.observed import JobState


@pytest.mark.parametrize(
    ("a_job", "what_is_seen", "makes", "deletes", "state", "reason"),
    [
        pytest.param(job(), observed(), ["job-1"], [], "Pending", "Starting", id="new-job-starts"),
        pytest.param(
            job(workers=2),
            observed(),
            ["qlora-trainers", f"qlora-workers-{UID}", "job-1"],
            [],
            "Pending",
            "Starting",
            id="workers-meet-at-a-service",
        ),
        pytest.param(
            job(running()), observed(child(ready=1), pod()), [], [], "Running", "Training", id="ready-pods-train"
        ),
        pytest.param(
            job(running(), suspend=True),
            observed(child(), pod()),
            [],
            ["job-1"],
            "Pending",
            "Suspending",
            id="suspend-deletes",
        ),
        pytest.param(
            job(running(), suspend=True), observed(pod()), [], [], "Pending", "Suspending", id="suspending-with-pods"
        ),
        pytest.param(job(running(), suspend=True), observed(), [], [], "Suspended", "Suspended", id="suspended"),
        pytest.param(
            job(QLoRAJobStatus(attempts=[attempt(1, "Suspended")])),
            observed(),
            ["job-2"],
            [],
            "Pending",
            "Starting",
            id="resume-is-a-new-attempt",
        ),
        pytest.param(
            job(running()),
            observed(child(state=JobState.FAILED), pod(code=41, word="oom")),
            ["job-2"],
            [],
            "Pending",
            "Starting",
            id="out-of-memory-goes-on-at-once",
        ),
        pytest.param(
            job(running()),
            observed(child(state=JobState.FAILED), pod(code=1, word="boom")),
            [],
            [],
            "Pending",
            "BackingOff",
            id="a-crash-backs-off",
        ),
        pytest.param(
            job(running(), policy={"maxRestarts": 0}),
            observed(child(state=JobState.FAILED), pod(code=1, word="boom")),
            [],
            [],
            "Failed",
            "Crashed",
            id="the-last-restart-is-used-up",
        ),
        pytest.param(
            job(running()),
            observed(child(state=JobState.COMPLETE), pod(code=0, word="ok")),
            [],
            [],
            "Succeeded",
            "Completed",
            id="complete",
        ),
        pytest.param(
            job(held(), policy={"activeDeadlineSeconds": 60}),
            observed(child(ready=1), pod(), after=61),
            [],
            ["job-1"],
            "Pending",
            "Suspending",
            id="the-deadline-stops-what-runs",
        ),
        pytest.param(
            job(held(), policy={"activeDeadlineSeconds": 60}),
            observed(pod(), after=70),
            [],
            [],
            "Pending",
            "Suspending",
            id="past-the-deadline-pods-are-waited-for",
        ),
        pytest.param(
            job(held(), policy={"activeDeadlineSeconds": 60, "maxRestarts": 0}),
            observed(pod(code=43, word="stopped", gone=True), after=80),
            [],
            [],
            "Failed",
            "DeadlineExceeded",
            id="past-the-deadline-and-without-pods-it-has-failed",
        ),
        pytest.param(
            job(held(), policy={"activeDeadlineSeconds": 60}),
            observed(pod(code=0, word="published", gone=True), after=80),
            [],
            [],
            "Succeeded",
            "Completed",
            id="what-was-published-past-the-deadline-is-complete",
        ),
        pytest.param(
            job(held(), policy={"activeDeadlineSeconds": 60}),
            observed(child(state=JobState.FAILED), pod(code=1, word="boom"), after=80),
            [],
            [],
            "Failed",
            "DeadlineExceeded",
            id="what-crashes-past-the-deadline-does-not-start-again",
        ),
        pytest.param(
            job(held(), policy={"activeDeadlineSeconds": 60}),
            observed(child(), pod(deletion_due=NOW), after=80),
            [],
            ["job-1"],
            "Failed",
            "DeadlineExceeded",
            id="past-the-deadline-a-lost-node-is-not-waited-for",
        ),
        pytest.param(
            job(running()),
            observed(child(state=JobState.SUSPENDED)),
            [],
            [],
            "Pending",
            "Queued",
            id="kueue-has-not-admitted",
        ),
        pytest.param(
            job(),
            observed(create_error='jobs.batch "job-1" is forbidden: exceeded quota: q'),
            [],
            [],
            "Pending",
            "QuotaExceeded",
            id="refused-by-the-api-server",
        ),
        pytest.param(
            job(QLoRAJobStatus()),
            observed(child(attempt=1, ready=1), pod()),
            [],
            [],
            "Running",
            "Training",
            id="an-unknown-attempt-is-adopted",
        ),
    ],
)
def test_what_follows(a_job, what_is_seen, makes, deletes, state, reason):
    planned = decide(a_job, what_is_seen)
    assert names(planned) == makes
    assert [c.name for c in planned.delete] == deletes
    assert (planned.status.state, planned.status.reason) == (state, reason)


def test_deciding_again_on_what_was_decided_changes_nothing():
    first = decide(job(), observed())
    again = decide(job(first.status), observed(child(attempt=1)))
    assert (again.status, again.create, again.delete, again.notes) == (first.status, (), (), ())


def test_a_job_that_is_being_deleted_is_left_to_the_garbage_collector():
    planned = decide(job(running(), deleted=True), observed(child()))
    assert (planned.create, planned.delete, planned.notes) == ((), (), ())


def test_a_finished_job_stays_as_it_is_and_goes_when_its_time_has_come():
    done = decide(job(running()), observed(child(state=JobState.COMPLETE), pod(code=0, word="ok"))).status
    finished = job(done, policy={"ttlSecondsAfterFinished": 60})
    early, late = decide(finished, observed(after=10)), decide(finished, observed(after=60))
    assert (early.status, early.delete_self, early.wake_after) == (done, False, 50)
    assert late.delete_self


def test_after_the_back_off_the_next_attempt_starts():
    status = QLoRAJobStatus(attempts=[attempt(1, "Crashed")])
    assert decide(job(status), observed()).wake_after == 1
    assert names(decide(job(status), observed(after=1))) == ["job-2"]


def test_an_attempt_that_is_adopted_keeps_the_batch_it_was_planned_with():
    plan_of_two = '{"worldSize": 1, "microBatchSize": 2, "gradientAccumulationSteps": 8}'
    planned = decide(job(QLoRAJobStatus()), observed(child(plan=plan_of_two), pod()))
    assert planned.status.attempts[0].micro_batch_size == 2


@pytest.mark.parametrize(
    ("first", "reason", "message"),
    [
        pytest.param(
            [child(state=JobState.FAILED), pod(code=41, word="at step 3")], "OutOfDeviceMemory", "at step 3", id="known"
        ),
        pytest.param([], "Preempted", "its Job was deleted", id="without-a-trace"),
        pytest.param([child(), pod()], "Preempted", "attempt 2 took its place", id="given-up-and-going-on"),
    ],
)
def test_an_attempt_whose_end_was_not_written_down_is_closed_as_the_one_that_followed_is_adopted(
    first, reason, message
):
    decided = decide(job(running()), observed(*first, child(attempt=2), after=9))
    attempts = decided.status.attempts
    assert [(a.number, a.reason, a.message) for a in attempts] == [(1, reason, message), (2, None, "")]
    assert attempts[0].end_time == attempts[1].start_time
    assert decided.create == ()


def test_progress_and_memory_get_into_status_with_words_for_kubectl():
    report = ProgressReport(
        job="job",
        attempt=1,
        section="Train",
        step=3,
        total_steps=10,
        eta_seconds=4000,
        memory=Memory(measured={"peak": 5 * 1024**3}),
    )
    planned = decide(job(running()), observed(child(ready=1), pod(), report=report))
    assert planned.status.progress.step == 3
    assert (planned.status.eta, planned.status.peak_memory) == ("1h6m", "5.0Gi")
    assert planned.watch_progress


def test_a_report_of_an_earlier_attempt_is_not_taken_for_this_ones():
    report = ProgressReport(job="job", attempt=1, section="Train", step=3, memory=Memory())
    planned = decide(job(running("Preempted")), observed(child(attempt=2, ready=1), pod(attempt=2), report=report))
    assert planned.status.progress is None


def test_the_oldest_attempts_that_did_not_count_give_way():
    kept = [attempt(n, "Crashed" if n == 1 else "Preempted") for n in range(1, MAX_ATTEMPTS + 1)]
    planned = decide(job(QLoRAJobStatus(attempts=kept), policy={"maxRestarts": 5}), observed(after=1000))
    numbers = [a.number for a in planned.status.attempts]
    assert len(numbers) == MAX_ATTEMPTS
    assert numbers[:2] == [1, 3]
    assert numbers[-1] == MAX_ATTEMPTS + 1
    assert planned.status.restarts == 1


def test_prepare_goes_first_and_its_result_is_what_the_trainers_get():
    first = decide(job(), observed(), PREPARING)
    assert names(first) == ["job-prepare"]
    assert first.status.reason is Reason.PREPARING
    prepared = observed(child(attempt=0, state=JobState.COMPLETE), pod(attempt=0, code=0, message=PREPARED))
    then = decide(job(first.status), prepared, PREPARING)
    assert names(then) == ["job-1"]
    assert then.status.attempts[0].micro_batch_size == 2
    assert (
        '"gradientCheckpointing":true'
        in then.create[-1]["spec"]["template"]["metadata"]["annotations"]["qlora.dev/config"]
    )
    adopted = decide(job(first.status), replace(prepared, jobs={**prepared.jobs, 1: child()}), PREPARING)
    assert (names(adopted), adopted.status.prepared) == ([], then.status.prepared)


def test_a_user_error_in_prepare_ends_the_job():
    failed = observed(child(attempt=0, state=JobState.FAILED), pod(attempt=0, code=40, word="no such column"))
    planned = decide(job(), failed, PREPARING)
    assert (planned.status.state, planned.status.reason) == ("Failed", "UserError")
    assert planned.create == ()


def test_a_prepare_that_hangs_ends_the_job_without_another_try():
    made = decide(job(), observed(), PREPARING).create[-1]["spec"]["template"]["spec"]
    assert made["activeDeadlineSeconds"] == PREPARING.prepare.deadline_seconds
    hung = pod(attempt=0, phase="Failed", ready=False, pod_reason="DeadlineExceeded", message="reading rows")
    planned = decide(job(), observed(child(attempt=0), hung), PREPARING)
    assert (planned.status.state, planned.status.reason) == ("Failed", "DeadlineExceeded")
    assert "prepare.deadlineSeconds" in planned.status.conditions[0].message
    assert planned.status.conditions[0].message.endswith("its termination message: reading rows")
    assert [child.attempt for child in planned.delete] == [0]
    done = observed(child(attempt=0, state=JobState.COMPLETE), hung, pod(attempt=0, code=0, message=PREPARED))
    assert decide(job(), done, PREPARING).status.state == "Pending", "another try did it while nobody looked"


def test_conditions_keep_the_time_of_their_last_transition():
    first = decide(job(running()), observed(child(ready=1), pod())).status
    later = decide(job(first), observed(child(ready=1), pod(), after=100)).status
    moved = next(c for c in later.conditions if c.type is ConditionType.RUNNING)
    assert moved.last_transition_time == NOW
    pending = decide(job(later), observed(child(), after=200)).status
    stopped = next(c for c in pending.conditions if c.type is ConditionType.RUNNING)
    assert stopped.last_transition_time == NOW + timedelta(seconds=200)


FULL = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu. preemption: none."


def test_with_min_workers_pods_that_find_no_room_give_way_to_fewer():
    waiting = running().model_copy(update={"attempts": [attempt(1, worldSize=4, microBatchSize=4)]})
    a_job = job(waiting, workers=4, parallelism={"minWorkers": 2})
    full = observed(child(), *(pod(index=i, unschedulable=FULL, ready=False) for i in range(4)))
    assert decide(a_job, full).status.reason is Reason.UNSCHEDULABLE
    planned = decide(a_job, replace(full, now=NOW + timedelta(seconds=120)))
    assert [c.name for c in planned.delete] == ["job-1"]
    assert [a.world_size for a in planned.status.attempts] == [4, 2]  # three do not divide the global batch
    assert planned.create[-1]["spec"]["completions"] == 2
    assert planned.status.restarts == 0


def test_without_min_workers_pods_that_find_no_room_wait():
    waiting = running().model_copy(update={"attempts": [attempt(1, worldSize=4, microBatchSize=4)]})
    full = observed(child(), pod(unschedulable=FULL, ready=False), after=100_000)
    planned = decide(job(waiting, workers=4), full)
    assert (planned.status.reason, planned.create, planned.delete) == (Reason.UNSCHEDULABLE, (), ())


def test_the_attempt_after_a_smaller_one_asks_for_all_workers_again():
    smaller = attempt(2, "Preempted", worldSize=2, microBatchSize=2, gradientAccumulationSteps=4)
    status = QLoRAJobStatus(attempts=[attempt(1, "Unschedulable", worldSize=4), smaller])
    planned = decide(job(status, workers=4, parallelism={"minWorkers": 2}), observed(after=100))
    assert planned.status.attempts[-1].world_size == 4


def test_with_min_workers_one_pod_that_found_room_does_not_hold_the_others_place():
    waiting = running().model_copy(update={"attempts": [attempt(1, worldSize=2)]})
    a_job = job(waiting, workers=2, parallelism={"minWorkers": 1})
    half = observed(child(ready=1), pod(), pod(index=1, unschedulable=FULL, ready=False), after=120)
    assert [a.world_size for a in decide(a_job, half).status.attempts] == [2, 1]


def test_the_newest_attempt_is_never_dropped_and_gpu_time_of_dropped_ones_still_counts():
    kept = [attempt(n, "Crashed", runningTime=NOW - timedelta(seconds=10)) for n in range(1, MAX_ATTEMPTS + 1)]
    planned = decide(job(QLoRAJobStatus(attempts=kept), policy={"maxRestarts": 50}), observed(after=1000))
    assert planned.status.state == "Failed"
    free = [attempt(n, "Preempted", runningTime=NOW - timedelta(seconds=10)) for n in range(1, MAX_ATTEMPTS + 1)]
    planned = decide(job(QLoRAJobStatus(attempts=free)), observed(after=1000))
    assert planned.status.attempts[-1].number == MAX_ATTEMPTS + 1
    assert planned.status.earlier_gpu_seconds == 10


def test_a_job_sent_back_by_its_queue_is_queued():
    trained = decide(job(running()), observed(child(ready=1), pod())).status
    assert decide(job(trained), observed(child(state=JobState.SUSPENDED))).status.reason is Reason.QUEUED
