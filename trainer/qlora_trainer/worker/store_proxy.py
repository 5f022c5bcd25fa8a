"""Reach the store of worker 0 over the network, from workers that prove that they have the job's key.

::

    worker 0   ranks, launcher ──▶ TCPStore on 127.0.0.1 ◀── StoreServer on the rendezvous port
    worker i   ranks, launcher ──▶ StoreClient on 127.0.0.1 ────────┘ each connection after a handshake

PyTorch's TCPStore has no authentication: whoever reaches it reads and writes every key. So it listens on loopback only,
and this is what listens on the network. The handshake is a challenge and a response each way, HMAC-SHA256 with a key
derived from the job's for the attempt:

    server → client   32 random bytes, s
    client → server   index of the worker (2 bytes), 32 random bytes c, HMAC("client" · index · s · c)
    server → client   HMAC("server" · index · s · c)

All sizes are fixed. A connection that has not finished in time is closed, and of too many at once the oldest, since an
honest one takes a round trip. What follows is neither encrypted nor authenticated byte by byte, as the traffic between
ranks is not.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from qlora_trainer.listening import listen_everywhere

if TYPE_CHECKING:
    from collections.abc import Coroutine

HANDSHAKE_SECONDS = 5.0
MAXIMUM_PENDING = 64
"""Connections at once that have not finished the handshake."""
CONNECT_SECONDS = 5.0
DIAL_SECONDS = 30.0
"""Time for which a rank's connection is held while worker 0 does not answer."""
RETRY_SECONDS = 0.5
NONCE_BYTES, MAC_BYTES, INDEX_BYTES = 32, 32, 2
CHUNK_BYTES = 65536
BACKLOG = 128
log = logging.getLogger(__name__)

T = TypeVar("T")
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class NotAuthenticatedError(OSError):
    """The other end does not prove that it has the attempt's key."""


class _Proxy:
    """An event loop in a thread of its own, with one listener."""

    def __init__(self, listener: socket.socket, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()
        self.port: int = listener.getsockname()[1]
        self._server: asyncio.Server = self._call(
            asyncio.start_server(self._accept, sock=listener, limit=CHUNK_BYTES, backlog=BACKLOG)
        )

    def close(self) -> None:
        """Close the listener and all connections."""
        if self._loop.is_running():
            self._call(self._stop())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _stop(self) -> None:
        # A closed server refuses what it has just accepted, and leaves it open: accept no more, and close it last.
        for listener in self._server.sockets:
            self._loop.remove_reader(listener.fileno())
        while others := asyncio.all_tasks() - {asyncio.current_task()}:  # asyncio's own, which accept, add to _tasks
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(others)
        self._server.close()

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = self._loop.create_task(self._serve_until_closed((reader, writer)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: writer.transport.abort())  # a task may be cancelled before it begins

    async def _serve_until_closed(self, streams: Streams) -> None:
        try:
            await self._serve(streams)
        except (OSError, EOFError) as error:
            log.debug("connection closed: %s", error)

    async def _serve(self, streams: Streams) -> None:
        raise NotImplementedError


class StoreServer(_Proxy):
    """The network's end of the store on worker 0.

    Args:
        port: of the rendezvous; on all interfaces.
        key: of the attempt.
        store_port: of the TCPStore on 127.0.0.1.

    """

    def __init__(self, port: int, key: bytes, store_port: int) -> None:
        self._key, self._store_port = key, store_port
        self._pending: dict[asyncio.Task[None], None] = {}
        super().__init__(listen_everywhere(port, BACKLOG), "store-server")

    async def _serve(self, streams: Streams) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._pending) >= MAXIMUM_PENDING:
            oldest = next(iter(self._pending))
            del self._pending[oldest]
            oldest.cancel()
        self._pending[task] = None
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                await _admit(*streams, self._key)
        finally:
            self._pending.pop(task, None)
        await _join(streams, await asyncio.open_connection("127.0.0.1", self._store_port, limit=CHUNK_BYTES))


class StoreClient(_Proxy):
    """The loopback end of the store on every other worker.

    Args:
        address: of the rendezvous.
        key: of the attempt.
        index: of this worker.

    """

    def __init__(self, address: tuple[str, int], key: bytes, index: int) -> None:
        self._address, self._key, self._index = address, key, index
        super().__init__(listen_on_loopback(), "store-client")

    def check(self) -> None:
        """Shake hands with worker 0.

        Raises:
            OSError: it cannot be reached; NotAuthenticatedError: it has another key.

        """
        self._call(self._check())

    async def _check(self) -> None:
        _, writer = await self._dial()
        writer.transport.abort()

    async def _serve(self, streams: Streams) -> None:
        async with asyncio.timeout(DIAL_SECONDS):
            while True:
                with suppress(OSError):
                    remote = await self._dial()
                    break
                await asyncio.sleep(RETRY_SECONDS)
        await _join(streams, remote)

    async def _dial(self) -> Streams:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                reader, writer = await asyncio.open_connection(*self._address, limit=CHUNK_BYTES)
        except TimeoutError:
            raise TimeoutError(f"no connection within {CONNECT_SECONDS:.0f} s") from None
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                await _introduce(reader, writer, self._key, self._index)
        except (EOFError, TimeoutError):
            writer.transport.abort()
            raise NotAuthenticatedError("it does not accept the key of this attempt") from None
        except BaseException:
            writer.transport.abort()
            raise
        return reader, writer


def listen_on_loopback() -> socket.socket:
    """Return a listener on 127.0.0.1, on a port that the system chooses."""
    return socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)


