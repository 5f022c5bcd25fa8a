"""Run what somebody else wrote, a chat template or a tokenizer's expressions, in a child with bounds.

The child has bounds of its own address space and of processor time for each call, so that the machine's load changes
nothing. Both sides speak JSON, each message behind its length: nothing that a child writes is unpickled. The child has
no credentials in its environment. It ends when its standard input does, and so with its parent.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import resource
import signal
import struct
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

from qlora_trainer.python_process import environment_without_credentials, python_command

_LENGTH = struct.Struct("!Q")
Service = Callable[[Any], Any]
"""Answers one request; both are JSON."""


@dataclass(frozen=True)
class ChildBounds:
    """The limits of a child."""

    seconds: int = 10
    """Processor time of each call, including the start of the child."""
    memory_bytes: int = 1 << 30
    """Size of the address space."""


class BoundExceededError(Exception):
    """The child took more than it may; it is gone."""


class BoundedChild:
    """A child process that answers calls with a service, started at the first call and after one that failed.

    Args:
        service: ``module:function``; the function takes ``setup`` and returns a :data:`Service`. Its own errors are for
            it to catch and to answer; what it raises ends the call with a RuntimeError.
        setup: JSON.
        bounds: of the child.

    """

    def __init__(self, service: str, setup: Any, bounds: ChildBounds) -> None:
        self._service = service
        self._setup = setup
        self.bounds = bounds
        self._process: subprocess.Popen[bytes] | None = None

    def call(self, request: Any) -> Any:
        """Return the service's answer.

        Raises:
            BoundExceededError: says which bound, as the end of a sentence about the child.

        """
        try:
            if self._process is None:
                self._process = self._start()
                _write(_pipe(self._process.stdin), self._setup)
            _write(_pipe(self._process.stdin), request)
            answer = _read(_pipe(self._process.stdout))
        except (BrokenPipeError, EOFError):
            raise BoundExceededError(self._reason()) from None
        if "memory" in answer:
            self.close()
            raise BoundExceededError(self._memory)
        if "raised" in answer:
            raise RuntimeError(f"{self._service} failed:\n{answer['raised']}")
        return answer["answer"]

    def close(self) -> None:
        """End the child, if there is one; the next call starts another."""
        if self._process is not None:
            self._finalizer()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [
                *(*python_command(), "-m", __name__),
                *(self._service, str(self.bounds.seconds), str(self.bounds.memory_bytes)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment_without_credentials(),
        )
        self._finalizer = weakref.finalize(self, _end, process)
        return process

    def _reason(self) -> str:
        assert self._process is not None
        code = self._process.wait()
        self.close()
        if code == -signal.SIGPROF:
            return f"takes more than {self.bounds.seconds} s of processor time"
        if code in {-signal.SIGKILL, -signal.SIGABRT, -signal.SIGSEGV}:
            return self._memory
        return f"ends its process with code {code}"

    @property
    def _memory(self) -> str:
        return f"takes more than {self.bounds.memory_bytes >> 20} MiB of memory"


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):  # what it was not given any more
            _pipe(pipe).close()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def _write(pipe: IO[bytes], message: Any) -> None:
    body = json.dumps(message, default=lambda value: f"<{type(value).__name__}>").encode()
    pipe.write(_LENGTH.pack(len(body)) + body)
    pipe.flush()


def _read(pipe: IO[bytes]) -> Any:
    header = pipe.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        raise EOFError
    (length,) = _LENGTH.unpack(header)
    body = pipe.read(length)
    if len(body) < length:
        raise EOFError
    return json.loads(body)


def _serve(name: str, seconds: int, memory_bytes: int) -> None:
    """Be the child."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    signal.setitimer(signal.ITIMER_PROF, seconds)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    module, _, function = name.partition(":")
    make = getattr(importlib.import_module(module), function)
    setup = _read(requests)
    service: Service | None = None
    while True:
        try:
            request = _read(requests)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, seconds)  # nothing handles its signal, which ends the process
        try:
            service = service or make(setup)
            answer = {"answer": service(request)}
        except MemoryError:
            answer = {"memory": True}
        except Exception as error:  # noqa: BLE001 the parent raises it
            answer = {"raised": f"{type(error).__name__}: {error}"}
        _write(answers, answer)
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
