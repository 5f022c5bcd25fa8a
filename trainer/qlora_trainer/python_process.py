"""Start Python processes that import nothing from the working directory and, where asked, have no credentials."""

from __future__ import annotations

import ctypes
import os
import sys

KEPT_VARIABLES = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "HOME", "TMPDIR", "LANG")
"""Environment variables that a process without credentials keeps."""
_PR_SET_DUMPABLE = 4


def python_command() -> tuple[str, ...]:
    """Return the command of a Python like this one: isolated if this one is, as in pods."""
    return (sys.executable, "-I", "-u") if sys.flags.isolated else (sys.executable, "-P")


def environment_without_credentials() -> dict[str, str]:
    """Return the variables that a process needs which reads what somebody else wrote."""
    return {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}


def forbid_inspection() -> None:
    """Keep other processes of this user from reading this one's memory and initial environment in /proc.

    Its state, memory use and children (``stat``, ``statm``, ``status``) stay readable. It leaves no core dump. An
    exec undoes this: each program calls it for itself.

    Raises:
        OSError: the system refuses.

    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
