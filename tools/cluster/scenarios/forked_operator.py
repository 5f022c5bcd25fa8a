"""Operators without their start: a process that has imported everything forks into one whenever it is asked to.

A fork runs what ``python -m qlora_operator`` runs, without its 1.5 s of imports; SIGKILL ends it as surely.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from cluster.processes import POLL_SECONDS, ComponentError, ServerProcess
from cluster.scenarios.operator import OperatorProcess
from cluster.waits import eventually
from testing.timeouts import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

SERVER = Path(__file__).with_name("fork_server.py")
READY_SECONDS = PATIENCE_SECONDS


class ForkServerClient:
    """A context manager."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._name = folder, f"qlora-fork_server-{secrets.token_hex(8)}"
        self._process: ServerProcess | None = None

    def fork(
        self, arguments: list[str], environment: dict[str, str], log: Path, constants: Mapping[str, object]
    ) -> Fork:
        """Start an operator. From any thread."""
        log.touch()
        line = socket.socket(socket.AF_UNIX)
        line.connect(f"\0{self._name}")
        order = {"arguments": arguments, "environment": environment, "log": str(log), "constants": dict(constants)}
        line.sendall(json.dumps(order).encode() + b"\n")
        return Fork(line, log)

    def __enter__(self) -> Self:
        self._process = ServerProcess("fork_server", [sys.executable, "-P", SERVER, self._name], self._folder)
        self._process.wait_until(self._listens, READY_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as line:
            return line.connect_ex(f"\0{self._name}") == 0


class Fork:
    """A forked operator, in place of a :class:`ServerProcess`."""

    def __init__(self, line: socket.socket, log: Path) -> None:
        self.log = log
        self._line = line
        self.pid = int(line.recv(32))
        line.setblocking(False)

    @property
    def running(self) -> bool:
        """The process holds the other end of the line as long as it lives."""
        try:
            self._line.recv(1)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def kill(self) -> None:
        """End it at once, as a crash does."""
        if self.running:
            os.kill(self.pid, signal.SIGKILL)
            self._line.setblocking(True)
            self._line.recv(1)
        self._line.close()

    def terminate(self, seconds: float) -> None:
        """End it as an orderly stop does: SIGTERM, and SIGKILL if that is not enough."""
        os.kill(self.pid, signal.SIGTERM)
        if not eventually(lambda: not self.running, seconds):
            self.kill()
            raise ComponentError(f"the forked operator did not stop:\n{self.log.read_text()[-3000:]}")

    def wait_until(self, ready: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            if not self.running or time.monotonic() > deadline:
                self.kill()
                raise ComponentError(f"the forked operator is not ready:\n{self.log.read_text()[-3000:]}")
            time.sleep(POLL_SECONDS)


class ForkedOperator(OperatorProcess):
    """An operator that starts in no time.

    Args:
        fork_server: from which it is forked.
        folder: see :class:`Operator`, as for the rest.
        kubeconfig: whose rights it has.
        constants: values of module constants by dotted name, where the operator's own would take a test too long.
        settings: over the defaults.

    """

    def __init__(
        self,
        fork_server: ForkServerClient,
        folder: Path,
        kubeconfig: Path,
        constants: Mapping[str, object] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(folder, kubeconfig, **settings)
        self._fork_server, self._constants = fork_server, constants or {}

    def spawn(self) -> None:
        environment = {"KUBECONFIG": str(self._kubeconfig), "NO_PROXY": "*"}
        self._process = self._fork_server.fork(  # type: ignore[assignment]
            ["--config", str(self._config)], environment, self.log, self._constants
        )
