"""Reports and termination messages of pods: what is taken, and what is left out."""

from __future__ import annotations

import json

import pytest
from pydantic.alias_generators import to_snake

from qlora_api.status import Reason
from qlora_api.untrusted.printable import is_printable, printable
from qlora_operator.state.reports import ReportError, read_report, read_termination_message
from services.hostile_rank import NOT_A_VALUE, REPORT, TERMINAL

WORD = {"exitCode": 0, "reason": "Completed", "message": "step 10 of 10"}
PREPARED = {
    "modelRevision": "r",
    "dataHash": "d",
    "trainRows": 1,
    "trainTokens": 9,
    "trainSequences": 1,
    "gradientCheckpointing": True,
    "batch": {"worldSize": 1, "microBatchSize": 2, "gradientAccumulationSteps": 8},
}
FIGURES = ("epoch", "loss", "learningRate", "tokensPerSecond")
JUNK = {f"key{number}": number for number in range(40)}


def report(**changes):
    return read_report(json.dumps({**REPORT, **changes}).encode())


def word(**more):
    return read_termination_message(json.dumps({**WORD, **more}))


@pytest.mark.parametrize("text", ["n/a", "nan", "inf", "-inf", "1e999", "1_0", " 1", "٣", ""])
def test_a_figure_that_is_no_number_is_left_out_and_the_rest_is_read(text):
    assert report(loss=text).loss is None
    assert report(loss=text).step == 3
    assert report(epoch=text).epoch == "0"
    assert word(progress={"step": 10, "loss": text}).progress.loss is None


@pytest.mark.parametrize("name", ["step", "totalSteps", "etaSeconds", "firstStep", "longestStepSeconds", "attempt"])
@pytest.mark.parametrize("value", [-1, 2**53, 10**30, "many", [], {}], ids=str)
def test_a_count_out_of_bounds_is_no_report(name, value):
    with pytest.raises(ReportError):
        report(**{name: value})


@pytest.mark.parametrize("seconds", [-1, 2**40, "long", []], ids=str)
def test_a_time_in_a_stage_out_of_bounds_is_no_report(seconds):
    with pytest.raises(ReportError):
        report(stageSeconds=seconds)


@pytest.mark.parametrize(("stage", "read"), [("s" * 5000, "s" * 128), ("", None), (7, None), (["a"], None)])
def test_a_name_of_a_stage_is_cut_or_none(stage, read):
    assert report(stage=stage).stage == read


@pytest.mark.parametrize("value", NOT_A_VALUE)
def test_what_is_no_value_raises_no_other_error_gives_no_figure_and_changes_no_other_field(value):
    honest = report()
    for name in REPORT:
        field, text = to_snake(name), json.dumps({**REPORT, name: "@"}).replace('"@"', value)
        try:
            found = read_report(text.encode(errors="replace"))
        except ReportError:
            continue
        assert found.model_dump(exclude={field}) == honest.model_dump(exclude={field})
        if name in FIGURES:
            assert getattr(found, field) in (None, "0")


def test_no_text_of_a_message_controls_a_terminal():
    message = word(message=f"bad {TERMINAL}", prepared={**PREPARED, "modelRevision": TERMINAL})
    assert message.message == f"bad {printable(TERMINAL)}"
    assert is_printable(message.message)
    assert is_printable(message.prepared.model_revision)


def test_components_are_a_closed_set_of_names():
    sizes = {**JUNK, "peak": 7, "logits": -1, "gradients": 2**60, "activations": "8"}
    assert report(memory={"measured": sizes, "predicted": sizes}).memory.measured == {"peak": 7}
    assert word(memory={"measured": sizes}).memory.measured == {"peak": 7}
    assert word(prepared={**PREPARED, "memory": sizes}).prepared.memory == {"peak": 7}


@pytest.mark.parametrize(
    "more", [{"sectionSeconds": JUNK}, {"sectionSeconds": 7}, {"slowest": {"node": "x" * 9_000}}, JUNK], ids=str
)
def test_what_a_report_has_for_people_alone_is_neither_checked_nor_kept(more):
    assert report(**more) == report()


@pytest.mark.parametrize(
    "figures", [{"progress": {"step": -1}}, {"progress": "none"}, {"memory": 7}, {"memory": {"measured": "?"}}], ids=str
)
def test_figures_take_nothing_else_of_a_termination_message_away(figures):
    said = word(**figures)
    assert (said.exit_code, said.reason, said.message) == (0, Reason.COMPLETED, "step 10 of 10")


@pytest.mark.parametrize(
    "changes",
    [
        {"expectedGpuHours": "n/a"},
        {"expectedGpuHours": "1e999"},
        {"trainRows": 10**30},
        {"batch": {}},
        {"seconds": "?"},
    ],
    ids=str,
)
def test_a_plan_is_taken_whole_or_not_at_all(changes):
    assert word(prepared=PREPARED).prepared is not None
    assert word(prepared={**PREPARED, **changes}).prepared is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 4000, '{"a":' * 700, "Traceback …", "\ud800"])
def test_what_is_no_termination_message_is_none(text):
    assert read_termination_message(text) is None


def test_of_runs_in_tracking_tools_those_that_can_be_read_are_taken_once_each():
    run = {"type": "MLflow", "url": "https://mlflow/1", "message": ""}
    found = [run, {"type": "Other"}, 3, {**run, "url": "x" * 600}, {**run, "url": "https://other"}]
    for message in (report(tracking=found), word(tracking=found)):
        assert [each.url for each in message.tracking] == ["https://mlflow/1"]
    assert report(tracking={"type": "MLflow"}).tracking == []
