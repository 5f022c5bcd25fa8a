"""Workers of an attempt tell each other how they ended, also where a process ends at once."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket

from qlora_trainer.errors import PreemptedError
from qlora_trainer.worker import peers
from testing.timeouts import PATIENCE_SECONDS

KEY = b"k" * 32


def slow_proxy():
    """Let the proxy wait before it passes anything on, as on a busy machine."""
    read = asyncio.StreamReader.read

    async def later(self, count=-1):
        data = await read(self, count)
        await asyncio.sleep(0.2)
        return data

    asyncio.StreamReader.read = later


def leave_at_once(place):
    slow_proxy()

    def told_to_stop(_meeting):
        raise PreemptedError("stopped")

    peers.Rendezvous.missing = told_to_stop
    try:
        peers.meet(place, "attempt", KEY, PATIENCE_SECONDS)
    finally:
        os._exit(0)


def wait_for_all(place):
    """End with 0 where another worker is known to have been told to stop."""
    code = 1
    try:
        peers.meet(place, "attempt", KEY, 30)
    except PreemptedError as error:
        code = int("worker 1 on node-1 was told to stop" not in str(error))
    finally:
        os._exit(code)


def test_a_worker_that_ends_at_once_is_not_waited_for():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    first, second = (peers.WorkerIdentity(i, 3, "127.0.0.1", port, f"node-{i}") for i in (0, 1))
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=leave_at_once, args=(second,)), fork.Process(target=wait_for_all, args=(first,))]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
