"""The stage of a job in its status: as Prepare or rank 0 reports it, once, and gone with what did it."""

from __future__ import annotations

from datetime import timedelta

import pytest

from operator_builders import NOW, PREPARING, child, decide, job, observed, pod, running
from qlora_api.contract import ProgressReport
from qlora_api.status import JobStage, Memory, QLoRAJobStatus
from qlora_operator.decide.attempts.attempt_history import differ_in_figures
from qlora_operator.state.observed import JobState

TOKENIZING = JobStage(name="tokenizing the rows", start_time=NOW)
SAME, OTHER = NOW + timedelta(seconds=4), NOW + timedelta(seconds=60)


def report(attempt=0, section="Prepare", stage="tokenizing the rows"):
    return ProgressReport(job="job", attempt=attempt, section=section, stage=stage, memory=Memory())


def preparing(status=None, *, ready=True, **more):
    """Decide on a job whose Prepare has a pod."""
    return decide(job(status), observed(child(attempt=0), pod(attempt=0, ready=ready), **more), PREPARING)


def prepared_message(status):
    return next(c.message for c in status.conditions if c.type == "Prepared")


def test_a_prepare_that_works_is_asked_and_its_stage_is_in_status_and_message():
    asked = preparing()
    assert (asked.watch_progress, asked.status.stage) == (True, None)
    told = preparing(asked.status, report=report(), stage_start=NOW)
    assert (told.status.reason, told.status.stage) == ("Preparing", TOKENIZING)
    assert prepared_message(told.status).startswith("tokenizing the rows: model and rows are checked")


def test_a_pod_of_prepare_that_does_not_run_yet_is_not_asked_and_has_no_stage():
    decided = preparing(QLoRAJobStatus(stage=TOKENIZING), ready=False)
    assert (decided.watch_progress, decided.status.stage) == (False, None)


@pytest.mark.parametrize(("start", "kept"), [(SAME, NOW), (OTHER, OTHER)], ids=["same", "again"])
def test_an_operator_that_starts_again_writes_nothing_new_of_the_same_stage(start, kept):
    decided = preparing(QLoRAJobStatus(stage=TOKENIZING), report=report(), stage_start=start)
    assert decided.status.stage == JobStage(name="tokenizing the rows", start_time=kept)


def test_until_the_pod_is_asked_the_stage_is_as_it_was():
    assert preparing(QLoRAJobStatus(stage=TOKENIZING)).status.stage == TOKENIZING


def test_a_stage_goes_with_prepare():
    status = preparing(report=report(), stage_start=NOW).status
    ended = observed(child(attempt=0, state=JobState.FAILED), pod(attempt=0, code=40, word="no such column"))
    assert decide(job(status), ended, PREPARING).status.stage is None


@pytest.mark.parametrize(
    ("section", "stage", "name"),
    [
        ("Load", "quantizing", "quantizing"),
        ("Load", None, "loading the model"),
        ("Evaluate", None, "evaluating"),
        ("Train", None, None),
        ("Data", None, None),
    ],
)
def test_what_a_rank_does_besides_training_steps_is_a_stage(section, stage, name):
    told = report(1, section, stage)
    status = decide(job(running()), observed(child(ready=1), pod(), report=told, stage_start=NOW)).status
    assert status.stage == (JobStage(name=name, start_time=NOW) if name else None)
    message = next(c.message for c in status.conditions if c.type == "Running")
    assert message.endswith(f"on node-0, {name or 'training'}")


def test_a_report_of_prepare_is_none_of_the_attempt():
    decided = decide(job(running()), observed(child(ready=1), pod(), report=report(), stage_start=NOW))
    assert decided.status.stage is None


def test_a_stage_can_wait_for_the_next_write():
    assert differ_in_figures(QLoRAJobStatus(), QLoRAJobStatus(stage=TOKENIZING))
