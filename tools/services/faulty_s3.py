"""A proxy before a real S3 server that answers as servers and networks do on a bad day.

Requests pass unchanged, their Host too, so that the server verifies the client's own signatures.
"""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

from obstore.store import S3Store

from services.http_server import serving
from services.versitygw import ACCESS_KEY, SECRET_KEY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from services.versitygw import VersityGateway

PIECE = 16 << 10
HOP_BY_HOP = ("connection", "transfer-encoding", "keep-alive")


@dataclass(frozen=True)
class S3Fault:
    """One bad answer."""

    name: str
    status: int = 0
    """0: the connection breaks."""
    code: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    details: str = ""
    """More XML of the answer."""
    carried_out: bool = False
    """The server has done what was asked, and its answer is lost or cut."""


def _skewed() -> str:
    now = datetime.now(UTC)
    asked = f"{now - timedelta(minutes=20):%Y%m%dT%H%M%SZ}"
    return f"<RequestTime>{asked}</RequestTime><ServerTime>{now:%Y-%m-%dT%H:%M:%SZ}</ServerTime>"


TRANSIENT = (
    S3Fault("request-timeout", 400, "RequestTimeout"),
    S3Fault("incomplete-body", 400, "IncompleteBody"),
    S3Fault("bad-digest", 400, "BadDigest"),
    S3Fault("clock", 403, "RequestTimeTooSkewed", details=_skewed()),
    S3Fault("aborted", 409, "OperationAborted"),
    S3Fault("conflict", 409, "ConditionalRequestConflict"),
    S3Fault("too-many", 429, "TooManyRequests", (("Retry-After", "1"),)),
    S3Fault("internal", 500, "InternalError"),
    S3Fault("slow-down", 503, "SlowDown", (("Retry-After", "1"),)),
    S3Fault("bad-gateway", 502),
    S3Fault("reset"),
    S3Fault("answer-lost", carried_out=True),
    S3Fault("half-an-answer", 200, carried_out=True),
)
"""Faults that pass by themselves."""
FINAL = (
    S3Fault("other-region", 301, "PermanentRedirect"),
    S3Fault("other-region-signed", 400, "AuthorizationHeaderMalformed", details="<Region>eu-west-1</Region>"),
    S3Fault("other-account", 403, "InvalidAccessKeyId"),
    S3Fault("denied", 403, "AccessDenied"),
    S3Fault("expired", 400, "ExpiredToken"),
    S3Fault("no-bucket", 404, "NoSuchBucket"),
)
"""Faults that only the user can correct."""

Call = tuple[str, str, str]
"""Method, path, and names of the query's parameters."""


@dataclass
class FaultyS3:
    """Options of a running proxy; they may change at any time."""

    upstream: VersityGateway
    choose: Callable[[Call, int], S3Fault | None] = lambda _call, _times: None
    """Given a call and how often it came before, which fault it gets."""
    uplink_bytes_per_second: float | None = None
    """Rate for the bodies of all requests together; None: unlimited."""
    downlink_bytes_per_second: float | None = None
    """Rate for the body of each answer; None: unlimited."""
    conditions: Literal["kept", "ignored", "refused"] = "kept"
    """If-None-Match counts (kept), replaces what is there (ignored), or is not known (refused)."""
    endpoint: str = ""
    calls: Counter[Call] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    times: list[tuple[float, Call]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    line: threading.Lock = field(default_factory=threading.Lock)

    @property
    def environment(self) -> dict[str, str]:
        return {**self.upstream.environment, "AWS_ENDPOINT_URL": self.endpoint}

    def bucket(self, name: str) -> str:
        return self.upstream.bucket(name)

    def forget(self, path: str) -> None:
        """Delete an object, so that creating it replaces it."""
        bucket, _, key = path.strip("/").partition("/")
        store = S3Store(
            bucket,
            endpoint=self.upstream.url,
            access_key_id=ACCESS_KEY,
            secret_access_key=SECRET_KEY,
            client_options={"allow_http": True},
        )
        store.delete(key)

    def note(self, call: Call) -> S3Fault | None:
        with self.lock:
            fault = self.choose(call, self.calls[call])
            self.calls[call] += 1
            self.times.append((time.monotonic(), call))
            if fault:
                self.faults[fault.name] += 1
        return fault


def once_each(fault: S3Fault) -> Callable[[Call, int], S3Fault | None]:
    """Give every call this fault when it comes for the first time."""
    return lambda _call, times: fault if times == 0 else None


@contextmanager
def faulty_s3(upstream: VersityGateway) -> Iterator[FaultyS3]:
    """Run a proxy before ``upstream``."""
    proxy = FaultyS3(upstream)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": proxy}))
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * PIECE)
    server.daemon_threads = True
    server.block_on_close = False
    with serving(server) as proxy.endpoint:
        yield proxy


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultyS3

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        names = ",".join(sorted(name for name, _ in parse_qsl(parts.query, keep_blank_values=True)))
        fault = self.proxy.note((self.command, parts.path, names))
        try:
            body = self._body()
            if fault and not fault.carried_out:
                self._fail(fault)
                return
            if "If-None-Match" in self.headers and self.proxy.conditions == "refused":
                self._fail(S3Fault("no-conditions", 501, "NotImplemented"))
                return
            if "If-None-Match" in self.headers and self.proxy.conditions == "ignored":
                self.proxy.forget(unquote(parts.path))
            status, headers, answer = self._forward(body)
            if fault and (fault.status == 0 or status >= 300 or len(answer) < 2):
                self._reset()
                return
            self._send(status, headers, answer[: len(answer) // 2] if fault else answer)
            if fault:
                self._reset()
        except ConnectionError:
            self.close_connection = True

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

    def _body(self) -> bytes:
        left, body = int(self.headers.get("Content-Length") or 0), bytearray()
        while left:
            piece = self._piece(min(left, PIECE))
            if not piece:
                raise ConnectionAbortedError("the client has gone")
            body += piece
            left -= len(piece)
        return bytes(body)

    def _piece(self, size: int) -> bytes:
        rate = self.proxy.uplink_bytes_per_second
        if rate is None:
            return self.rfile.read(size)
        with self.proxy.line:
            time.sleep(size / rate)
        return self.rfile.read(size)

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = http.client.HTTPConnection(self.proxy.upstream.address, self.proxy.upstream.port)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                upstream.putheader(name, value)
            upstream.endheaders(body or None)
            answer = upstream.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            upstream.close()

    def _send(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        self.end_headers()
        if (rate := self.proxy.downlink_bytes_per_second) is None:
            self.wfile.write(body)
            return
        for start in range(0, len(body), PIECE):
            time.sleep(PIECE / rate)
            self.wfile.write(body[start : start + PIECE])

    def _fail(self, fault: S3Fault) -> None:
        if not fault.status:
            self._reset()
            return
        text = f"<Error><Code>{fault.code}</Code><Message>for the test</Message>{fault.details}</Error>"
        body = text.encode() if fault.code and self.command != "HEAD" else b""
        self._send(fault.status, [*fault.headers, ("Content-Length", str(len(body)))], body)

    def _reset(self) -> None:
        """End the connection by RST, as a firewall does."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
