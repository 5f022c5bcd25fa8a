"""Processes of ranks: the first failure ends them all, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from qlora_trainer.worker.rank_processes import InterruptedBySignalError, run_ranks
from testing.timeouts import PATIENCE_SECONDS

PYTHON = (sys.executable, "-S", "-c")
"""-S: ready in milliseconds."""
BY_RANK = "import os, signal, time; rank = int(os.environ['RANK']); "
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN); "


def ranks(code: str, count: int = 2, grace_seconds: float = PATIENCE_SECONDS) -> dict[int, int]:
    environments = {rank: {**os.environ, "RANK": str(rank)} for rank in range(4, 4 + count)}
    return run_ranks((*PYTHON, BY_RANK + code), environments, grace_seconds)


@pytest.fixture(autouse=True)
def nothing_is_left():
    before = set(psutil.Process().children(recursive=True))
    yield
    assert set(psutil.Process().children(recursive=True)) <= before


def test_ranks_that_all_end_well_are_waited_for():
    assert ranks("time.sleep(0.3 * (rank == 5))") == {}


@pytest.mark.parametrize(("end", "code"), [("os._exit(41)", 41), ("os.kill(os.getpid(), signal.SIGKILL)", -9)])
def test_the_first_failure_is_told_and_the_others_are_asked_to_end(end, code):
    assert ranks(f"{end} if rank == 5 else time.sleep({PATIENCE_SECONDS})") == {5: code}


def test_who_does_not_hear_is_killed_after_its_grace(tmp_path):
    ready = tmp_path / "deaf"
    wait = f"[time.sleep(0.01) for _ in iter(lambda: os.path.exists({str(ready)!r}), True)]; os._exit(1)"
    deaf = f"{DEAF} open({str(ready)!r}, 'w').close(); time.sleep({PATIENCE_SECONDS})"
    code = f"exec({wait!r} if rank == 4 else {deaf!r})"
    assert ranks(code, grace_seconds=0.5) == {4: 1}


def test_a_rank_that_cannot_be_started_ends_those_that_were():
    environments = {0: dict(os.environ), 1: {"NOT VALID\0": ""}}
    with pytest.raises(ValueError, match=r"null byte|illegal"):
        run_ranks((*PYTHON, f"import time; time.sleep({PATIENCE_SECONDS})"), environments, PATIENCE_SECONDS)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_that_ends_the_launcher_ends_its_ranks(number, tmp_path):
    ready = tmp_path / "ready"
    program = (
        "import os, sys\n"
        "from qlora_trainer.worker.rank_processes import InterruptedBySignalError, run_ranks\n"
        f"code = \"import time; open({str(ready)!r}, 'w').close(); time.sleep({PATIENCE_SECONDS})\"\n"
        "try:\n"
        f"    run_ranks((sys.executable, '-S', '-c', code), {{0: dict(os.environ)}}, {PATIENCE_SECONDS})\n"
        "except InterruptedBySignalError as error:\n"
        "    sys.exit(128 + error.number)\n"
    )
    launcher = subprocess.Popen([sys.executable, "-c", program])
    until = time.monotonic() + PATIENCE_SECONDS
    while not ready.exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    children = psutil.Process(launcher.pid).children()
    launcher.send_signal(number)
    assert launcher.wait(PATIENCE_SECONDS) == 128 + number
    assert [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE] == []


def test_handlers_are_as_they_were():
    before = signal.getsignal(signal.SIGINT)
    ranks("os._exit(0)")
    assert signal.getsignal(signal.SIGINT) is before
    assert str(InterruptedBySignalError(2)) == "SIGINT"
