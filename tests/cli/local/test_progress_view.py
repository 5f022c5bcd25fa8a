"""Display of a training while it runs."""

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from cli_builders import console, ticking
from qlora_api.contract import ProgressReport
from qlora_api.status import Memory
from qlora_cli.local.progress_view import (
    LiveDisplay,
    PlainDisplay,
    Poller,
    StageTimer,
    Watcher,
    before_second_evaluation,
    display_for,
    plain_line,
    within_section,
)
from qlora_cli.text import units


def report(**more):
    fields = {"job": "quick", "attempt": 1, "section": "Train", "memory": Memory(), "step": 3, "total_steps": 9, **more}
    return ProgressReport(**fields)


def test_only_what_is_known_is_shown():
    assert plain_line(report(step=0), "loading the model") == "loading the model  step 0/9"
    shown = plain_line(report(loss="1.5", epoch="0.33", eta_seconds=7), "training")
    assert shown == "training  step 3/9  epoch 0.33  loss 1.5  left 7.0 s"


def test_a_rank_that_holds_up_the_others_is_shown():
    slow = {"rank": 3, "node": "b", "section": "Data", "seconds": 4.0}
    assert "rank 3 on b, 4.00 s a step, 1.00 s usual, most in Data" in plain_line(
        report(slowest={**slow, "median_seconds": 1.0}), "training"
    )
    assert "rank 3" not in plain_line(report(slowest={**slow, "median_seconds": 3.5}), "training")
    stuck = {"rank": 5, "node": "c", "section": "Forward", "seconds": 12.0}
    assert "rank 5 on c, 12 s in Forward" in plain_line(report(waiting_for=stuck), "training")


def test_plain_lines_come_with_events_and_not_with_every_step():
    out = console()
    display = PlainDisplay(out, 1)
    for shown in (None, report(), report(step=4), report(step=5, eval_loss="2"), report(step=6, eval_loss="2")):
        display.show(shown)
    display.show(report(step=7, eval_loss="2", section="Checkpoint"))
    display.show(report(step=8, eval_loss="2"))  # a section that was there before
    display.show(report(step=8, eval_loss="2", section="Checkpoint"))
    steps = re.findall(r"step (\S+)", out.file.getvalue())
    assert steps == ["3/9", "5/9", "7/9"]


def test_a_terminal_gets_a_live_display_with_memory():
    out = console(force_terminal=True)
    display = display_for(out, 2, "CUDA")
    assert isinstance(display, LiveDisplay)
    with display:
        display.show(report(memory=Memory(measured={"quantizedWeights": 1 << 30, "peak": 3 << 30})))
        display.say("checkpointing …")
    said = out.file.getvalue()
    for part in (
        "Attempt 2",
        "step 3/9",
        "peak 3.00 GiB: quantized weights 1.00 GiB · not measured separately 2.00 GiB",
        "checkpointing …",
    ):
        assert part in said


def test_no_terminal_gets_plain_lines():
    assert isinstance(display_for(console(), 1, "CPU"), PlainDisplay)


@pytest.mark.parametrize("content", [None, "", "nonsense", "1"])
def test_a_rank_that_does_not_answer_is_no_error(tmp_path, content):
    if content is not None:
        (tmp_path / "rank-0.port").write_text(content)
    poller = Poller(tmp_path)
    assert poller.ask() is None
    poller.close()


@pytest.mark.parametrize(
    ("seen", "every_steps", "want"),
    [
        pytest.param(report(step=3), 4, True, id="before-the-second"),
        pytest.param(report(step=4), 4, False, id="at-the-second"),
        pytest.param(report(step=3, epoch="0.9"), None, True, id="first-epoch"),
        pytest.param(report(step=3, epoch="1.0"), None, False, id="epoch-done"),
        pytest.param(report(step=3, first_step=2), 4, False, id="resumed"),
    ],
)
def test_the_loss_before_training_is_only_taken_when_it_must_be_that(seen, every_steps, want):
    assert before_second_evaluation(seen, every_steps) is want


@pytest.mark.parametrize(
    ("value", "want"),
    [(0.04, "0.0 s"), (9.96, "10.0 s"), (59.7, "1 min 0 s"), (75, "1 min 15 s"), (7500, "2 h 5 min")],
)
def test_durations(value, want):
    assert units.duration(value) == want


