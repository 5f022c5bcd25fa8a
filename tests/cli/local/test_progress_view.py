"""Display of a training while it runs."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from qlora_api.contract import ProgressReport
from qlora_api.status import Memory
from qlora_cli.local.progress_view import (
    LiveDisplay,
    PlainDisplay,
    Poller,
    Waiting,
    Watcher,
    before_second_evaluation,
    display_for,
    plain_line,
    rows_progress,
)
from qlora_cli.text import units


def report(**more):
    fields = {"job": "quick", "attempt": 1, "section": "Train", "memory": Memory(), "step": 3, "total_steps": 9, **more}
    return ProgressReport(**fields)


def console(**more):
    return Console(file=io.StringIO(), width=120, markup=False, highlight=False, **more)


def test_only_what_is_known_is_shown():
    assert plain_line(report(section="Load", step=0)) == "Load  step 0/9"
    assert (
        plain_line(report(loss="1.5", epoch="0.33", eta_seconds=7))
        == "Train  step 3/9  epoch 0.33  loss 1.5  left 7.0 s"
    )


def test_a_rank_that_holds_up_the_others_is_shown():
    slow = {"rank": 3, "node": "b", "section": "Data", "seconds": 4.0}
    assert "rank 3 on b, 4.00 s a step, 1.00 s usual, most in Data" in plain_line(
        report(slowest={**slow, "median_seconds": 1.0})
    )
    assert "rank 3" not in plain_line(report(slowest={**slow, "median_seconds": 3.5}))
    stuck = {"rank": 5, "node": "c", "section": "Forward", "seconds": 12.0}
    assert "rank 5 on c, 12 s in Forward" in plain_line(report(waiting_for=stuck))


def test_plain_lines_come_with_events_and_not_with_every_step():
    out = console()
    display = PlainDisplay(out, 1)
    for shown in (None, report(), report(step=4), report(step=5, eval_loss="2"), report(step=6, eval_loss="2")):
        display.show(shown)
    display.show(report(step=7, eval_loss="2", section="Checkpoint"))
    display.show(report(step=8, eval_loss="2"))  # a section that was there before
    display.show(report(step=8, eval_loss="2", section="Checkpoint"))
    steps = [line.split()[2] for line in out.file.getvalue().splitlines()]
    assert steps == ["3/9", "5/9", "7/9"]


def test_a_terminal_gets_a_live_display_with_memory():
    out = console(force_terminal=True)
    display = display_for(out, 2)
    assert isinstance(display, LiveDisplay)
    with display:
        display.show(report(memory=Memory(measured={"quantizedWeights": 1 << 30, "peak": 3 << 30})))
        display.say("checkpointing …")
    said = out.file.getvalue()
    for part in ("Attempt 2", "step 3/9", "quantized weights 1.00 GiB · peak 3.00 GiB", "checkpointing …"):
        assert part in said


def test_no_terminal_gets_plain_lines():
    assert isinstance(display_for(console(), 1), PlainDisplay)


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


def ticking(*seconds):
    times = iter(seconds)
    return lambda: next(times)


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
    said = plain_line(report(section="Evaluate", section_progress=progress))
    assert said.startswith("Evaluate 12 of 86 micro-batches, 3/s  step 3/9")
    said = plain_line(report(section="Load", section_progress={**progress, "unit": "weights", "done": 0}))
    assert said.startswith("Load 0 of 86 weights  step")


@pytest.mark.parametrize(("seconds", "said"), [(420, True), (20, False)])
def test_what_a_long_run_will_take_is_said_once_before_its_first_step(seconds, said):
    reports = iter([report(step=0), *[report(step=0, total_steps=206, expected_seconds=seconds)] * 2])
    out = console()
    watcher = Watcher(SimpleNamespace(ask=lambda: next(reports)), PlainDisplay(out, 1), None, poll_seconds=0)
    for _ in range(3):
        watcher.tick()
    expected = "206 steps are to be done: about 7 min 0 s on this machine, by one trial step, evaluations included"
    assert out.file.getvalue().count(expected) == said


def test_a_process_that_reports_nothing_shows_for_how_long_it_works():
    out = console()
    with Waiting(out, "Preparing …", ticking(0, 0, 4, 10, 12)) as waiting:
        for _ in range(3):
            waiting.tick()
    assert out.file.getvalue().splitlines() == ["Preparing …", "Preparing … 10 s"]


def test_how_far_the_rows_are_is_taken_from_prepares_log(tmp_path):
    progress_line = pytest.importorskip("qlora_trainer.data.collect").progress_line
    log = tmp_path / "log.txt"
    assert rows_progress(log) is None
    log.write_text("2026-11-28 08:00:00 rank 0 INFO of no rows\n" * 9)
    assert rows_progress(log) is None
    with log.open("a") as file:
        for seconds in (10, 20):
            file.write(
                f"rank 0 INFO {progress_line('/data/rows', 81234 * seconds, seconds * 10**7, 10**10, seconds)}\n"
            )
    said = "1,624,680 rows, 200 of 10,000 MB, 10.0 MB/s, about 16 min left"
    assert rows_progress(log) == said
    out = console()
    with Waiting(out, "Preparing …", ticking(0, 0, 20), lambda: rows_progress(log)) as waiting:
        waiting.tick()
    assert out.file.getvalue().splitlines() == [f"Preparing …: {said}", f"Preparing … 20 s: {said}"]
