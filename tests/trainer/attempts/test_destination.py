"""An attempt holds its job's destination, and gives it up where the job is over."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from qlora_api.contract import ExitCode, JobRef
from qlora_storage.destination_claim import FIELD, FOLDER, Claim, claim_destination, release_destination
from qlora_storage.object_store import open_store
from qlora_trainer import __main__ as worker
from qlora_trainer.errors import TrainerError, UserError
from qlora_trainer.prepare import command
from qlora_trainer.worker import launch
from qlora_trainer.worker.stop import Stop
from testing.timeouts import PATIENCE_SECONDS

OTHER = JobRef(name="other", namespace="team", uid="9999-other")


def test_an_attempt_whose_destination_another_job_has_taken_ends_before_its_ranks_begin(runner):
    config = runner.config()
    assert runner.prepare(config) == ExitCode.DONE
    release_destination(config.spec.output.destination, config.job.uid)
    claim_destination(config.spec.output.destination, OTHER)
    ended = runner.ended(config, runner.launch(config).wait(timeout=PATIENCE_SECONDS))
    assert ended.code == ExitCode.USER_ERROR
    assert ended.text.startswith('spec.output.destination: "')
    assert "is claimed by job team/other" in ended.text


@pytest.mark.parametrize(
    ("code", "held"), [(ExitCode.USER_ERROR, False), (ExitCode.CRASHED, True), (ExitCode.PREEMPTED, True)]
)
def test_a_destination_is_given_up_by_an_attempt_after_which_there_is_no_other(runner, monkeypatch, code, held):
    config = runner.config()
    path, _ = runner.write(config)
    assert runner.prepare(config) == ExitCode.DONE
    monkeypatch.setattr(launch, "launch", lambda *_: code)
    assert worker.run(config, path, Stop()) == code
    assert is_held(config) == held


def change_the_base(config):
    """Change a base that a local folder holds, after it was checked."""
    with (Path(config.spec.model.source) / "config.json").open("a") as file:
        file.write("\n")


def have_a_file_for_a_cache(config):
    shutil.rmtree(config.cache_dir)
    Path(config.cache_dir).write_bytes(b"")


@pytest.mark.parametrize(
    ("harm", "words"),
    [(change_the_base, "spec.model.source: "), (have_a_file_for_a_cache, "Not a directory|File exists")],
)
@pytest.mark.parametrize("worker_index", ["0", "1"])
def test_a_destination_is_given_up_by_an_attempt_that_cannot_begin(runner, monkeypatch, harm, words, worker_index):
    monkeypatch.setenv("JOB_COMPLETION_INDEX", worker_index)
    base = shutil.copytree(runner.model, runner.folder / "base")
    config = runner.config(model={"source": str(base)})
    path, _ = runner.write(config)
    assert runner.prepare(config) == ExitCode.DONE
    assert is_held(config)
    harm(config)
    with pytest.raises(TrainerError, match=words) as raised:
        worker.run(config, path, Stop())
    assert raised.value.exit_code == ExitCode.USER_ERROR
    assert not is_held(config)


@pytest.mark.parametrize(("code", "held"), [(ExitCode.USER_ERROR, False), (ExitCode.STORAGE_FAILED, True)])
def test_a_destination_is_given_up_by_a_prepare_whose_child_ends_for_good(runner, monkeypatch, code, held):
    config = runner.config()
    path, _ = runner.write(config)
    monkeypatch.setattr(sys, "argv", ["prepare", str(path)])
    assert command.main(lambda *_: code) == code
    assert is_held(config) == held


def is_held(config):
    store = open_store(config.spec.output.destination, FIELD)
    (claim,) = (Claim.model_validate_json(store.get(key)) for key, _ in store.list(FOLDER))
    return not claim.released


@pytest.mark.parametrize("below", ["", "/", "/adapters/mine"])
@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_destination_among_the_rows_is_refused_in_prepare(runner, below, split):
    folder = runner.folder / "rows"
    folder.mkdir()
    shutil.copy(runner.rows, folder)
    config = runner.config(dataset={split: {"source": str(folder)}}, output={"destination": f"{folder}{below}"})
    with pytest.raises(
        UserError, match=rf"^spec\.output\.destination: .* is the folder of spec\.dataset\.{split}\.source, "
    ):
        command.prepare(config)
    assert [path.name for path in folder.iterdir()] == [runner.rows.name]
