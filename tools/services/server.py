"""HTTP servers of other projects on loopback, each a process of its own."""

from __future__ import annotations

import os
import signal
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from cluster.processes import ServerProcess
from testing.ports import free_port
from testing.timeouts import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

READY_SECONDS = PATIENCE_SECONDS
ANSWER_SECONDS = 5


class Server(ABC):
    """One server, ready when ``/health`` answers. ``stop`` and ``start`` keep port and content: to a client, the server
    was away.

    Args:
        name: for messages, and of the log.
        folder: for the log, and the process's working directory; made if missing.
        address: where it listens, such as a bridge's that pods reach.
        variables: of the process, besides this process's own.

    """

    def __init__(
        self, name: str, folder: Path, address: str = "127.0.0.1", variables: Mapping[str, str] | None = None
    ) -> None:
        self.name, self.address = name, address
        self._variables = variables or {}
        self.port = free_port(address)
        self._folder = folder.absolute()
        self._process: ServerProcess | None = None
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def url(self) -> str:
        return f"http://{self.address}:{self.port}"

    @abstractmethod
    def _command(self) -> list[str | Path]:
        """Return program and arguments."""

    def start(self) -> None:
        """Start the server and wait until it answers.

        Raises:
            ComponentError: it ends, or does not answer in time.

        """
        environment = {**os.environ, **self._variables}
        self._process = ServerProcess(self.name, self._command(), self._folder, environment, cwd=self._folder)
        try:
            self._process.wait_until(self._answers, READY_SECONDS)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the server as an orderly stop does."""
        if self._process is not None:
            self._process.terminate()
            self._process = None

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Let the server take connections and answer none, as one behind a stuck disk."""
        assert self._process is not None
        process = self._process
        process.signal_group(signal.SIGSTOP)
        try:
            yield
        finally:
            process.signal_group(signal.SIGCONT)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=ANSWER_SECONDS) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False
