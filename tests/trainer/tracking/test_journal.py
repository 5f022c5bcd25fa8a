from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from qlora_trainer.reporting.training_history import TrainingHistory
from qlora_trainer.tracking.journal import Journal, RowReader, encoded, end_line


@pytest.fixture
def journal():
    with ExitStack() as stack:
        yield lambda path: stack.enter_context(closing(Journal(path)))


def test_a_resumed_history_gives_each_step_once_and_a_step_when_it_is_complete(tmp_path, journal):
    first = TrainingHistory()
    first.attempt(1, 0)
    first.evaluation(0, 3.0)
    first.step(1, loss=2.0)
    first.step(2, loss=1.5)
    path = tmp_path / "second"
    second, reader = TrainingHistory(journal(path)), RowReader(path)
    second.resume(first.to_bytes())
    second.attempt(2, 2)
    assert [(row.step, dict(row.metrics)) for row in reader.read()] == [
        (0, {"eval/loss": 3.0}),
        (1, {"train/loss": 2.0}),
    ]
    second.evaluation(2, 1.25)  # of the step that the attempt began with
    assert reader.read() == []
    second.step(3, loss=1.0)
    assert [dict(row.metrics) for row in reader.read()] == [{"train/loss": 1.5, "eval/loss": 1.25}]
    with path.open("ab") as file:
        file.write(encoded(end_line(0, "s3://a"))[:-1])
    assert reader.read() == []  # half a line
    with path.open("ab") as file:
        file.write(b"\n")
    assert [row.step for row in reader.read()] == [3]
    assert (reader.exit_code, reader.adapter, len(reader.attempts)) == (0, "s3://a", 2)


def test_an_attempt_that_ends_early_leaves_its_last_step_to_the_next_one(tmp_path, journal):
    history, reader = TrainingHistory(journal(tmp_path / "journal")), RowReader(tmp_path / "journal")
    history.step(1, loss=2.0)
    with (tmp_path / "journal").open("ab") as file:
        file.write(encoded(end_line(43, "")))
    assert reader.read() == []
    assert reader.exit_code == 43


def test_a_disk_that_fails_ends_the_journal_and_not_the_training(caplog):
    journal = Journal(Path("/dev/full"))
    journal.write([{"step": 1}])
    journal.write([{"step": 2}])
    assert "tracking tools get no more steps" in caplog.text


def test_a_journal_that_cannot_be_opened_does_not_end_the_training(tmp_path, caplog):
    journal = Journal(tmp_path)  # a folder
    journal.write([{"step": 1}])
    journal.close()
    assert "tracking tools get no more steps" in caplog.text
