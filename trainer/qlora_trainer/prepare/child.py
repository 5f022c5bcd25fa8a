"""Prepare's work in a process of its own: ``python -m qlora_trainer.prepare.child CONFIG.json``

A tokenizer is a program that somebody else wrote: expressions that take exponential time, normalizers that make a
terabyte of a letter. Within each of its calls the system ends the process that goes beyond the bounds of
:mod:`qlora_trainer.model.tokenizer`; the parent says whose fault that was.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_api.contract import ExitCode, TerminationMessage, TrainerConfig, reason_of
from qlora_trainer.errors import UserError
from qlora_trainer.prepare.command import run_in_process
from qlora_trainer.python_process import forbid_inspection, python_command
from qlora_trainer.reporting import termination_message

if TYPE_CHECKING:
    from qlora_api.spec import QLoRAJobSpec

log = logging.getLogger(__name__)
BOUNDS = {
    signal.SIGPROF: "takes too much processor time for some rows, or to be loaded",
    signal.SIGABRT: "takes too much memory for some rows, or to be loaded",
    signal.SIGSEGV: "takes too much memory for some rows, or to be loaded",
}
"""Signals that end a process within a call of its tokenizer, and what they say of it."""


def run_in_child(config: TrainerConfig, path: Path) -> int:
    """Do the work of a Prepare that found nothing, in a child; return the exit code."""
    process = subprocess.Popen([*python_command(), "-m", __name__, str(path)])
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    code = process.wait()
    if (error := tokenizer_error(config.spec, code)) is None:
        return code if code >= 0 else 128 - code
    log.error("%s", error)
    message = TerminationMessage(exit_code=error.exit_code, reason=reason_of(error.exit_code), message=str(error))
    termination_message.write(Path(config.termination_message_path), message)
    return ExitCode(error.exit_code)


def tokenizer_error(spec: QLoRAJobSpec, code: int) -> UserError | None:
    """Return what the end of the child says of the base's tokenizer; None where it says nothing."""
    if code >= 0 or (words := BOUNDS.get(signal.Signals(-code))) is None:
        return None
    return UserError(
        "spec.model.source",
        spec.model.source,
        f"has a tokenizer that {words}: look at the expressions and normalizers of its tokenizer.json, or choose "
        "another base",
    )


if __name__ == "__main__":
    if sys.flags.isolated:
        forbid_inspection()
    given = Path(sys.argv[1])
    sys.exit(run_in_process(TrainerConfig.model_validate_json(given.read_bytes()), given))
