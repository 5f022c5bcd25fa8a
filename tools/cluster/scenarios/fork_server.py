"""Run as a program by ``forked_operator.py``: imports the operator once, then forks into it on demand.

One connection asks for one fork: a line of JSON (arguments, environment, log) is answered with the process id, and the
connection closes when that process ends.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import socket
import sys
import traceback

from qlora_operator.app import main

PR_SET_PDEATHSIG = 1


def serve(name: str) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries the children
    gc.freeze()  # what is shared stays shared
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"\0{name}")
    server.listen()
    while True:
        line, _ = server.accept()
        with line.makefile() as asked:
            text = asked.readline()
        if not text:  # somebody only looked whether this listens
            line.close()
            continue
        order = json.loads(text)
        pid = os.fork()
        if pid == 0:
            server.close()
            become_operator(order)
        line.sendall(f"{pid}\n".encode())
        line.close()  # the child has it too


def become_operator(order: dict) -> None:
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(order["environment"])
        for name, value in order["constants"].items():
            module, _, constant = name.rpartition(".")
            setattr(sys.modules[module], constant, value)
        sys.argv = ["qlora_operator", *order["arguments"]]
        main()
    except BaseException:  # noqa: BLE001 nothing may get out of a fork
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    serve(sys.argv[1])
