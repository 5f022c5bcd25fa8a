"""End of an attempt, from pods that do not agree."""

from __future__ import annotations

from datetime import timedelta

import pytest

from operator_builders import NOW, attempt, child, observed, pod
from qlora_api.contract import ProgressReport, TerminationMessage
from qlora_api.status import Memory, Progress, Reason
from qlora_operator.decide.attempts.attempt_outcome import as_suspended, closed, ending_of
from qlora_operator.state.observed import JobState, observe_pod

FAILED = child(state=JobState.FAILED)
OVERFULL = {"pod_reason": "Evicted", "pod_message": 'Usage of EmptyDir volume "cache" exceeds the limit "200Gi". '}
OVER_LIMIT = "Pod ephemeral local storage usage exceeds the total limit of containers 226304Mi. "
FULL = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."


@pytest.mark.parametrize(
    ("pods", "reason", "text"),
    [
        pytest.param([pod(code=40, word="bad"), pod(index=1, code=49)], "UserError", "bad", id="own-words-over-peer"),
        pytest.param([pod(code=49), pod(index=1, code=41, word="oom")], "OutOfDeviceMemory", "oom", id="oom-over-peer"),
        pytest.param(
            [pod(code=1, word="closed"), pod(index=1, code=43, word="stopped", disruption="EvictionByEvictionAPI")],
            "Preempted",
            "stopped",
            id="eviction-over-crash",
        ),
        pytest.param(
            [pod(code=43, word="stopped", disruption="DeletionByTaintManager")],
            "Preempted",
            "stopped",
            id="a-taint-is-no-lost-node",
        ),
        pytest.param(
            [pod(code=1, word="closed"), pod(index=1, disruption="DeletionByTaintManager", gone=True)],
            "NodeLost",
            "DeletionByTaintManager",
            id="lost-node-over-crash",
        ),
        pytest.param(
            [pod(code=41, word="oom", disruption="EvictionByEvictionAPI")],
            "OutOfDeviceMemory",
            "oom",
            id="oom-over-eviction",
        ),
        pytest.param([pod(code=44, word="rank 1"), pod(index=1, code=1)], "Stalled", "rank 1", id="stall-over-crash"),
        pytest.param(
            [pod(code=49, word="closed"), pod(index=1, gone=True)], "NodeLost", "worker 1", id="peer-without-a-word"
        ),
        pytest.param([pod(code=49, word="a"), pod(index=1, code=49, word="b")], "PeerLost", "a", id="peers-alone"),
        pytest.param(
            [pod(code=137, exit_reason="OOMKilled")], "OutOfHostMemory", "OOMKilled", id="killed-for-host-memory"
        ),
        pytest.param([pod(code=137, exit_reason="Error")], "Crashed", "137", id="killed-by-nobody-knows-whom"),
        pytest.param(
            [
                pod(
                    code=137,
                    exit_reason="Error",
                    message='{"exitCode": 42, "reason": "OutOfHostMemory", "message": "of 32Gi"}',
                )
            ],
            "OutOfHostMemory",
            "of 32Gi",
            id="killed-after-it-said-that-host-memory-ran-out",
        ),
        pytest.param(
            [pod(code=49, word="closed"), pod(index=1, code=137, exit_reason="ContainerStatusUnknown")],
            "NodeLost",
            "ContainerStatusUnknown",
            id="the-kubelet-lost-the-container",
        ),
        pytest.param(
            [pod(code=137, exit_reason="Error", deletion_due=NOW)], "Preempted", "137", id="outlasted-its-grace"
        ),
        pytest.param(
            [pod(code=44, word="worker 1 did not come"), pod(index=1, node="", unschedulable=FULL, phase="Failed")],
            "Unschedulable",
            f"no node took pod job-1-1 ({FULL}); the others waited: worker 1 did not come",
            id="waited-in-vain-for-a-pod-without-a-node",
        ),
        pytest.param(
            [pod(index=1, code=49, word="worker 0 did not come"), pod(node="", gone=True, unschedulable=FULL)],
            "Unschedulable",
            "no node took pod job-1-0",
            id="waited-in-vain-for-the-first-pod",
        ),
        pytest.param(
            [pod(phase="Failed", **OVERFULL)], "UserError", "trainer.cacheSizeLimit", id="evicted-for-its-own-volume"
        ),
        pytest.param(
            [pod(phase="Failed", pod_reason="Evicted", pod_message=OVERFULL["pod_message"].replace("cache", "tmp"))],
            "UserError",
            "trainer.tmpSizeLimit",
            id="evicted-for-its-tmp",
        ),
        pytest.param(
            [pod(phase="Failed", pod_reason="Evicted", pod_message=OVER_LIMIT)],
            "UserError",
            "more than its limit of 226304Mi (ephemeral-storage)",
            id="evicted-for-all-it-wrote",
        ),
        pytest.param(
            [pod(code=49, word="closed"), pod(index=1, code=137, exit_reason="ContainerStatusUnknown", **OVERFULL)],
            "UserError",
            'its volume "cache" took more than its limit of 200Gi',
            id="evicted-for-its-own-volume-with-a-container-that-was-killed",
        ),
        pytest.param(
            [pod(phase="Failed", pod_reason="Evicted", pod_message="The node was low on resource: memory. ")],
            "Preempted",
            "(Evicted) The node was low on resource: memory.",
            id="evicted-for-its-node",
        ),
        pytest.param([pod(code=7, exit_reason="Error")], "Crashed", "exit code 7", id="unknown-code-is-a-crash"),
    ],
)
def test_the_most_telling_pod_says_how_an_attempt_ended(pods, reason, text):
    ending = ending_of(1, len(pods), observed(FAILED, *pods))
    assert ending.reason == reason
    assert text in ending.message


