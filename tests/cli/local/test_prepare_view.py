"""Display of Prepare's stages."""

import pytest

from cli_builders import console, ticking
from qlora_cli.local.prepare_view import PrepareDisplay, PrepareLog, PrepareProgress


def test_stages_are_shown_as_they_begin_with_their_time_and_summed_up(tmp_path):
    log, out = tmp_path / "log.txt", console()
    times = ticking(0, 0, 9, 10, 16, 21, 22)
    with PrepareDisplay(out, log, times) as display:
        display.tick()
        log.write_text("rank 0 INFO stage: importing PyTorch\n")
        display.tick()
        display.tick()  # nothing new
        log.write_text(f"{log.read_text()}rank 0 INFO stage: tokenizing the rows\n")
        display.tick()
        display.tick()
    assert out.file.getvalue().splitlines() == [
        "Preparing (model and rows are checked before any rank starts)",
        "Preparing: starting",
        "Preparing: importing PyTorch",
        "Preparing: tokenizing the rows",
    ]
    assert display.summary() == ("Prepared in 22 s: starting 9.0 s, importing PyTorch 7.0 s, tokenizing the rows 6.0 s")


def test_how_far_the_rows_are_is_taken_from_prepares_log(tmp_path):
    progress_line = pytest.importorskip("qlora_trainer.data.collect").progress_line
    log = tmp_path / "log.txt"
    seen = PrepareLog(log)
    assert seen.progress() == PrepareProgress()
    log.write_text("2026-11-28 08:00:00 rank 0 INFO of no rows\nrank 0 INFO stage: tokenizing the rows\n")
    assert seen.progress() == PrepareProgress("tokenizing the rows")
    with log.open("a") as file:
        for seconds in (10, 20):
            shown = progress_line("/data/rows", 81234 * seconds, seconds * 10**7, 10**10, seconds)
            file.write(f"rank 0 INFO {shown}\n")
    rows = "1,624,680 rows, 200 of 10,000 MB, 10.0 MB/s, about 16 min left"
    assert seen.progress() == PrepareProgress("tokenizing the rows", rows)
    out = console()
    with PrepareDisplay(out, log, ticking(0, 0, 20)) as display:
        display.tick()
        display.tick()
    assert out.file.getvalue().splitlines()[1:] == [
        f"Preparing: tokenizing the rows: {rows}",
        f"Preparing: tokenizing the rows, 20 s: {rows}",
    ]


def test_a_stage_of_the_past_shows_no_progress_of_rows(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("7 rows, 2 of 10 MB, 1.0 MB/s, about 1 min left\nstage: fetching the rows\n")
    assert PrepareLog(log).progress() == PrepareProgress("fetching the rows")


def test_a_stage_is_shown_whatever_the_log_says_after_it(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("stage: tokenizing the rows\n" + "WARNING of a library\n" * 10_000)
    assert PrepareLog(log).progress() == PrepareProgress("tokenizing the rows")


def test_each_look_reads_only_what_is_new_in_whole_lines(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("stage: fetching the rows\n10%\rstage: toke")
    seen = PrepareLog(log)
    assert seen.progress() == PrepareProgress("fetching the rows")
    log.write_bytes(bytes(len("stage: fetching the rows\n10%\r")) + b"stage: tokenizing the rows\n")
    assert seen.progress() == PrepareProgress("tokenizing the rows")
