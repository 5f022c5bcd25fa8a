"""Reasons of pods that are not there yet, in words that say what to do."""

from __future__ import annotations

import pytest

from operator_builders import child, job, observed, pod
from qlora_operator.decide.pending_reason import pending_reason
from qlora_operator.state.observed import JobState

NO_GPU = "0/5 nodes are available: 5 Insufficient nvidia.com/gpu. preemption: 0/5 nodes are available."
NO_MATCH = "0/4 nodes are available: 4 node(s) didn't match Pod's node affinity/selector."
NO_CLAIM = '0/1 nodes are available: persistentvolumeclaim "models" not found. not found'


TAINTED = "0/3 nodes are available: 1 node(s) had untolerated taint {node-role.kubernetes.io/control-plane: }, "
QUOTA = 'pods "job-1-0" is forbidden: exceeded quota: team, requested: limits.memory=32Gi, used: limits.memory=16Gi, '


@pytest.mark.parametrize(
    ("said", "words"),
    [
        pytest.param(f"{TAINTED}2 Insufficient nvidia.com/gpu.", None, id="of-the-control-plane"),
        pytest.param(
            NO_GPU.replace("5 Ins", "3 node(s) had untolerated taint(s), 2 Ins"), None, id="beside-the-reason"
        ),
        pytest.param(
            "0/3 nodes are available: 3 node(s) had untolerated taint(s).", "nodes have taints that", id="alone"
        ),
        pytest.param(
            f"{TAINTED}2 node(s) had untolerated taint {{team: b}}.", "nodes have taint {team: b} that", id="named"
        ),
    ],
)
def test_taints_are_mentioned_where_they_are_the_reason(said, words):
    _, text = pending_reason(job().spec, 1, 1, observed(child(), pod(unschedulable=said, ready=False)))
    remedy = text.replace(said, "")
    assert words in remedy if words else "taint" not in remedy


@pytest.mark.parametrize(
    ("said", "reason", "words"),
    [
        pytest.param(
            f"{QUOTA}limited: limits.memory=40Gi",
            "QuotaExceeded",
            "too little limits.memory (32Gi requested, 16Gi of 40Gi used): free some of the quota, or lower trainer.",
            id="quota-of-memory",
        ),
        pytest.param(
            'pods "x" is forbidden: failed quota: team: must specify limits.cpu for: trainer',
            "Refused",
            "have trainer.limitCpu set to true",
            id="quota-that-wants-limits",
        ),
        pytest.param(
            'pods "x" is forbidden: status unknown for quota: team, resources: requests.nvidia.com/gpu',
            "QuotaExceeded",
            "not counted yet; the operator retries",
            id="quota-that-is-new",
        ),
        pytest.param(
            'admission webhook "policy.example.com" denied the request: no',
            "Refused",
            "who run the webhook",
            id="webhook",
        ),
        pytest.param(
            'pods "x" is forbidden: error looking up service account team/trainer: serviceaccount "trainer" not found',
            "Refused",
            "trainer.serviceAccountName",
            id="service-account",
        ),
        pytest.param(
            'Job.batch "x" is invalid: spec.template.spec.nodeSelector: Invalid value: "a b"',
            "Refused",
            "; correct spec.scheduling.nodeSelector",
            id="node-selector",
        ),
    ],
)
def test_what_the_api_server_says_gets_a_remedy(said, reason, words):
    found, text = pending_reason(job().spec, 1, 1, observed(create_error=said))
    assert found == reason
    assert words in text


def test_a_pod_that_is_held_back_by_a_gate_is_queued_and_not_unschedulable():
    held = pod(ready=False, node="", gates="kueue.x-k8s.io/topology")
    reason, text = pending_reason(job().spec, 1, 1, observed(child(), held))
    assert (reason, "job-1-0 is held back by scheduling gates: kueue" in text) == ("Queued", True)


def test_what_a_person_must_mend_is_said_before_what_time_may():
    full, bad = pod(unschedulable=NO_GPU, ready=False), pod(index=1, waiting="ErrImagePull", ready=False)
    reason, text = pending_reason(job().spec, 1, 2, observed(child(), full, bad))
    assert (reason, "job-1-1" in text) == ("ImageUnavailable", True)


@pytest.mark.parametrize(
    ("what_is_seen", "reason", "words"),
    [
        pytest.param(
            observed(child(), pod(unschedulable=NO_GPU, ready=False)),
            "Unschedulable",
            "no node has as many free nvidia.com/gpu as spec.parallelism.gpusPerWorker",
            id="too-few-gpus",
        ),
        pytest.param(
            observed(
                child(), pod(unschedulable="0/1 nodes are available: 1 Insufficient ephemeral-storage.", ready=False)
            ),
            "Unschedulable",
            "trainer.ephemeralStorage",
            id="too-little-disk",
        ),
        pytest.param(
            observed(child(), pod(unschedulable=NO_MATCH, ready=False)), "Unschedulable", "nodeSelector", id="selector"
        ),
        pytest.param(
            observed(child(), pod(unschedulable=NO_CLAIM, ready=False)),
            "MissingReference",
            'claim "models"',
            id="claim",
        ),
        pytest.param(
            observed(child(), pod(waiting="ErrImagePull", waiting_message="not found", ready=False)),
            "ImageUnavailable",
            "trainer.image",
            id="image",
        ),
        pytest.param(
            observed(
                child(),
                pod(waiting="CreateContainerConfigError", waiting_message='secret "s3" not found', ready=False),
            ),
            "MissingReference",
            'secret "s3" not found; create it',
            id="secret",
        ),
        pytest.param(
            observed(child(), pods_refused='pods "job-1-0" is forbidden: exceeded quota: gpus'),
            "QuotaExceeded",
            "fewer GPUs",
            id="quota",
        ),
        pytest.param(
            observed(child(), pods_refused='pods "job-1-0" is forbidden: no PriorityClass with name top was found'),
            "MissingReference",
            "correct spec.scheduling.priorityClassName",
            id="priority-class",
        ),
        pytest.param(
            observed(child(state=JobState.SUSPENDED)),
            "Queued",
            "set spec.scheduling.queue",
            id="queued-and-in-no-queue",
        ),
        pytest.param(observed(child(), pod(ready=False)), "Starting", "0 of 1 pods are ready", id="starting"),
    ],
)
def test_what_a_job_waits_for(what_is_seen, reason, words):
    found, text = pending_reason(job().spec, 1, 1, what_is_seen)
    assert found == reason
    assert words in text
