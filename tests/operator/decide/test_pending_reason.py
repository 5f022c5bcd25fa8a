"""Reasons of pods that are not there yet, in words that say what to do."""

from __future__ import annotations

import pytest

from operator_builders import child, job, pod, seen
from qlora_operator.decide.pending_reason import pending_reason
from qlora_operator.state.observed import JobState

NO_GPU = "0/5 nodes are available: 5 Insufficient nvidia.com/gpu. preemption: 0/5 nodes are available."
NO_MATCH = "0/4 nodes are available: 4 node(s) didn't match Pod's node affinity/selector."
NO_CLAIM = '0/1 nodes are available: persistentvolumeclaim "models" not found. not found'


@pytest.mark.parametrize(
    ("what_is_seen", "reason", "words"),
    [
        pytest.param(
            seen(child(), pod(unschedulable=NO_GPU, ready=False)),
            "Unschedulable",
            "no node has as many free nvidia.com/gpu as spec.parallelism.gpusPerWorker",
            id="too-few-gpus",
        ),
        pytest.param(
            seen(child(), pod(unschedulable="0/1 nodes are available: 1 Insufficient ephemeral-storage.", ready=False)),
            "Unschedulable",
            "trainer.ephemeralStorage",
            id="too-little-disk",
        ),
        pytest.param(
            seen(child(), pod(unschedulable=NO_MATCH, ready=False)), "Unschedulable", "nodeSelector", id="selector"
        ),
        pytest.param(
            seen(child(), pod(unschedulable=NO_CLAIM, ready=False)), "MissingReference", 'claim "models"', id="claim"
        ),
        pytest.param(
            seen(child(), pod(waiting="ErrImagePull", waiting_message="not found", ready=False)),
            "ImageUnavailable",
            "trainer.image",
            id="image",
        ),
        pytest.param(
            seen(
                child(),
                pod(waiting="CreateContainerConfigError", waiting_message='secret "s3" not found', ready=False),
            ),
            "MissingReference",
            'secret "s3" not found; create it',
            id="secret",
        ),
        pytest.param(
            seen(child(), pods_refused='pods "job-1-0" is forbidden: exceeded quota: gpus'),
            "QuotaExceeded",
            "fewer GPUs",
            id="quota",
        ),
        pytest.param(
            seen(child(), pods_refused='pods "job-1-0" is forbidden: no PriorityClass with name top was found'),
            "MissingReference",
            "correct spec.scheduling.priorityClassName",
            id="priority-class",
        ),
        pytest.param(
            seen(child(state=JobState.SUSPENDED)), "Queued", "set spec.scheduling.queue", id="queued-and-in-no-queue"
        ),
        pytest.param(seen(child(), pod(ready=False)), "Starting", "0 of 1 pods are ready", id="starting"),
    ],
)
def test_what_a_job_waits_for(what_is_seen, reason, words):
    found, text = pending_reason(job().spec, 1, 1, what_is_seen)
    assert found == reason
    assert words in text
