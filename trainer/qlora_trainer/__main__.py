"""One worker of an attempt, answered with the contract's exit code: ``python -m qlora_trainer CONFIG.json``

Prepares what is not prepared yet, meets the other workers, and runs this one's ranks.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

from qlora_api.contract import ExitCode, TerminationMessage, TrainerConfig, reason_of
from qlora_storage.destination_claim import claim_destination
from qlora_trainer.configuration import read_config
from qlora_trainer.errors import StorageError, TrainerError, system_errors
from qlora_trainer.prepare.local_copy import PreparedInputs, bring_inputs
from qlora_trainer.prepare.records import Records
from qlora_trainer.publish.destination_release import release_after, released_after_errors
from qlora_trainer.publish.published_adapter import finished_run
from qlora_trainer.python_process import forbid_inspection, python_command
from qlora_trainer.reporting import termination_message
from qlora_trainer.storage.credentials import take_credentials
from qlora_trainer.worker.stop import Stop
from qlora_trainer.worker.tracking_processes import send_published

log = logging.getLogger(__name__)


def run(config: TrainerConfig, path: Path, stop: Stop) -> int:
    """Everything this worker does.

    Raises:
        TrainerError: it ended before its ranks had begun.

    """
    destination = config.spec.output.destination
    with released_after_errors(destination, config.job):
        if done := finished_run(config):
            log.info("%s", done.message)
            termination_message.write(Path(config.termination_message_path), done)
            if done.adapter is not None:
                send_published(config, path, stop, done.adapter.uri)
            return ExitCode.DONE
        code = ready(config, path) or _launched(config, path, stop)
    release_after(code, destination, config.job)
    return code


def _launched(config: TrainerConfig, path: Path, stop: Stop) -> int:
    from qlora_trainer.worker.launch import launch  # noqa: PLC0415 seconds of torch, for nothing if there is nothing to do

    if os.environ.get("JOB_COMPLETION_INDEX", "0") == "0":
        claim_destination(config.spec.output.destination, config.job)
    return launch(config, path, stop)


def ready(config: TrainerConfig, path: Path) -> int:
    """Have on this machine what its ranks need: from what Prepare left, or by preparing here.

    Returns:
        The exit code of a Prepare that failed, else 0.

    Raises:
        UserError, StorageError: what Prepare left cannot be brought here, or a local base was changed since.

    """
    if (prepared := PreparedInputs.read(config)) is not None and prepared.stays:
        return ExitCode.DONE
    records = Records(config)
    began = records.of_run()
    if began is not None and bring_inputs(config, began, records):
        return ExitCode.DONE
    code = subprocess.run([*python_command(), "-m", "qlora_trainer.prepare", str(path)], check=False).returncode
    if code:
        return code if code > 0 else 128 - code
    termination_message.clear(Path(config.termination_message_path))  # Prepare's
    began = records.of_run()
    if began is None or (PreparedInputs.read(config) or bring_inputs(config, began, records)) is None:
        raise StorageError(f"what Prepare has just left in {config.shared_cache_uri or config.cache_dir} is not there")
    return ExitCode.DONE


def main() -> int:
    if sys.flags.isolated:
        forbid_inspection()
    path = Path(sys.argv[1])
    config = read_config(path)
    worker = os.environ.get("JOB_COMPLETION_INDEX", "0")
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s worker {worker} %(levelname)s %(message)s")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the store's own warnings carry no word for a person
    stop = Stop()
    signal.signal(signal.SIGTERM, stop)
    try:
        with system_errors():
            take_credentials(config.spec, os.environ)
            return run(config, path, stop)
    except TrainerError as error:
        log.error("%s", error)  # noqa: TRY400 one paragraph for a person; the trace would hide it
        code = error.exit_code
        termination = TerminationMessage(exit_code=code, reason=reason_of(code), message=str(error))
        termination_message.write_unless_told(Path(config.termination_message_path), termination)
        return code


if __name__ == "__main__":
    sys.exit(main())
