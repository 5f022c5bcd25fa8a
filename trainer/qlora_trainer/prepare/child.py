"""Prepare's work in a process of its own: ``python -m qlora_trainer.prepare.child CONFIG.json``

A tokenizer is a program that somebody else wrote: expressions that take exponential time, normalizers that make a
terabyte of a letter. A config.json may have a million layers. Within each call of a tokenizer, and within the stages of
:mod:`qlora_trainer.prepare.stages`, the system ends the process that goes beyond its bounds; the parent says whose
fault that was. Where a trial ended it, nothing is known of the base: Prepare is done again without one.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from pathlib import Path

from qlora_api.contract import ExitCode, TerminationMessage, TrainerConfig, reason_of
from qlora_trainer.errors import UserError
from qlora_trainer.prepare.command import run_in_process
from qlora_trainer.prepare.stages import Stage, model_error, stage_of_end
from qlora_trainer.python_process import forbid_inspection, python_command
from qlora_trainer.reporting import termination_message

log = logging.getLogger(__name__)
TOO_MUCH = {signal.SIGPROF: "processor time", signal.SIGABRT: "memory", signal.SIGSEGV: "memory"}
"""Signals that end a process that goes beyond its bounds, and what it takes too much of."""
STOPPED = frozenset({signal.SIGTERM, signal.SIGINT})
"""Signals of somebody who wants Prepare to end."""


def run_in_child(config: TrainerConfig, path: Path) -> int:
    """Do the work of a Prepare that found nothing, in a child; return the exit code."""
    code = _run(path)
    if code < 0 and -code not in STOPPED and stage_of_end(config) is Stage.TRIAL:
        log.warning(
            "%s ended the trial of the base, which says nothing of it: again without", signal.Signals(-code).name
        )
        code = _run(path)  # which sees where the last one ended
    if (error := error_of_base(config, code)) is None:
        return code if code >= 0 else 128 - code
    log.error("%s", error)
    message = TerminationMessage(exit_code=error.exit_code, reason=reason_of(error.exit_code), message=str(error))
    termination_message.write(Path(config.termination_message_path), message)
    return ExitCode(error.exit_code)


def _run(path: Path) -> int:
    process = subprocess.Popen([*python_command(), "-m", __name__, str(path)])
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    return process.wait()


def error_of_base(config: TrainerConfig, code: int) -> UserError | None:
    """Return what the end of the child says of the base; None where it says nothing."""
    if code >= 0 or (what := TOO_MUCH.get(signal.Signals(-code))) is None:
        return None
    if stage_of_end(config) is Stage.MODEL:
        return model_error(config, what)
    return UserError(
        "spec.model.source",
        config.spec.model.source,
        f"has a tokenizer that takes too much {what} for some rows, or to be loaded: look at the expressions and "
        "normalizers of its tokenizer.json, or choose another base",
    )


if __name__ == "__main__":
    if sys.flags.isolated:
        forbid_inspection()
    given = Path(sys.argv[1])
    sys.exit(run_in_process(TrainerConfig.model_validate_json(given.read_bytes()), given))
