"""One process of the trainer: start it, watch it, pass on signals, and leave nothing of it behind."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import IO, TYPE_CHECKING

from qlora_cli.kube.errors import ClusterError
from qlora_storage.local_paths import expand_home

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType

    from qlora_cli.local.run_folder import Lock

TICK_SECONDS = 0.1
INSIST_SECONDS = 1.0
"""A Ctrl-C this soon after the first is the same one: wrappers such as 'uv run' repeat what the terminal sent."""
TAIL_LINES = 20
"""Lines of its log or of standard error that are shown of a process that failed."""
MARK = "QLORA_PROCESS_MARK"
"""Environment variable that all processes of one attempt share."""


@dataclass(frozen=True)
class Commands:
    """Command lines of the trainer's processes; the config's path is appended."""

    prepare: tuple[str, ...] = (sys.executable, "-m", "qlora_trainer.prepare")
    train: tuple[str, ...] = (sys.executable, "-m", "qlora_trainer")
    generate: tuple[str, ...] = (sys.executable, "-m", "qlora_trainer.generate")
    merge: tuple[str, ...] = (sys.executable, "-m", "qlora_trainer.merge")
    inspect: tuple[str, ...] = (sys.executable, "-m", "qlora_trainer.inspection")


def require_trainer(command: str) -> None:
    """Check that the trainer is installed: the command line is installed without it, and then has no PyTorch.

    Raises:
        ClusterError: it is not.

    """
    if importlib.util.find_spec("qlora_trainer") is None or importlib.util.find_spec("peft") is None:
        raise ClusterError(
            f"{command} runs the trainer (PyTorch, DeepSpeed), which is not installed here; install it from where "
            'qlora was installed, with the extra "trainer", such as: uv tool install --force '
            "'qlora-operator[trainer] @ git+https://…'"
        )


def cache_dir() -> Path:
    """Return the folder of fetched models, fetched rows and tokenized rows, which runs share."""
    named = os.environ.get("QLORA_CACHE")
    return expand_home(named).absolute() if named else Path.home() / ".cache" / "qlora-operator"


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a process of the trainer, with more variables in it."""
    return {
        **os.environ,
        "PYTHONUNBUFFERED": "1",  # what it prints is read while it runs
        "PYTHONSAFEPATH": "1",  # a datasets.py in the user's folder is not the library
        **more,
    }


def shell_code(code: int) -> int:
    """Return Popen's exit code as shells and Kubernetes count: 128 + signal."""
    return code if code >= 0 else 128 - code


def tail(errors: IO[str]) -> list[str]:
    """Return the last lines of what a process wrote to standard error."""
    errors.seek(0)
    return errors.read().strip().splitlines()[-TAIL_LINES:]


class StopSignal(Enum):
    """Signal that was sent to a process from here."""

    NONE = "none"
    ASKED = "asked"
    KILLED = "killed"


@dataclass
class StopRequests:
    """Requests to stop. Signal handlers only note them; who waits acts on them."""

    asked: bool = False
    insisted: bool = False
    over_budget: bool = False
    """True if the time that processes may take is used up."""
    _asked_at: float = 0

    def note(self, signum: int, at: float) -> None:
        """Ctrl-C a second time insists; other signals may come in pairs (a session's end sends HUP and TERM)."""
        if not self.asked:
            self.asked, self._asked_at = True, at
        elif signum == signal.SIGINT and at - self._asked_at > INSIST_SECONDS:
            self.insisted = True

    def wait(self, seconds: float) -> None:
        """Sleep, but not on after a request to stop."""
        until = time.monotonic() + seconds
        while not self.asked and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, TICK_SECONDS))


@contextmanager
def stop_on_signals() -> Iterator[StopRequests]:
    """Turn Ctrl-C, SIGTERM and the terminal's end into requests; signals ignored by whoever started us stay ignored."""
    stop = StopRequests()

    def handle(signum: int, _frame: FrameType | None) -> None:
        stop.note(signum, time.monotonic())

    caught = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is not signal.SIG_IGN]
    before = {s: signal.signal(s, handle) for s in caught}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class TrainerProcess:
    """A process in a session of its own, so that the terminal's Ctrl-C reaches it only through us."""

    def __init__(self, command: Sequence[str], log: Path, lock: Lock, stdout: Path | None = None) -> None:
        """Start it. All output goes to ``log``; where ``stdout`` is given, standard output goes there."""
        self._mark = uuid.uuid4().hex
        with log.open("ab") as errors, (stdout or log).open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env=environment(**{MARK: self._mark}),
                start_new_session=True,
                pass_fds=(lock.descriptor,),  # should we be killed, the run stays locked until the trainer ends
            )
        lock.name_holders(os.getpid(), self._process.pid)

    @property
    def pid(self) -> int:
        return self._process.pid

    def ended(self) -> int | None:
        """Return the exit code (negative: a signal) once it has ended, after killing what it left behind; else None."""
        if self._process.returncode is None:
            # Look without reaping: while the leader is a zombie, its group cannot be anybody else's.
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
                return None
            self.kill()
            self._process.wait()
        return self._process.returncode

    def terminate(self) -> None:
        """Ask it to checkpoint and end."""
        if self._process.returncode is None:
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End it and all that it started, at once."""
        os.killpg(self.pid, signal.SIGKILL)
        # torchrun gives every rank a session of its own, out of the group's reach; a rank that outlives its launcher
        # would hold the GPU that the next attempt needs.
        for pid in marked_processes(f"{MARK}={self._mark}"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def marked_processes(setting: str) -> list[int]:
    """Processes of this user with ``NAME=value`` in their environment; none where there is no /proc."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # another user's, or gone by now
            if setting.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def watch(
    process: TrainerProcess, stop: StopRequests, say: Callable[[str], None], tick: Callable[[], None]
) -> tuple[int, StopSignal]:
    """Wait for the end, with ``tick`` ten times a second; the exit code, and what was done to get there."""
    done = StopSignal.NONE
    try:
        while (code := process.ended()) is None:
            if (stop.asked or stop.over_budget) and done is StopSignal.NONE:
                done = StopSignal.ASKED
                process.terminate()
                cause = "" if stop.asked else "the budget is used up: "
                say(f"{cause}checkpointing … (Ctrl-C again: kill without a checkpoint)")
            if stop.insisted and done is StopSignal.ASKED:
                say("killing all ranks; steps since the last checkpoint are lost")
                process.kill()
                done = StopSignal.KILLED
            tick()
            time.sleep(TICK_SECONDS)
    except BaseException:
        # Whatever went wrong here (a closed pipe, a full disk), ranks must not go on unwatched. A second SIGTERM
        # would interrupt the launcher while it waits for the ranks' checkpoint.
        if done is StopSignal.NONE:
            process.terminate()
        while process.ended() is None:
            time.sleep(TICK_SECONDS)
        raise
    return code, done
