"""Strangers on the port where workers meet: whatever they send, the store behind it is out of their reach."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import random
import secrets
import socket
import struct
import threading
import time
import warnings
from contextlib import closing, suppress
from datetime import timedelta
from typing import TYPE_CHECKING

import psutil
import pytest
from torch.distributed import TCPStore

from qlora_trainer.worker import store_proxy
from qlora_trainer.worker.peers import hold_store
from qlora_trainer.worker.store_proxy import MAXIMUM_PENDING, NotAuthenticatedError, StoreClient, StoreServer
from testing.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable

KEY = secrets.token_bytes(32)
VALIDATION_MAGIC = 0x3C85F7CE
"""First number of every connection to a TCPStore (TCPStoreBackend.hpp)."""


class Executed:
    """Pickled, it creates a file where it is unpickled."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self._path,)


@pytest.fixture
def served():
    """The store of a worker 0, with a key in it, and its port on the network."""
    store, port = hold_store()
    store.set("here/0", "node-0")
    server = StoreServer(free_port(), KEY, port)
    yield store, server
    server.close()


def connect(server: StoreServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), 5)


def read_all(connection: socket.socket) -> bytes:
    """Everything until the other end closes."""
    data = b""
    with suppress(ConnectionError):
        while part := connection.recv(65536):
            data += part
    return data


def store_set(key: bytes, value: bytes) -> bytes:
    """Return what a client of a TCPStore sends first, and a SET after it."""
    head = struct.pack("<BI", 0, VALIDATION_MAGIC)
    return head + b"\x01" + b"".join(struct.pack("<Q", len(part)) + part for part in (key, value))


def near_valid(chance: random.Random, planted: bytes) -> bytes:
    """A message that one bit, one length or one key keeps from being good."""
    nonce, index = chance.randbytes(32), struct.pack(">H", chance.randrange(4))
    proof = store_proxy._proof(chance.randbytes(32), b"client", index, chance.randbytes(32), nonce)
    good = index + nonce + proof
    return chance.choice(
        [
            good,
            good[: chance.randrange(len(good))],
            good + chance.randbytes(64),
            store_set(b"here/1", planted),
            store_set(b"torch.rendezvous.run", planted),
            good + store_set(b"here/1", planted),
        ]
    )


def peer(server: StoreServer, key: bytes = KEY) -> StoreClient:
    return StoreClient(("127.0.0.1", server.port), key, 1)


def store_through(client: StoreClient) -> TCPStore:
    return TCPStore("127.0.0.1", client.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=20))


def test_a_worker_with_the_key_reads_and_writes_the_store(served):
    store, server = served
    with closing(peer(server)) as client:
        client.check()
        there = store_through(client)
        assert there.get("here/0") == b"node-0"
        large = "x" * 1_000_000
        there.set("large", large)
        assert store.get("large") == large.encode() == there.get("large")


def test_a_thousand_random_and_a_thousand_near_valid_messages_change_nothing(served, tmp_path):
    store, server = served
    keys = store.num_keys()
    chance = random.Random(1)
    planted = pickle.dumps(Executed(str(tmp_path / "executed")))
    with closing(peer(server)) as client:
        there = store_through(client)
        files = psutil.Process().num_fds()
        for number in range(2000):
            message = near_valid(chance, planted) if number % 2 else chance.randbytes(chance.randrange(1, 4096))
            with connect(server) as stranger:
                with suppress(ConnectionError):
                    stranger.sendall(message)
                    stranger.shutdown(socket.SHUT_WR)
                said = read_all(stranger)
            assert len(said) <= 32, "a challenge, and not a byte of the store"
            if number % 200 == 0:
                there.set("alive", str(number))
                assert there.get("alive") == str(number).encode()
        until = time.monotonic() + 60
        while psutil.Process().num_fds() > files and time.monotonic() < until:
            time.sleep(0.05)
        assert psutil.Process().num_fds() <= files
    assert store.num_keys() == keys + 1
    assert store.get("here/0") == b"node-0"
    assert not (tmp_path / "executed").exists()


def test_strangers_that_say_nothing_keep_no_worker_out(served):
    _, server = served
    silent = [connect(server) for _ in range(4 * MAXIMUM_PENDING)]
    try:
        with closing(peer(server)) as client:
            assert store_through(client).get("here/0") == b"node-0"
        assert len(server._pending) <= MAXIMUM_PENDING
    finally:
        for stranger in silent:
            stranger.close()


