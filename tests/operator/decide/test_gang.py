"""Gang scheduling: the pods of a job start together."""

from __future__ import annotations

import pytest

from qlora_api.spec import Gang, SchedulingSpec
from qlora_operator.decide.gang import cannot_start, choose_gang

AUTO, NATIVE, KUEUE, VOLCANO, NONE = Gang.AUTO, Gang.NATIVE, Gang.KUEUE, Gang.VOLCANO, Gang.NONE


@pytest.mark.parametrize(
    ("of_the_job", "of_the_operator", "offered", "chosen"),
    [
        pytest.param({}, AUTO, [], NONE, id="nothing-there"),
        pytest.param({}, AUTO, [VOLCANO, NATIVE], NATIVE, id="kubernetes-own-first"),
        pytest.param({}, AUTO, [KUEUE], NONE, id="kueue-only-with-a-queue"),
        pytest.param({"queue": "team"}, AUTO, [KUEUE, NATIVE], KUEUE, id="a-named-queue"),
        pytest.param({"queue": "team"}, AUTO, [VOLCANO], VOLCANO, id="a-queue-of-volcano"),
        pytest.param({}, VOLCANO, [NATIVE], VOLCANO, id="the-operators-choice"),
        pytest.param({"gang": "None"}, VOLCANO, [NATIVE], NONE, id="the-jobs-choice-counts-most"),
    ],
)
def test_the_gang_is_the_jobs_choice_or_the_operators_or_what_is_there(of_the_job, of_the_operator, offered, chosen):
    assert choose_gang(SchedulingSpec.model_validate(of_the_job), of_the_operator, offered) is chosen


def test_a_choice_that_cannot_be_had_is_named_with_what_can():
    queued = SchedulingSpec(queue="team")
    assert cannot_start(queued, NONE, []) == ""
    assert cannot_start(queued, KUEUE, [KUEUE]) == ""
    said = cannot_start(queued, KUEUE, [NATIVE, VOLCANO])
    assert said.startswith("gang Kueue (spec.scheduling.gang, or")
    assert said.endswith("offered here: Native, Volcano")


@pytest.mark.parametrize("offered", [[KUEUE], []], ids=["kueue-is-there", "kueue-is-not-there"])
def test_a_job_that_would_wait_for_kueue_for_ever_is_told_to_name_a_queue(offered):
    said = cannot_start(SchedulingSpec(), choose_gang(SchedulingSpec(), KUEUE, offered), offered)
    assert said.startswith("spec.scheduling.queue: must name a LocalQueue")
    assert cannot_start(SchedulingSpec(), choose_gang(SchedulingSpec(), AUTO, offered), offered) == ""
