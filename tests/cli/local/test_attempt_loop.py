"""Conclusions of an attempt from the end of its process."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from qlora_api.contract import ExitCode, TerminationMessage
from qlora_api.status import Attempt, Progress, Reason
from qlora_cli.local.attempt_loop import ProcessEnd, close_attempt
from qlora_cli.local.trainer_process import StopSignal

BEGAN, ENDED = (datetime(2026, 1, 1, hour, tzinfo=UTC) for hour in (1, 2))
ATTEMPT = Attempt(number=1, world_size=2, micro_batch_size=4, gradient_accumulation_steps=2, start_time=BEGAN)
PAUSE = 4


@pytest.mark.parametrize(
    ("stopped", "step", "reason"),
    [
        pytest.param(StopSignal.NONE, PAUSE, Reason.SUSPENDED, id="paused"),
        pytest.param(StopSignal.ASKED, PAUSE, Reason.SUSPENDED, id="told-to-stop-at-the-pause"),
        pytest.param(StopSignal.ASKED, PAUSE - 1, Reason.PREEMPTED, id="told-to-stop-before"),
        pytest.param(StopSignal.KILLED, PAUSE, Reason.PREEMPTED, id="killed-at-the-pause"),
    ],
)
def test_only_an_attempt_that_saved_its_checkpoint_at_the_pause_is_suspended(stopped, step, reason):
    """A killed process may have left its message, and lost the checkpoint of that step."""
    message = TerminationMessage(
        exit_code=ExitCode.PREEMPTED, reason=Reason.PREEMPTED, message="told to stop", progress=Progress(step=step)
    )
    ended = ProcessEnd(int(ExitCode.PREEMPTED), stopped, message, None)
    found = close_attempt(ATTEMPT, ended, Path("log.txt"), ENDED, PAUSE)
    assert (found.reason, found.last_step, found.end_time) == (reason, step, ENDED)
