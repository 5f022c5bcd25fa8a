"""Strangers on the network while an attempt runs: what they reach, and that nothing they send changes anything."""

from __future__ import annotations

import ipaddress
import os
import pickle
import random
import shutil
import signal
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta

import psutil
import pytest
from torch.distributed import DistError, TCPStore
from worker_pods import WorkerPod, losses

from qlora_api.contract import ExitCode
from testing.timeouts import PATIENCE_SECONDS

pytestmark = pytest.mark.ranks
MESSAGES = 1000
"""Random ones, and as many near-valid ones, for each port."""
VALIDATION_MAGIC = 0x3C85F7CE
"""First number of every connection to a TCPStore (TCPStoreBackend.hpp)."""
ENDLESS = {"training": {"epochs": None, "maxSteps": 5000}}


def listeners(launcher: int) -> dict[int, list[tuple[str, int]]]:
    """Addresses on which a launcher and its ranks listen, by process, as ``ss -ltnp`` has them."""
    found = {}
    for process in (psutil.Process(launcher), *psutil.Process(launcher).children(recursive=True)):
        sockets = process.net_connections("tcp")
        found[process.pid] = [tuple(s.laddr) for s in sockets if s.status == psutil.CONN_LISTEN]
    return found


def is_loopback(host: str) -> bool:
    address = ipaddress.ip_address(host)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


class Executed:
    """Pickled, it creates a folder where it is unpickled."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self._path,)


def test_nothing_of_one_worker_listens_beyond_loopback(runner):
    config = runner.config(ranks=2, **ENDLESS)
    assert runner.prepare(config) == 0
    process = runner.launch(config)
    try:
        runner.wait_for_step(process, config, 2)
        found = listeners(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=PATIENCE_SECONDS) == ExitCode.PREEMPTED
    finally:
        process.kill()
    assert len(found) == 3, "the launcher and two ranks"
    assert all(found.values()), "each listens for the others"
    beyond = [address for addresses in found.values() for address in addresses if not is_loopback(address[0])]
    assert beyond == []


def store_request(kind: int, *parts: bytes) -> bytes:
    """Return what a client of a TCPStore sends first, and a request after it."""
    request = b"".join(struct.pack("<Q", len(part)) + part for part in parts)
    return struct.pack("<BIB", 0, VALIDATION_MAGIC, kind) + request


def near_store(chance: random.Random, planted: bytes) -> bytes:
    key = chance.choice([b"here/1", b"ended/1", b"default_pg/0//cpu//0/0", b"torch.rendezvous.x"])
    hello = chance.randbytes(2 + 32 + 32)
    return chance.choice([store_request(1, key, planted), hello, hello + store_request(1, key, planted), hello[:-1]])


def near_http(chance: random.Random, _: bytes) -> bytes:
    head = chance.choice([b"GET /progress", b"GET /metrics", b"POST /progress", b"GET /" + b"x" * 70_000, b"PRI *"])
    more = chance.choice([b"\r\n\r\n", b"\r\nContent-Length: 99999999\r\n\r\n", b"\r\nA: " + chance.randbytes(9), b""])
    return head + b" HTTP/1.1" + more


def near_gloo(chance: random.Random, planted: bytes) -> bytes:
    """A connection of gloo begins with its number; a message has a length, a kind and a slot."""
    number = struct.pack("<q", chance.randrange(8))
    return number + struct.pack("<QQQQQ", len(planted), chance.randrange(4), chance.randrange(4), 0, 0) + planted


def fuzz(port: int, host: str, near: Callable[[random.Random, bytes], bytes], planted: bytes) -> int:
    """Send random and near-valid messages; how many connections were taken."""
    chance, taken = random.Random(port), 0
    for number in range(2 * MESSAGES):
        message = near(chance, planted) if number % 2 else chance.randbytes(chance.randrange(1, 2048))
        with suppress(OSError), socket.create_connection((host, port), 5) as stranger:
            taken += 1
            stranger.settimeout(0.002)
            stranger.sendall(message)
            stranger.recv(4096)
    return taken


def ports_of(pods: list[WorkerPod]) -> Iterator[tuple[str, int, str]]:
    """Host, port and kind of all that can be reached from the network, by the documentation's names."""
    for pod in pods:
        for pid, addresses in listeners(pod.process.pid).items():
            is_rank = pid != pod.process.pid
            metrics = {
                int(path.read_text())
                for rank in range(2)
                if (path := pod.folder / f"ports-{pod.config.attempt}" / f"rank-{rank}.port").exists()
            }
            for host, port in addresses:
                if port in metrics:
                    yield host, port, "metrics"
                elif is_rank:
                    yield host, port, "data"
                elif port == int(pod.config.rendezvous.rpartition(":")[2]):
                    yield "127.0.0.1", port, "rendezvous"
                else:
                    assert is_loopback(host), f"{host}:{port} is not documented"


def test_strangers_on_every_port_of_two_workers_change_nothing(pods, runner, tmp_path):
    both = [pod.start() for pod in pods(ranks=1, **ENDLESS)]
    planted = pickle.dumps(Executed(str(tmp_path / "executed")))
    both[0].until(" step 2/")
    found = sorted(set(ports_of(both)), key=lambda address: address[2])
    kinds = Counter(kind for _, _, kind in found)
    assert (kinds.keys(), kinds["metrics"], kinds["rendezvous"]) == ({"data", "metrics", "rendezvous"}, 2, 1)
    rendezvous = found[-1][1]
    with pytest.raises((DistError, RuntimeError)):  # as was done, to list the keys
        TCPStore(
            "127.0.0.1", rendezvous, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=2)
        ).num_keys()
    near = {"data": near_gloo, "metrics": near_http, "rendezvous": near_store}
    taken: dict[int, int] = {}

    def attack(host: str, port: int, kind: str) -> None:
        taken[port] = fuzz(port, host, near[kind], planted)

    strangers = [threading.Thread(target=attack, args=address) for address in found]
    for stranger in strangers:
        stranger.start()
    for stranger in strangers:
        stranger.join()
    assert set(taken.values()) == {2 * MESSAGES}, "each port takes every connection"
    assert all(pod.process.poll() is None for pod in both), both[0].log[-2000:] + both[1].log[-2000:]
    for pod in both:
        pod.process.send_signal(signal.SIGTERM)
    ends = [pod.end() for pod in both]
    assert [code for code, _ in ends] == [ExitCode.PREEMPTED] * 2, both[0].log[-2000:] + both[1].log[-2000:]
    assert not (tmp_path / "executed").exists()
    disturbed = losses(both[0].log)
    shutil.rmtree(runner.folder / "checkpoints", ignore_errors=True)
    undisturbed = runner.kill_at(runner.config(ranks=2, attempt=2, **ENDLESS), len(disturbed))
    expected = [f"{loss:.6f}" for loss in undisturbed.losses.values()]
    assert disturbed == expected[: len(disturbed)]
