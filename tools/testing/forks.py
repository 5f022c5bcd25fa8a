"""Python programs without their imports: a server that has imported the trainer forks into them.

``start_program`` takes the place of ``subprocess.Popen([sys.executable, "-m", MODULE, ...])``. What the program starts
by ``subprocess`` in the same way (a launcher its ranks) is forked from it. Each is a process of its own with the
environment, output, signals and exit code that it would have; only ``/proc/PID/environ`` and ``cmdline`` are the
server's.
A test of a start's time, of memory, or of variables that libraries read once, starts a process anew instead.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import traceback
from multiprocessing import forkserver
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from multiprocessing.context import ForkServerContext

PRELOADED = ["qlora_trainer.worker.launch", "qlora_trainer.training.train"]
BOUNDED = "qlora_trainer.bounded_child"
"""Is executed: its bound of memory has no room for what the server has imported."""
READ_WHEN_IMPORTED = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


@functools.cache
def fork_context() -> ForkServerContext:
    """Return the context of the one server of this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with patch.dict(os.environ, READ_WHEN_IMPORTED):
        forkserver.ensure_running()
    return context


class ForkedProgram:
    """A forked program, with the methods of ``subprocess.Popen`` that tests use."""

    def __init__(self, process: multiprocessing.process.BaseProcess) -> None:
        self._process = process
        assert process.pid is not None
        self.pid: int = process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start_program(words: Sequence[str], output: Path, environment: Mapping[str, str] | None = None) -> ForkedProgram:
    """Start what ``python WORDS`` starts.

    Args:
        words: ``-m``, a module and its arguments; or a script and its arguments.
        output: file to which both outputs are appended.
        environment: all of it; without it this process's own.

    """
    arguments = (list(words), str(output), str(Path.cwd()), {**(environment or os.environ), **READ_WHEN_IMPORTED})
    process = fork_context().Process(target=_run_with_output, args=arguments, name=" ".join(words))
    process.start()
    return ForkedProgram(process)


# ------------------------------------------------------------------------------------------------------- in the forks


def _run_with_output(words: list[str], output: str, folder: str, environment: dict[str, str]) -> None:
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.chdir(folder)
    subprocess.Popen.__init__ = _forking(subprocess.Popen.__init__)  # type: ignore[method-assign]
    run_program(words, environment)


def run_program(words: Sequence[str], environment: Mapping[str, str] | None) -> None:
    """Be what ``python WORDS`` is, as far as a process that has begun already can be."""
    if environment is not None:
        os.environ.clear()
        os.environ.update(environment)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):  # as exec does
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # as Python's start does, after subprocess has restored them
        signal.signal(number, signal.SIG_IGN)
    for handler in list(logging.root.handlers):
        logging.root.removeHandler(handler)
    if words[0] == "-m":
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")


def _forking(start: Callable[..., None]) -> Callable[..., None]:
    """Return ``subprocess.Popen.__init__`` which forks where it would execute this Python.

    ``subprocess`` calls ``preexec_fn`` in the child when all else is done (output, session, folder). One that never
    returns takes the place of the execution.
    """

    @functools.wraps(start)
    def start_or_fork(self, args, *rest, env=None, preexec_fn=None, **options):
        words = list(map(os.fspath, args)) if not isinstance(args, (str, bytes, os.PathLike)) else []
        program = [word for word in words[1:] if word not in {"-u", "-P"}]
        if words[:1] == [sys.executable] and program and program[0] != "-c" and program[1:2] != [BOUNDED]:
            sys.stdout.flush()
            sys.stderr.flush()
            preexec_fn = functools.partial(_become, program, env, preexec_fn)
        start(self, args, *rest, env=env, preexec_fn=preexec_fn, **options)

    return start_or_fork


def _become(words: list[str], environment: Mapping[str, str] | None, before: Callable[[], object] | None) -> None:
    """Run a program and end with its exit code; never return."""
    code = 1
    try:
        if before is not None:
            before()
        # Among them the pipe that tells the parent, when it is closed, that the program runs.
        os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        run_program(words, environment)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException:  # noqa: BLE001 nothing may get out of a fork
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
