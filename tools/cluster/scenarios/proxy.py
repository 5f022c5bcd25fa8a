"""A proxy between one client and the API server: it records what changes something, and has bad days on demand.

The client speaks plain HTTP to it, with a kubeconfig that the proxy writes; watches are streamed. Everything runs in a
thread of the proxy's own; its methods may be called from any thread.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import aiohttp
from aiohttp import web

from cluster.credentials import write_kubeconfig

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from pathlib import Path

    from cluster.control_plane import ControlPlane

START_SECONDS = 10
POLL_SECONDS = 0.05
MUTATING = ("POST", "PUT", "PATCH", "DELETE")
HOP_BY_HOP = frozenset(
    {"connection", "content-encoding", "content-length", "host", "keep-alive", "transfer-encoding", "upgrade"}
)
GONE = {
    "kind": "Status",
    "apiVersion": "v1",
    "metadata": {},
    "status": "Failure",
    "reason": "Expired",
    "message": "too old resource version: 1 (2)",
    "code": 410,
}
REASONS = {
    401: "Unauthorized",
    404: "NotFound",
    409: "Conflict",
    410: "Expired",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
}


@dataclass(frozen=True)
class Call:
    """One request of the client's."""

    number: int
    """Number of this call among the mutating ones, from 1; 0 for reads."""
    method: str
    path: str
    """Without the query."""
    user_agent: str
    at: float
    """Time at which the call arrived, by ``time.monotonic``."""
    watch: bool = False
    body: dict[str, Any] = field(default_factory=dict)

    @property
    def resource(self) -> str:
        """Plural name, with the subresource: ``jobs``, ``qlorajobs/status``."""
        parts = self._parts
        return "/".join((parts[0], *parts[2:3])) if parts else ""

    @property
    def name(self) -> str:
        """Return the object's name; empty where the server gives it one."""
        parts = self._parts
        return parts[1] if len(parts) > 1 else self.body.get("metadata", {}).get("name", "")

    @property
    def _parts(self) -> list[str]:
        parts = self.path.strip("/").split("/")
        parts = parts[2:] if parts[0] == "api" else parts[3:]
        return parts[2:] if parts[:1] == ["namespaces"] and len(parts) > 2 else parts


Matches = Callable[[Call], bool]


@dataclass(frozen=True)
class Killed:
    """The client is killed by ``kill``, before the call was forwarded or after it was carried out."""

    kill: Callable[[], None]
    after: bool


@dataclass(frozen=True)
class AnswerLost:
    """The call is carried out, and the connection closed in place of an answer."""


@dataclass(frozen=True)
class Refused:
    """The call is not forwarded; the answer is an error."""

    status: int
    retry_after: int | None = None


@dataclass(frozen=True)
class Passed:
    """Nothing happens to the call; what ``matches`` did before it is the fault."""


Fault = Killed | AnswerLost | Refused | Passed


class _WatchStream:
    """One watch as it streams."""

    def __init__(self, resource: str, request: web.Request) -> None:
        self.resource = resource
        self.transport = request.transport
        self.flows = asyncio.Event()
        self.flows.set()
        self.ended = asyncio.Event()
        self.last_line = b""

    def cut(self) -> None:
        if self.transport is not None:
            self.transport.abort()


