"""Standard streams that every command can use, whatever its caller has closed and whichever encoding was chosen."""

from __future__ import annotations

import io
import os
import sys

STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))


def prepare_streams() -> None:
    """Open the streams that the caller has closed on the null device, and let each take every text.

    Otherwise the next file that is opened gets the number of a closed stream, and what a child process writes there. A
    character that the encoding lacks is written as a question mark.
    """
    for number in range(len(STREAMS)):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
    for name, mode in STREAMS:
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, PTH123 until the process ends
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
