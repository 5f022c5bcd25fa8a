"""The processes that send a run's history to tracking tools, beside the ranks of worker 0."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_api.contract import ExitCode, TrainerConfig
from qlora_api.credentials import TRACKING_KEYS
from qlora_storage.errors import JobError, in_words
from qlora_storage.object_store import NotFoundError, open_store
from qlora_trainer.python_process import python_command
from qlora_trainer.reporting import termination_message
from qlora_trainer.reporting.training_history import PUBLISHED_FILE
from qlora_trainer.tracking.journal import FOLDER_ENVIRONMENT, JOURNAL_FILE, Journal, end_line
from qlora_trainer.tracking.sinks import KEYS
from qlora_trainer.tracking.tracked_runs import read_runs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qlora_trainer.worker.stop import Stop

DONE_SECONDS = 60.0
"""After a run is done, the tools get this long for what they have not stored yet."""
ENDED_SECONDS = 5.0
"""After any other end of an attempt: the next attempt sends again what is missing."""
log = logging.getLogger(__name__)


@dataclass
class TrackingProcesses:
    """The processes of one attempt; none where nothing is tracked here."""

    folder: Path | None = None
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def rank_environment(self) -> dict[str, str]:
        """Variables for the ranks."""
        return {} if self.folder is None else {FOLDER_ENVIRONMENT: str(self.folder)}

    def finish(self, config: TrainerConfig, code: int) -> None:
        """Tell the processes how the attempt ended, wait for them, and add to the termination message what they say."""
        if self.folder is None:
            return
        path = Path(config.termination_message_path)
        message = termination_message.read(path)
        adapter = message.adapter.uri if code == ExitCode.DONE and message and message.adapter else ""
        journal = Journal(self.folder / JOURNAL_FILE)
        journal.write([end_line(code, adapter)])
        journal.close()
        seconds = DONE_SECONDS if code == ExitCode.DONE else ENDED_SECONDS
        self._end(seconds)
        sinks = zip(config.spec.tracking, self.processes, strict=True)
        late = {sink.type for sink, process in sinks if process.poll() != 0}
        runs = [
            run.model_copy(update={"message": f"it did not take them within {seconds:.0f} s"})
            if run.type in late and not run.message
            else run
            for run in read_runs(self.folder)
        ]
        for run in runs:
            if run.message:
                log.warning("%s does not have the last steps: %s", run.type, run.message)
        if message is not None:
            termination_message.write(path, message.model_copy(update={"tracking": runs}))

    def kill(self) -> None:
        """End what still runs, with all processes that a library has started."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _end(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))


@contextmanager
def tracking_processes(
    config: TrainerConfig, config_path: Path, index: int, stop: Stop, history: bytes = b""
) -> Iterator[TrackingProcesses]:
    """Start one process for each entry of spec.tracking, on worker 0.

    Args:
        config: of the attempt.
        config_path: where it is, for the processes.
        index: of this worker.
        stop: told which processes are no ranks.
        history: with which the journal begins.

    """
    if index or not config.spec.tracking:
        yield TrackingProcesses()
        return
    with ExitStack() as stack:
        tracking = TrackingProcesses(_open_folder(config, history, stack))
        stack.callback(tracking.kill)
        if tracking.folder is not None:
            for number, sink in enumerate(config.spec.tracking):
                command = (*python_command(), "-m", "qlora_trainer.tracking", str(config_path), str(number))
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    env=environment_with(KEYS[sink.type]) | tracking.rank_environment,
                    start_new_session=True,  # to be ended with all that it starts; the terminal's Ctrl-C is not for it
                )
                tracking.processes.append(process)
                stop.companions.add(process.pid)
        yield tracking


def _open_folder(config: TrainerConfig, history: bytes, stack: ExitStack) -> Path | None:
    """Create the folder with the journal; None where the cache's disk fails, which costs no attempt."""
    try:
        Path(config.cache_dir).mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(
            prefix="qlora-tracking-", dir=config.cache_dir, ignore_cleanup_errors=True
        )
        folder = Path(stack.enter_context(temporary))
        (folder / JOURNAL_FILE).write_bytes(history)
    except OSError as error:
        log.warning("tracking tools get nothing of this attempt: the cache cannot be written to: %s", in_words(error))
        return None
    return folder


def send_published(config: TrainerConfig, config_path: Path, stop: Stop, adapter: str) -> None:
    """Send the published history: the attempt that published was killed, maybe before the tools had its last steps.

    Args:
        config: of the attempt that found it published.
        config_path: where it is, for the processes.
        stop: told which processes are no ranks.
        adapter: URI of its folder.

    """
    index = int(os.environ.get("JOB_COMPLETION_INDEX", "0"))
    if not config.spec.tracking or index != 0:
        return
    try:
        history = open_store(adapter, "spec.output.destination").get(PUBLISHED_FILE)
        with tracking_processes(config, config_path, index, stop, history) as tracking:
            tracking.finish(config, ExitCode.DONE)
    except (JobError, NotFoundError) as error:  # a stop signal among them: the run is done all the same
        log.warning("tracking tools may not have the last steps of the published run: %s", error)


def environment_with(keys: frozenset[str]) -> dict[str, str]:
    """Return this process's environment with some of the tracking tools' credentials, and no others of theirs."""
    return {name: value for name, value in os.environ.items() if name in keys or name not in TRACKING_KEYS}