class Proxy:
    """A context manager.

    Args:
        cluster: before whose API server it stands.
        folder: for the kubeconfig.
        token: whose rights the client has; the administrator's by default.

    """

    def __init__(self, cluster: ControlPlane, folder: Path, token: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.calls: list[Call] = []
        """Every mutating call, in the order of arrival."""
        self.reads: list[Call] = []
        self.kubeconfig = folder / "proxy.kubeconfig"
        self._cluster, self._token = cluster, token or cluster.admin_token
        self._faults: list[tuple[Matches, Fault, int]] = []
        self._watches: set[_WatchStream] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def when(self, matches: Matches, fault: Fault, times: int = 1) -> None:
        """Have the next ``times`` calls that match meet with a fault."""
        self._faults.append((matches, fault, times))

    def at(self, number: int, fault: Fault) -> None:
        """Have the mutating call of this number meet with a fault."""
        self.when(lambda call: call.number == number, fault)

    def clear(self) -> None:
        """Let calls through again."""
        self._faults.clear()

    @property
    def pending_faults(self) -> int:
        """Faults that nothing has met with yet."""
        return len(self._faults)

    def watches(self, resource: str = "") -> int:
        """Return how many watches stream now."""
        return sum(1 for watch in list(self._watches) if resource in ("", watch.resource))

    def cut_watches(self, resource: str = "") -> None:
        """Break the connections of watches of a resource, or of all."""
        self._each(resource, _WatchStream.cut)

    def end_watches(self, resource: str = "", status: dict[str, Any] | None = None) -> None:
        """End watches with an ERROR event, by default the one that says 410 Gone."""

        def end(watch: _WatchStream) -> None:
            watch.last_line = json.dumps({"type": "ERROR", "object": status or GONE}).encode() + b"\n"
            watch.ended.set()

        self._each(resource, end)

    def freeze_watches(self, resource: str = "") -> None:
        """Let no more bytes through, and keep the connections: as when a firewall has forgotten them."""
        self._each(resource, lambda watch: watch.flows.clear())

    def start(self) -> None:
        self._thread.start()
        port = self._do(self._serve())
        write_kubeconfig(self.kubeconfig, f"http://127.0.0.1:{port}", self._cluster.authority, token=self._token)

    def stop(self) -> None:
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ---------------------------------------------------------------------------------------------- in the own thread

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(START_SECONDS)

    def _each(self, resource: str, act: Callable[[_WatchStream], None]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self.watches(resource):  # asked for, and not answered yet
            if time.monotonic() > deadline:
                raise TimeoutError(f"nobody watches {resource or 'anything'}")
            time.sleep(POLL_SECONDS)

        async def each() -> None:
            for watch in list(self._watches):
                if resource in ("", watch.resource):
                    act(watch)

        self._do(each())

    async def _serve(self) -> int:
        trusted = ssl.create_default_context(cafile=self._cluster.authority.certificate)
        self._upstream = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=trusted),
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
            trust_env=False,
        )
        server = web.Server(self._handle)
        self._runner = web.ServerRunner(server, access_log=None, handler_cancellation=True, shutdown_timeout=1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return self._runner.addresses[0][1]

    async def _end(self) -> None:
        await self._runner.cleanup()
        await self._upstream.close()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read()
        call = self._record(request, body)
        fault = self._fault(call)
        if isinstance(fault, Refused):
            return _refusal(fault)
        if isinstance(fault, Killed) and not fault.after:
            return self._kill(request, fault)
        headers = {k: v for k, v in request.headers.items() if k.lower() not in HOP_BY_HOP | {"accept-encoding"}}
        url = f"{self._cluster.url}{request.path_qs}"
        try:
            async with self._upstream.request(request.method, url, headers=headers, data=body or None) as answer:
                if call.watch and answer.status == 200:
                    return await self._stream(request, call, answer)
                text = await answer.read()
        except aiohttp.ClientError:  # no API server: the client must see that there is none
            return _hang_up(request)
        if isinstance(fault, Killed):
            return self._kill(request, fault)
        if isinstance(fault, AnswerLost):
            return _hang_up(request)
        kept = {k: v for k, v in answer.headers.items() if k.lower() not in HOP_BY_HOP}
        return web.Response(status=answer.status, body=text, headers=kept)

    def _record(self, request: web.BaseRequest, body: bytes) -> Call:
        mutates = request.method in MUTATING
        call = Call(
            number=len(self.calls) + 1 if mutates else 0,
            method=request.method,
            path=request.path,
            user_agent=request.headers.get("User-Agent", ""),
            at=time.monotonic(),
            watch=request.query.get("watch") == "true",
            body=json.loads(body) if mutates and body else {},
        )
        (self.calls if mutates else self.reads).append(call)
        return call

    def _fault(self, call: Call) -> Fault | None:
        for place, (matches, fault, times) in enumerate(self._faults):
            if matches(call):
                self._faults[place : place + 1] = [(matches, fault, times - 1)] if times > 1 else []
                return fault
        return None

    def _kill(self, request: web.BaseRequest, fault: Killed) -> web.StreamResponse:
        fault.kill()
        return _hang_up(request)

    async def _stream(self, request: web.BaseRequest, call: Call, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        watch = _WatchStream(call.resource, request)
        self._watches.add(watch)
        ended = asyncio.create_task(watch.ended.wait())
        reading: asyncio.Task[bytes] | None = None
        try:
            await response.prepare(request)
            while True:
                reading = asyncio.create_task(answer.content.readany())
                await asyncio.wait((reading, ended), return_when=asyncio.FIRST_COMPLETED)
                if ended.done():
                    await response.write(watch.last_line)
                    break
                await watch.flows.wait()
                data = reading.result()
                if not data:
                    break
                await response.write(data)
        except (aiohttp.ClientError, ConnectionError):
            watch.cut()
        finally:
            self._watches.discard(watch)
            for task in (ended, reading):
                if task is not None:
                    task.cancel()
                    with suppress(asyncio.CancelledError, aiohttp.ClientError):
                        await task
        return response


def _refusal(fault: Refused) -> web.Response:
    status = {**GONE, "code": fault.status, "reason": REASONS[fault.status], "message": "a bad day, by the test"}
    headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
    return web.json_response(status, status=fault.status, headers=headers)


def _hang_up(request: web.BaseRequest) -> web.StreamResponse:
    if request.transport is not None:
        request.transport.abort()
    return web.Response(status=503)
