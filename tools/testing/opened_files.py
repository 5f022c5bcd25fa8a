"""Record the files of some folders that any process opens, by inotify."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

IN_OPEN = 0x20
IN_ISDIR = 0x40000000
IN_NONBLOCK = os.O_NONBLOCK
_EVENT = struct.Struct("iIII")


@contextmanager
def opened_files(*folders: Path) -> Iterator[Callable[[], list[str]]]:
    """Watch folders; the value, called, returns the paths of files that were opened in them since then, sorted."""
    libc = ctypes.CDLL(None, use_errno=True)
    queue = libc.inotify_init1(IN_NONBLOCK)
    if queue < 0:
        raise OSError(ctypes.get_errno(), "inotify_init1")
    try:
        watched = {libc.inotify_add_watch(queue, bytes(f), IN_OPEN): f for f in folders if f.is_dir()}
        yield lambda: sorted(_read(queue, watched))
    finally:
        os.close(queue)


def _read(queue: int, watched: dict[int, Path]) -> set[str]:
    found = set()
    while True:
        try:
            data = os.read(queue, 1 << 16)
        except BlockingIOError:
            return found
        at = 0
        while at < len(data):
            watch, mask, _, length = _EVENT.unpack_from(data, at)
            name = data[at + _EVENT.size : at + _EVENT.size + length].rstrip(b"\0").decode()
            at += _EVENT.size + length
            if name and not mask & IN_ISDIR:
                found.add(str(watched[watch] / name))
