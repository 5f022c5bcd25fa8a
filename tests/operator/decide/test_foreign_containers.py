"""Decisions on pods with containers that are not the operator's."""

from __future__ import annotations

from operator_builders import PREPARED, PREPARING, child, decide, job, names, observed, pod, running
from qlora_api.status import Reason


def test_a_failed_trainer_in_a_pod_that_goes_on_ends_its_peers():
    held = pod(index=1, code=1, word="boom", phase="Running", held=True)
    planned = decide(job(running(), workers=2), observed(child(), pod(), held))
    assert [c.name for c in planned.delete] == ["job-1"]
    assert planned.status.attempts[-1].end_time is None
    ended = decide(job(running(), workers=2), observed(held, pod(code=43, word="stopped", gone=True)))
    assert ended.status.attempts[-1].reason is Reason.CRASHED


def test_trainers_that_run_beside_a_container_that_is_not_ready_train():
    unready = observed(child(), pod(ready=False, trainer_ready=True))
    assert decide(job(running()), unready).status.reason is Reason.TRAINING


def test_a_prepare_that_is_done_goes_on_though_its_pod_is_kept():
    kept = pod(attempt=0, code=0, message=PREPARED, phase="Running", held=True)
    planned = decide(job(), observed(child(attempt=0), kept), PREPARING)
    assert names(planned) == ["job-1"]
    assert [c.attempt for c in planned.delete] == [0]
    failed = pod(attempt=0, code=40, word="no such column", phase="Running", held=True)
    planned = decide(job(), observed(child(attempt=0), failed), PREPARING)
    assert planned.status.state == "Failed"
    assert [c.attempt for c in planned.delete] == [0]