@pytest.mark.parametrize(
    ("value", "want"), [(512, "512 B"), (2048, "2 KiB"), (3 << 29, "1.50 GiB"), (5 << 40, "5.00 TiB")]
)
def test_sizes(value, want):
    assert units.size(value) == want


def test_a_warning_of_the_trainer_is_said_once():
    first, second = "BFloat16 is emulated", "the disk is nearly full"
    reports = iter([None, report(warnings=[first]), report(warnings=[first]), report(warnings=[first, second])])
    out = console()
    watcher = Watcher(SimpleNamespace(ask=lambda: next(reports)), PlainDisplay(out, 1), None, poll_seconds=0)
    for _ in range(4):
        watcher.tick()
    warnings = [line for line in out.file.getvalue().splitlines() if line.startswith("Warning")]
    assert warnings == [f"Warning: {first}", f"Warning: {second}"]


def test_a_rank_that_is_not_heard_yet_is_seen_to_start():
    out = console()
    with PlainDisplay(out, 1, ticking(0, 9, 10, 11, 20)) as display:
        for _ in range(4):
            display.show(None)
    lines = out.file.getvalue().splitlines()
    assert lines == [
        "Attempt 1: starting: the ranks import PyTorch and meet",
        "Attempt 1: starting: the ranks import PyTorch and meet, 10 s",
        "Attempt 1: starting: the ranks import PyTorch and meet, 20 s",
    ]


def test_a_section_of_known_length_shows_how_far_it_is_and_how_fast():
    progress = {"unit": "micro-batches", "done": 12, "total": 86, "seconds": 4.0}
    said = within_section(report(section="Evaluate", section_progress=progress))
    assert said == "evaluating: 12 of 86 micro-batches, 3/s"
    loading = {"section": "Load", "stage": "quantizing", "section_progress": {**progress, "unit": "weights", "done": 0}}
    assert within_section(report(**loading)) == "quantizing: 0 of 86 weights"


def test_a_stage_shows_for_how_long_it_has_gone_on():
    stage = StageTimer(ticking(1, 1.5, 9, 10, 30))
    load = report(section="Load", stage="setting up DeepSpeed")
    assert [stage.describe(load), stage.describe(load)] == ["setting up DeepSpeed", "setting up DeepSpeed, 8.0 s"]
    assert stage.describe(report(section="Evaluate")) == "evaluating, 20 s"


def test_no_line_of_the_live_display_is_longer_than_the_screen():
    out = Console(file=io.StringIO(), width=80, force_terminal=True)
    display = LiveDisplay(out, 1, "CPU")
    progress = {"unit": "micro-batches", "done": 12, "total": 86, "seconds": 4.0}
    measured = {"unquantizedWeights": 1 << 30, "quantizedWeights": 1 << 30, "optimizerState": 9 << 20, "peak": 3 << 30}
    shown = report(
        section="Evaluate",
        section_progress=progress,
        loss="1.5",
        eval_loss="1.6",
        learning_rate="0.0002",
        tokens_per_second="1234.5",
        eta_seconds=4000,
        memory=Memory(measured=measured),
    )
    plain = Console(file=io.StringIO(), width=80)
    plain.print(display._render(shown))
    lines = plain.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if "…" in line]
    assert "left 1 h 6 min" in plain.file.getvalue()
    assert "peak of the process (CPU) 3.00 GiB" in plain.file.getvalue()


@pytest.mark.parametrize(("seconds", "said"), [(420, True), (20, False)])
def test_what_a_long_run_will_take_is_said_once_before_its_first_step(seconds, said):
    reports = iter([report(step=0), *[report(step=0, total_steps=206, expected_seconds=seconds)] * 2])
    out = console()
    watcher = Watcher(SimpleNamespace(ask=lambda: next(reports)), PlainDisplay(out, 1), None, poll_seconds=0)
    for _ in range(3):
        watcher.tick()
    expected = "206 steps are to be done: about 7 min 0 s on this machine, by one trial step, evaluations included"
    assert out.file.getvalue().count(expected) == said