def test_pods_that_waited_for_one_a_quota_refused_did_not_stall():
    refused = 'pods "job-1-1" is forbidden: exceeded quota: gpus'
    ending = ending_of(1, 2, observed(FAILED, pod(code=44, word="worker 1 did not come"), pods_refused=refused))
    assert (ending.reason, refused in ending.message) == (Reason.UNSCHEDULABLE, True)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        pytest.param("Container trainer for pod a/b failed with exit code 41 matching", "OutOfDeviceMemory", id="code"),
        pytest.param("Container trainer for pod a/b failed with exit code 137 matching", "Crashed", id="killed"),
        pytest.param("Pod a/b has condition DisruptionTarget matching FailJob rule", "Preempted", id="disruption"),
        pytest.param("Job has reached the specified backoff limit", "Crashed", id="nothing"),
    ],
)
def test_without_pods_the_jobs_condition_says_it(message, reason):
    assert ending_of(1, 1, observed(child(state=JobState.FAILED, message=message), after=31)).reason == reason


def test_a_failed_job_whose_pods_are_not_seen_to_have_ended_is_waited_for_since_they_say_more():
    suffers, causes = pod(index=1, code=49, word="rank 0 is gone"), pod(code=41, word="oom")
    assert ending_of(1, 2, observed(FAILED)) is None
    assert ending_of(1, 2, observed(FAILED, pod(), suffers)) is None
    assert ending_of(1, 2, observed(FAILED, causes, suffers)).message == "oom"
    assert ending_of(1, 2, observed(FAILED, pod(), suffers, after=31)).reason is Reason.NODE_LOST


def test_a_complete_job_without_its_result_is_waited_for_and_then_done_again():
    complete = child(state=JobState.COMPLETE)
    assert ending_of(1, 1, observed(complete)) is None
    assert ending_of(1, 1, observed(complete, pod(code=0, word="done"))).reason is Reason.COMPLETED
    assert ending_of(1, 1, observed(complete, after=31)).reason is Reason.PREEMPTED


def test_what_is_said_of_a_pod_is_kept_apart_from_what_is_said_of_its_container():
    controller = {"apiVersion": "batch/v1", "kind": "Job", "name": "job-1", "uid": "job-uid-1", "controller": True}
    meta = {"name": "a", "uid": "u", "resourceVersion": "1", "labels": {}, "creationTimestamp": NOW.isoformat()}
    meta["ownerReferences"] = [controller]
    end = {"terminated": {"exitCode": 137, "reason": "Error", "message": "log"}}
    status = {"containerStatuses": [{"name": "trainer", "state": end}], "reason": "Evicted", "message": "why"}
    cut = observe_pod({"metadata": meta, "spec": {}, "status": {**status, "phase": "Failed"}})
    assert (cut.exit_reason, cut.message, cut.pod_reason, cut.pod_message) == ("Error", "log", "Evicted", "why")


def test_an_attempt_goes_on_while_its_job_does():
    assert ending_of(1, 1, observed(child(), pod())) is None
    assert ending_of(1, 1, observed(child(state=JobState.FAILING), pod(code=1))) is None