# ------------------------------------------------------------------------------------------------------- the handshake


async def _admit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: bytes) -> None:
    """Let a client prove that it has the key, and prove it in return."""
    challenge = secrets.token_bytes(NONCE_BYTES)
    writer.write(challenge)
    answer = await reader.readexactly(INDEX_BYTES + NONCE_BYTES + MAC_BYTES)
    said, proof = answer[:-MAC_BYTES], answer[-MAC_BYTES:]
    index, nonce = said[:INDEX_BYTES], said[INDEX_BYTES:]
    if not hmac.compare_digest(proof, _proof(key, b"client", index, challenge, nonce)):
        raise NotAuthenticatedError("a connection without the key of this attempt was closed")
    writer.write(_proof(key, b"server", index, challenge, nonce))
    await writer.drain()


async def _introduce(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: bytes, index: int) -> None:
    """Prove to a server that this worker has the key, and have it prove the same."""
    challenge = await reader.readexactly(NONCE_BYTES)
    worker, nonce = index.to_bytes(INDEX_BYTES), secrets.token_bytes(NONCE_BYTES)
    writer.write(worker + nonce + _proof(key, b"client", worker, challenge, nonce))
    proof = await reader.readexactly(MAC_BYTES)
    if not hmac.compare_digest(proof, _proof(key, b"server", worker, challenge, nonce)):
        raise NotAuthenticatedError("it has another key than this attempt")


def _proof(key: bytes, *parts: bytes) -> bytes:
    return hmac.digest(key, b"".join(parts), "sha256")


async def _join(one: Streams, other: Streams) -> None:
    """Copy both ways until one side closes; then close both, once they have what was read for them."""
    writers = (one[1], other[1])
    try:
        await _copy_until_closed(one, other)
        for writer in writers:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)
    finally:
        for writer in writers:
            writer.transport.abort()


async def _copy_until_closed(one: Streams, other: Streams) -> None:
    copies = {asyncio.create_task(_copy(one[0], other[1])), asyncio.create_task(_copy(other[0], one[1]))}
    try:
        await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for copy in copies:
            copy.cancel()
        await asyncio.gather(*copies, return_exceptions=True)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(CHUNK_BYTES):
        writer.write(data)
        await writer.drain()
