"""The workers (pods) of one attempt: how they find each other, and how one learns that another is gone.

::

    worker 0 ── holds a store (torch's TCPStore) on loopback, and serves it to its peers at the rendezvous
    worker i ── waits for its name and port, for minutes if need be, and writes itself down
    all      ── wait until everybody is written down, then start their ranks, which use the same store

The rendezvous admits only workers that prove that they have the job's key (:mod:`qlora_trainer.worker.store_proxy`).
What is in the store is text and JSON, checked as it is read.

While the ranks run each worker counts up a number in the store, and looks whether the others' numbers move. A rank
whose peer is gone mostly notices by itself, by a connection that breaks; a node without power breaks none, and NCCL
may wait for the length of its timeout.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from torch.distributed import DistError, PrefixStore, TCPStore  # type: ignore[attr-defined]

from qlora_api.base import Model
from qlora_api.contract import ExitCode, reason_of
from qlora_trainer.errors import PeerLostError, PreemptedError, StalledError
from qlora_trainer.liveness.heartbeat import node_name
from qlora_trainer.worker.store_proxy import StoreClient, StoreServer, listen_on_loopback

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed import Store  # type: ignore[attr-defined]

    from qlora_api.contract import TrainerConfig

LOG_SECONDS = 30.0
"""Between lines that say who is waited for; the first comes at once."""
POLL_SECONDS = 0.5
LOOPBACK = "127.0.0.1"
ANSWER_SECONDS = 30
"""For one question to the store."""
SILENT_SECONDS = 90.0
"""A launcher does nothing but count and wait: one that does not count for so long is gone, or its node is."""
LINGER_SECONDS = 10.0
"""Time for which worker 0, which holds the store, stays after a failure so that the others can read the cause."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerIdentity:
    """Index of this worker, and the address of the rendezvous."""

    index: int
    workers: int
    host: str
    port: int
    node: str

    @classmethod
    def of(cls, config: TrainerConfig) -> WorkerIdentity:
        """Read from the config, the pod's index and the node's name."""
        index = int(os.environ.get("JOB_COMPLETION_INDEX", "0"))
        if not 0 <= index < config.workers:
            raise ValueError(f"JOB_COMPLETION_INDEX is {index}, and there are {config.workers} workers")
        host, _, port = (config.rendezvous or "").rpartition(":")
        if config.workers > 1 and not (host and port.isdecimal()):
            raise ValueError(f"{config.workers} workers need a rendezvous host:port, not {config.rendezvous!r}")
        return cls(index, config.workers, host.strip("[]"), int(port or 0), node_name())


class ExitRecord(Model):
    """Record that a worker leaves in the store when it ends."""

    exit_code: int
    text: str
    node: str


class Rendezvous:
    """All workers of an attempt, as one of them sees the others. Made by :func:`meet`."""

    def __init__(self, place: WorkerIdentity, store: Store, store_port: int, held: tuple[object, ...]) -> None:
        self._place = place
        self._store = store
        self.store_port = store_port
        """On 127.0.0.1, for the ranks of this worker."""
        self._held = held
        """Objects that serve the store, which lives as long as this object."""
        self._others = [i for i in range(place.workers) if i != place.index]
        self._counts: dict[int, tuple[bytes, float]] = {}
        self._count = 0

    def arrive(self) -> None:
        """Write this worker down."""
        self._store.set(f"here/{self._place.index}", self._place.node)

    def missing(self) -> list[int]:
        """Workers that are not here yet.

        Raises:
            PreemptedError: one was told to stop before all were here.
            PeerLostError: one failed before that, or the store is gone.

        """
        try:
            if self._store.check([f"here/{i}" for i in range(self._place.workers)]):
                return []
            records = self._exit_records()
            away = [i for i in range(self._place.workers) if not self._store.check([f"here/{i}"])]
        except DistError as error:
            raise PeerLostError(
                f"worker 0 at {self._place.host}:{self._place.port} went away: {_line(error)}"
            ) from None
        for index, record in records.items():
            if record.exit_code == ExitCode.PREEMPTED:
                raise PreemptedError(f"worker {index} on {record.node} was told to stop before all workers were here")
            raise PeerLostError(_ended(index, record))
        return away

    def lost(self) -> str | None:
        """Return why the ranks of this worker cannot continue, naming the worker at fault; None while all is well.

        A worker that ended well, or was told to stop, ended together with this one's ranks.
        """
        self._count += 1
        try:
            self._store.set(f"alive/{self._place.index}", str(self._count))
            if cause := self.cause() or self._follower():
                return cause
            keys = [f"alive/{i}" for i in self._others]
            now = time.monotonic()
            for index, key in zip(self._others, keys, strict=True):
                count = self._store.get(key) if self._store.check([key]) else b""
                seen, since = self._counts.get(index, (None, now))
                self._counts[index] = (count, since if seen == count else now)
                if now - self._counts[index][1] > SILENT_SECONDS and not self._has_ended(index):
                    return f"worker {index} on {self._node(index)} has been silent for {SILENT_SECONDS:.0f} s"
        except DistError as error:
            return f"worker 0 went away: {_line(error)}"
        return None

    def cause(self) -> str | None:
        """Return the exit message of a worker that failed by itself; None if there is none."""
        for index, record in self._exit_records().items():
            if record.exit_code not in (ExitCode.DONE, ExitCode.PREEMPTED, ExitCode.PEER_LOST):
                return _ended(index, record)
        return None

    def _follower(self) -> str | None:
        """Return a worker that ended because it lost another; its ranks are gone all the same."""
        return next((_ended(i, f) for i, f in self._exit_records().items() if f.exit_code == ExitCode.PEER_LOST), None)

    def find_cause(self) -> str | None:
        """As :meth:`cause`, with the time that a worker takes to end its ranks and say so."""
        until = time.monotonic() + LINGER_SECONDS
        try:
            while (cause := self.cause()) is None and time.monotonic() < until:
                time.sleep(POLL_SECONDS)
        except DistError:
            return None
        return cause

    def leave(self, exit_code: int, text: str) -> None:
        """Tell the others how this worker ended. After a failure worker 0 stays until all have read it."""
        record = ExitRecord(exit_code=exit_code, text=text[:1000], node=self._place.node)
        try:
            self._store.set(f"ended/{self._place.index}", record.model_dump_json())
            # 'set' waits for no answer, and the proxy on the way lives in this process, which may end now.
            self._store.check([f"ended/{self._place.index}"])
            if exit_code in (ExitCode.DONE, ExitCode.PREEMPTED) or self._place.index:
                return
            until = time.monotonic() + LINGER_SECONDS
            while len(self._exit_records()) < len(self._others) and time.monotonic() < until:
                time.sleep(POLL_SECONDS)
        except DistError as error:
            log.debug("nobody to tell: %s", error)

    def _exit_records(self) -> dict[int, ExitRecord]:
        keys = {i: f"ended/{i}" for i in self._others}
        return {
            i: ExitRecord.model_validate_json(self._store.get(key))
            for i, key in keys.items()
            if self._store.check([key])
        }

    def _has_ended(self, index: int) -> bool:
        return bool(self._store.check([f"ended/{index}"]))

    def _node(self, index: int) -> str:
        return self._store.get(f"here/{index}").decode()