def test_a_silent_connection_is_closed_in_time(served, monkeypatch):
    monkeypatch.setattr(store_proxy, "HANDSHAKE_SECONDS", 0.5)
    _, server = served
    with connect(server) as stranger:
        stranger.settimeout(60)
        assert len(read_all(stranger)) == 32, "its challenge, then the end"


@pytest.mark.parametrize("attempt", ["another job's key", "a recorded handshake"])
def test_what_proved_the_key_elsewhere_proves_nothing_here(served, attempt):
    _, server = served
    if attempt == "another job's key":
        with closing(peer(server, secrets.token_bytes(32))) as client, pytest.raises(NotAuthenticatedError):
            client.check()
        return
    recorded = record_handshake(server)
    with connect(server) as stranger:
        stranger.settimeout(60)
        stranger.sendall(recorded)
        assert len(read_all(stranger)) == 32


def record_handshake(server: StoreServer) -> bytes:
    """Record what an honest worker sends, as somebody in between sees it."""
    seen = b""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def relay() -> None:
            nonlocal seen
            connection, _ = listener.accept()
            with connection, connect(server) as upstream:
                connection.sendall(upstream.recv(32))
                seen = connection.recv(4096)
                upstream.sendall(seen)
                connection.sendall(upstream.recv(32))
                read_all(connection)

        thread = threading.Thread(target=relay)
        thread.start()
        with closing(StoreClient(listener.getsockname(), KEY, 1)) as client:
            client.check()
        thread.join()
    return seen


@pytest.mark.parametrize("answer", [b"", b"x" * 32, b"x" * 64, b"HTTP/1.1 400 Bad Request\r\n\r\n" * 9])
def test_a_worker_believes_no_server_without_the_key(answer):
    """Somebody answers in worker 0's place, by its name or its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                read_all(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        with (
            closing(StoreClient(listener.getsockname(), KEY, 1)) as client,
            pytest.raises(OSError, match=r"key|closed"),
        ):
            client.check()
        thread.join()


def test_connections_that_are_accepted_while_the_server_closes_are_closed(served, caplog):
    _, server = served
    held = threading.Event()
    server._loop.call_soon_threadsafe(held.wait)  # so that connections and the end come at once
    strangers = [connect(server) for _ in range(20)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        closing_thread = threading.Thread(target=server.close)
        closing_thread.start()
        held.set()
        closing_thread.join()
        gc.collect()
    assert [str(warning.message) for warning in caught] == []
    assert caplog.messages == []
    for stranger in strangers:
        with stranger:
            stranger.settimeout(60)
            read_all(stranger)


async def passes(condition: Callable[[], object]) -> None:
    """Let the event loop turn until a condition holds."""
    while not condition():  # noqa: ASYNC110 a socket has no event for it
        await asyncio.sleep(0)


@pytest.mark.parametrize("ended", ["cancelled", "after its end"])
def test_a_connection_that_is_not_read_is_closed_with_the_proxy(ended):
    async def run() -> None:
        pairs = [socket.socketpair() for _ in range(2)]
        one, other = [await asyncio.open_connection(sock=pair[0]) for pair in pairs]
        joined = asyncio.create_task(store_proxy._join(one, other))
        loop = asyncio.get_running_loop()
        for pair in pairs:
            pair[1].setblocking(False)
        sending = asyncio.create_task(loop.sock_sendall(pairs[0][1], bytes(64 << 20)))
        await passes(other[1].transport.get_write_buffer_size)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        if ended != "cancelled":
            pairs[1][1].shutdown(socket.SHUT_WR)
            await passes(lambda: pairs[0][0].fileno() == -1)
            assert not joined.done(), "the other side may still read"
        joined.cancel()
        await asyncio.gather(joined, return_exceptions=True)
        await asyncio.sleep(0)
        assert [pair[0].fileno() for pair in pairs] == [-1, -1]
        for pair in pairs:
            pair[1].close()

    asyncio.run(run())


def test_the_store_itself_listens_on_loopback_alone():
    before = {c.laddr for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    store, port = hold_store()
    now = {c.laddr for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert {(a.ip, a.port) for a in now - before} == {("127.0.0.1", port)}
    del store
