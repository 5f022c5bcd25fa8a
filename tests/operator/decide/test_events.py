from __future__ import annotations

from qlora_api.spec import SinkType
from qlora_api.status import QLoRAJobStatus, TrackedRun
from qlora_operator.decide.attempts.attempt_history import differ_in_figures
from qlora_operator.decide.events import ranks, transitions


def status(message):
    return QLoRAJobStatus(tracking=[TrackedRun(type=SinkType.MLFLOW, url="https://mlflow/1", message=message)])


def test_that_a_tracking_tool_lags_behind_is_no_figure_and_so_written_with_its_event():
    well, behind, other = status(""), status("no answer"), status("still no answer")
    assert not differ_in_figures(well, behind)
    assert not differ_in_figures(behind, well)
    assert differ_in_figures(behind, other)


def test_a_tracking_tool_that_lags_behind_is_told_of_once_and_when_it_has_caught_up():
    well, behind, other = status(""), status("no answer"), status("still no answer")
    assert [*transitions(QLoRAJobStatus(), well)] == []
    (note,) = transitions(well, behind)
    assert (note.kind, note.reason) == ("Warning", "TrackingBehind")
    assert note.message == "MLflow does not have the newest steps: no answer"
    assert [*transitions(behind, other)] == []
    (note,) = transitions(other, well)
    assert (note.kind, note.reason) == ("Normal", "TrackingRecovered")


def test_one_rank_is_no_plural():
    assert [ranks(1), ranks(8)] == ["1 rank", "8 ranks"]
