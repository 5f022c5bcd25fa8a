"""A process of the command line without root's rights over files, forked so that nothing is imported again."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import tempfile
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

CAPABILITY_VERSION = 0x20080522
"""_LINUX_CAPABILITY_VERSION_3."""


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def obey_permissions() -> None:
    """Give up root's capabilities in this process for good, among them the right to read and write every file."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, nothing = _Header(CAPABILITY_VERSION, 0), (_Sets * 2)()
    if libc.capset(ctypes.byref(header), nothing):
        raise OSError(ctypes.get_errno(), "capset")


@dataclass(frozen=True)
class ProcessResult:
    """Exit code and outputs of a process."""

    code: int
    out: str
    err: str


def run_plainly(
    call: Callable[[Sequence[str]], object],
    words: Sequence[object],
    environment: Mapping[str, str] | None = None,
    stdout: int | None = None,
    closed: Sequence[int] = (),
) -> ProcessResult:
    """Fork, and run ``call`` on the words as a program that is started anew with them would.

    Args:
        call: ends by returning or by SystemExit.
        words: arguments.
        environment: put over this process's own.
        stdout: a file descriptor in place of the one whose content is returned.
        closed: numbers of the standard streams that the process does not have.

    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if not pid:
            os.dup2(out.fileno() if stdout is None else stdout, 1)
            os.dup2(err.fileno(), 2)
            _be(call, [str(word) for word in words], environment or {}, closed)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return ProcessResult(code, _text(out), _text(err))


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _be(
    call: Callable[[Sequence[str]], object],
    words: Sequence[str],
    environment: Mapping[str, str],
    closed: Sequence[int],
) -> None:
    code = 70
    try:
        os.environ.update(environment)
        sys.stdin = Path(os.devnull).open()  # noqa: SIM115 for as long as the process lives
        encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
        sys.stdout = os.fdopen(1, "w", encoding=encoding)
        sys.stderr = os.fdopen(2, "w", encoding=encoding, errors="backslashreplace")
        for number in closed:  # as Python's start finds them
            setattr(sys, ("stdin", "stdout", "stderr")[number], None)
            with suppress(OSError):
                os.close(number)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python's start does
        obey_permissions()
        call(words)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 nothing may get out of a fork
        traceback.print_exc()
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            try:
                stream.flush()  # as Python's end does
            except OSError:
                traceback.print_exc()
                code = 120
        os._exit(code)