def meet(
    place: WorkerIdentity,
    attempt: str,
    key: bytes,
    patience_seconds: float,
    waits: Callable[[float], None] = time.sleep,
) -> Rendezvous:
    """Wait until all workers of an attempt are here.

    Args:
        place: this worker's.
        attempt: names the attempt, so that a pod of an earlier one is not taken for a peer.
        key: of the attempt; a peer without it is not let in.
        patience_seconds: how long the slowest may take.
        waits: sleeps.

    Raises:
        StalledError: somebody did not come; names who.
        PreemptedError: another worker was told to stop meanwhile.
        PeerLostError: another worker was here, and failed.

    """
    clock = _Patience(patience_seconds, waits)
    port, *held = _serve_store(place, key) if place.index == 0 else _reach_store(place, key, clock)
    client = TCPStore(LOOPBACK, port, is_master=False, wait_for_workers=False, timeout=_seconds(ANSWER_SECONDS))
    rendezvous = Rendezvous(place, PrefixStore(attempt, client), port, tuple(held))
    rendezvous.arrive()
    try:
        while away := rendezvous.missing():
            others = f"{len(away)} of {place.workers} workers: {', '.join(map(str, away))}"
            clock.wait(f"waiting for {others}", f"{others} did not come to {place.host}:{place.port}")
    except PreemptedError:
        rendezvous.leave(ExitCode.PREEMPTED, "told to stop")
        raise
    except StalledError as error:
        rendezvous.leave(ExitCode.STALLED, str(error))
        raise
    return rendezvous


class _Patience:
    """Waits in small pieces with a line now and then, until it runs out."""

    def __init__(self, seconds: float, waits: Callable[[float], None]) -> None:
        self._seconds = seconds
        self._waits = waits
        self._began = time.monotonic()
        self._next_line = 0.0

    def wait(self, doing: str, failed: str) -> None:
        """Sleep a little.

        Raises:
            StalledError: for too long already.

        """
        waited = time.monotonic() - self._began
        if waited > self._seconds:
            raise StalledError(f"{failed} within {self._seconds:.0f} s (spec.policy.stallTimeoutSeconds)")
        if waited >= self._next_line:
            self._next_line = waited + LOG_SECONDS
            log.info("%s (%.0f s of at most %.0f s)", doing, waited, self._seconds)
        self._waits(POLL_SECONDS)


def hold_store() -> tuple[Store, int]:
    """Return a new store on loopback, which lives as long as the object, and its port."""
    listener = listen_on_loopback()
    port = listener.getsockname()[1]
    store = TCPStore(
        LOOPBACK,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=_seconds(ANSWER_SECONDS),
        master_listen_fd=listener.detach(),
    )
    return store, port


def _serve_store(place: WorkerIdentity, key: bytes) -> tuple[int, Store, StoreServer]:
    store, port = hold_store()
    return port, store, StoreServer(place.port, key, port)


def _reach_store(place: WorkerIdentity, key: bytes, clock: _Patience) -> tuple[int, StoreClient]:
    """Wait for worker 0's name to exist and its port to answer; its pod may start minutes later."""
    client = StoreClient((place.host, place.port), key, place.index)
    where = f"worker 0 at {place.host}:{place.port}"
    while True:
        try:
            client.check()
        except OSError as error:
            problem = "its name does not exist yet" if isinstance(error, socket.gaierror) else _line(error)
            clock.wait(f"waiting for {where}: {problem}", f"{where} ({problem}) did not come")
        else:
            return client.port, client


def _ended(index: int, record: ExitRecord) -> str:
    text = f": {record.text}" if record.text else ""
    return f"worker {index} on {record.node} ended as {reason_of(record.exit_code)}{text}"


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _seconds(count: float) -> timedelta:
    return timedelta(seconds=count)