def test_a_pod_that_outlasts_its_deletion_is_on_a_lost_node():
    due = NOW + timedelta(seconds=5)
    stuck = pod(deletion_due=due, disruption="DeletionByTaintManager")
    assert ending_of(1, 1, observed(child(), stuck, after=14)) is None
    assert ending_of(1, 1, observed(child(), stuck, after=16)).reason is Reason.NODE_LOST
    assert ending_of(1, 1, observed(child(), stuck, lost_nodes=frozenset({"node-0"}))).reason is Reason.NODE_LOST


def test_a_job_that_is_gone_ends_the_attempt_once_its_pods_have():
    assert ending_of(1, 1, observed(pod())) is None
    assert ending_of(1, 1, observed()).reason is Reason.PREEMPTED
    told_to_stop = ending_of(1, 1, observed(pod(code=43, word="stopped"), after=1))
    assert told_to_stop.removed
    assert as_suspended(attempt(1), told_to_stop).reason is Reason.SUSPENDED
    assert as_suspended(attempt(1), told_to_stop).message == "stopped"


def test_an_attempt_that_never_ran_did_not_stop_at_a_checkpoint():
    gone = ending_of(1, 1, observed())
    assert as_suspended(attempt(1), gone).message == "stopped before all its pods ran"
    assert "checkpoint" in as_suspended(attempt(1, runningTime=NOW), gone).message


def test_what_completed_before_it_was_told_to_stop_is_complete():
    ending = ending_of(1, 1, observed(pod(code=0, word="done", gone=True)))
    assert (ending.reason, ending.removed) == (Reason.COMPLETED, False)


HELD = {"phase": "Running", "held": True}
"""State of a pod whose trainer has ended while another container keeps the pod running."""


@pytest.mark.parametrize(
    ("pods", "reason"),
    [
        pytest.param([pod(code=0, word="ok", **HELD)], "Completed", id="done"),
        pytest.param([pod(code=0, word="ok", **HELD), pod(index=1, code=0, word="ok")], "Completed", id="one-is-held"),
        pytest.param([pod(code=0, word="ok", **HELD), pod(index=1)], None, id="the-other-one-goes-on"),
        pytest.param([pod(code=1, word="boom", **HELD)], "Crashed", id="failed"),
        pytest.param([pod(code=0, word="ok")], None, id="its-job-says-so-in-a-moment"),
    ],
)
def test_the_trainers_end_is_the_attempts_whatever_keeps_their_pods(pods, reason):
    ending = ending_of(1, len(pods), observed(child(), *pods))
    assert (ending and ending.reason) == reason


def test_a_container_of_somebody_elses_that_fails_takes_nothing_from_an_adapter_that_is_published():
    published = pod(code=0, word="ok", phase="Failed", other_failure='container "proxy" ended with exit code 1 (Error)')
    assert ending_of(1, 1, observed(FAILED, published)).reason is Reason.COMPLETED


def test_a_container_that_fails_before_the_trainer_begins_is_named_and_counted():
    body = {
        "metadata": {
            "name": "job-1-0-x",
            "uid": "u",
            "resourceVersion": "1",
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"qlora.dev/job": "job", "qlora.dev/attempt": "1"},
            "ownerReferences": [
                {"apiVersion": "batch/v1", "kind": "Job", "name": "job-1", "uid": "job-uid-1", "controller": True}
            ],
        },
        "spec": {"nodeName": "node-0"},
        "status": {
            "phase": "Failed",
            "initContainerStatuses": [{"name": "istio-init", "state": {"terminated": {"exitCode": 255}}}],
            "containerStatuses": [{"name": "trainer", "state": {"waiting": {"reason": "PodInitializing"}}}],
        },
    }
    ending = ending_of(1, 1, observed(FAILED, observe_pod(body)))
    assert ending.reason is Reason.CRASHED
    assert 'before its trainer started: container "istio-init" ended with exit code 255' in ending.message


@pytest.mark.parametrize(
    "report",
    [
        pytest.param(None, id="never-asked"),
        pytest.param(
            ProgressReport(job="job", attempt=2, section="Load", memory=Memory()), id="asked-before-it-resumed"
        ),
    ],
)
def test_an_attempt_too_short_to_be_asked_for_its_progress_starts_where_its_message_says(report):
    message = TerminationMessage(exit_code=0, reason=Reason.COMPLETED, progress=Progress(step=24), first_step=4)
    ended = pod(2, code=0, message=message.to_bytes().decode())
    seen = observed(child(2, state=JobState.COMPLETE), ended, report=report)
    done = closed(attempt(2), ending_of(2, 1, seen), seen)
    assert (done.first_step, done.last_step) == (4, 24)
