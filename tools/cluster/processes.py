"""Processes that end with the harness, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

STOP_SECONDS = 10
POLL_SECONDS = 0.05
DIES_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL", "--")
"""The kernel kills the child when the *thread* that started it ends, by whatever signal: start from the main thread."""


class ComponentError(Exception):
    """A component of the cluster ended or does not become ready; the text has the end of its log."""


class ServerProcess:
    """One running command with its log.

    Args:
        name: for messages, and of the log.
        command: program and arguments; ``setpriv`` keeps the id, so ``pid`` is the program's own.
        logs: folder; a restarted process appends to its log.
        environment: the whole of it; None means this process's.
        cwd: its working directory; None means this process's.

    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        logs: Path,
        environment: dict[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.name, self.log = name, logs / f"{name}.log"
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*DIES_WITH_PARENT, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                cwd=cwd,
                start_new_session=True,  # Ctrl-C is the harness's to handle, in its order
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def wait_until(self, ready: Callable[[], bool], seconds: float) -> None:
        """Wait for readiness.

        Raises:
            ComponentError: the process ended, or is not ready in time.

        """
        deadline = time.monotonic() + seconds
        while not ready():
            if not self.running:
                raise ComponentError(f"{self.name} ended with {self._process.returncode}:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise ComponentError(f"{self.name} is not ready after {seconds:g} s:\n{self.tail()}")
            time.sleep(POLL_SECONDS)

    def wait(self, seconds: float) -> int:
        """Exit code, negative for a signal."""
        return self._process.wait(seconds)

    def terminate(self, seconds: float = STOP_SECONDS) -> None:
        """End it as an orderly stop does: SIGTERM, and SIGKILL if that is not enough."""
        self._process.terminate()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End it at once, as a crash does."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def signal_group(self, signum: signal.Signals) -> None:
        """Send a signal to it and to the processes that it has started."""
        os.killpg(self._process.pid, signum)

    def tail(self, characters: int = 3000) -> str:
        return self.log.read_text(errors="replace")[-characters:]
