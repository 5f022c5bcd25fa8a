"""An attempt holds its job's destination, and gives it up where the job is over."""

from __future__ import annotations

import pytest

from qlora_api.contract import ExitCode, JobRef
from qlora_storage.object_store import open_store
from qlora_trainer import __main__ as worker
from qlora_trainer.publish.destination_claim import FIELD, claim_destination, release_destination
from qlora_trainer.worker import launch
from qlora_trainer.worker.stop import Stop
from testing.timeouts import PATIENCE_SECONDS

OTHER = JobRef(name="other", namespace="team", uid="9999-other")


def test_an_attempt_whose_destination_another_job_has_taken_ends_before_its_ranks_begin(workshop):
    config = workshop.config()
    assert workshop.prepare(config) == ExitCode.DONE
    release_destination(config.spec.output.destination, config.job)
    claim_destination(config.spec.output.destination, OTHER)
    ended = workshop.ended(config, workshop.launch(config).wait(timeout=PATIENCE_SECONDS))
    assert ended.code == ExitCode.USER_ERROR
    assert ended.text.startswith('spec.output.destination: "')
    assert "is claimed by job team/other" in ended.text


@pytest.mark.parametrize(
    ("code", "held"), [(ExitCode.USER_ERROR, False), (ExitCode.CRASHED, True), (ExitCode.PREEMPTED, True)]
)
def test_a_destination_is_given_up_by_an_attempt_after_which_there_is_no_other(workshop, monkeypatch, code, held):
    config = workshop.config()
    path, _ = workshop.write(config)
    assert workshop.prepare(config) == ExitCode.DONE
    monkeypatch.setattr(launch, "launch", lambda *_: code)
    assert worker.run(config, path, Stop()) == code
    claims = [open_store(config.spec.output.destination, FIELD).get(key) for key, _ in _claims(config)]
    assert [b'"released":false' in claim for claim in claims] == [held]


def _claims(config):
    return open_store(config.spec.output.destination, FIELD).list(".claims")
