"""Several workers (pods) of one attempt, as launchers on this machine that know each other by index and port alone."""

from __future__ import annotations

import shutil
import signal

import psutil
import pytest
from worker_pods import losses

from qlora_api.contract import ExitCode
from qlora_api.status import Reason
from qlora_trainer.publish.publisher import verify_published

pytestmark = pytest.mark.ranks


STEPS = {"training": {"epochs": None, "maxSteps": 4}}
ENDLESS = {"training": {"epochs": None, "maxSteps": 5000}}


def test_workers_that_start_apart_train_as_one_and_publish_once(pods, runner):
    first, second = pods(ranks=1, **STEPS)
    first.start()
    first.until("waiting for 1 of 2 workers: 1")
    second.start()
    (code, word), (other_code, other_word) = first.end(), second.end()
    assert (code, other_code) == (ExitCode.DONE, ExitCode.DONE), first.log[-2000:] + second.log[-2000:]
    assert verify_published(word.adapter.manifest_uri) == []
    assert other_word is None, "rank 0 alone has the termination message of a job that is done"
    for name in ("out", "checkpoints"):
        shutil.rmtree(runner.folder / name)
    alone = runner.run(runner.config(ranks=2, attempt=2, **STEPS))
    assert [f"{loss:.6f}" for loss in alone.losses.values()] == losses(first.log)


def test_sigterm_at_one_worker_checkpoints_on_all_and_both_are_preempted(pods):
    both = [pod.start() for pod in pods(ranks=2, **ENDLESS)]
    both[0].until(" step 2/")
    both[1].process.send_signal(signal.SIGTERM)
    ends = [pod.end() for pod in both]
    assert [code for code, _ in ends] == [ExitCode.PREEMPTED] * 2, both[0].log[-2000:]
    assert all(word.reason is Reason.PREEMPTED and "a checkpoint is written" in word.message for _, word in ends)
    assert ends[0][1].progress.step == ends[1][1].progress.step


def test_a_killed_rank_is_told_by_its_worker_and_the_other_worker_says_that_it_lost_it(pods):
    both = [pod.start() for pod in pods(ranks=1, **ENDLESS)]
    both[0].until(" step 2/")
    both[1].rank(1).kill()
    (suffered_code, suffered), (code, word) = (pod.end() for pod in both)
    assert "rank 1 on node-1 was killed by SIGKILL" in word.message
    assert code == ExitCode.CRASHED
    assert suffered_code == ExitCode.PEER_LOST, both[0].log[-2000:]
    assert suffered.reason is Reason.PEER_LOST
    assert "worker 1 on node-1 ended as" in suffered.message
    assert "rank 1 on node-1 was killed by SIGKILL" in suffered.message


def test_a_worker_whose_whole_pod_is_gone_is_missed_at_once(pods):
    both = [pod.start() for pod in pods(ranks=1, **ENDLESS)]
    both[0].until(" step 2/")
    for process in (*psutil.Process(both[0].process.pid).children(), psutil.Process(both[0].process.pid)):
        process.kill()
    code, word = both[1].end()
    assert code == ExitCode.PEER_LOST, both[1].log[-2000:]
    assert word.reason is Reason.PEER_LOST


def test_a_worker_that_never_comes_is_named(pods):
    first, _ = pods(ranks=1, policy={"stallTimeoutSeconds": 30}, **STEPS)
    first.start()
    code, word = first.end()
    assert code == ExitCode.STALLED
    assert "1 of 2 workers: 1 did not come" in word.message
    assert "stallTimeoutSeconds" in word.message


def test_sigterm_while_workers_are_waited_for_ends_all_that_wait(pods):
    three = pods(workers=3, ranks=1, training={"globalBatchSize": 6, "epochs": 1})
    waiting = [pod.start() for pod in three[:2]]
    waiting[1].until("waiting for 1 of 3 workers: 2")
    waiting[1].process.send_signal(signal.SIGTERM)
    ends = [pod.end() for pod in waiting]
    assert [code for code, _ in ends] == [ExitCode.PREEMPTED] * 2, waiting[0].log + waiting[1].log


def test_a_stopped_rank_is_named_by_its_own_worker_and_quoted_by_the_other(pods):
    both = [pod.start() for pod in pods(ranks=1, policy={"stallTimeoutSeconds": 30}, **ENDLESS)]
    both[0].until(" step 2/")
    both[1].rank(1).suspend()
    (suffered_code, suffered), (code, word) = (pod.end() for pod in both)
    assert code == ExitCode.STALLED, both[1].log[-2000:]
    assert "rank 1 on node-1 has given no sign of life" in word.message
    assert suffered_code == ExitCode.PEER_LOST, both[0].log[-2000:]
    assert "worker 1 on node-1 ended as Stalled: rank 1 on node-1" in suffered.message
