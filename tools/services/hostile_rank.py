"""A rank that was taken over: its port answers ``GET /progress`` with anything but what a trainer says."""

from __future__ import annotations

import gzip
import json
import random
import socket
import threading
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SEED = 12
REPORT: dict[str, Any] = {
    "job": "job",
    "attempt": 1,
    "section": "Train",
    "step": 3,
    "totalSteps": 10,
    "epoch": "0.3",
    "loss": "1.25",
    "learningRate": "0.0002",
    "tokensPerSecond": "1000",
    "etaSeconds": 60,
    "memory": {"predicted": {"peak": 1000}, "measured": {"peak": 1100}},
    "firstStep": 0,
    "elapsedSeconds": 5,
    "tokens": 5000,
    "longestStepSeconds": 0.1,
    "longestSaveSeconds": 0.1,
}
"""Progress report of a well-behaved rank."""
TERMINAL = "\x1b]0;owned\x07 \x1b[2J \x9b31m \u202egnp.exe \u2066 \u200b \x00 end"
"""Sets a title, clears the screen, colours, turns the direction of writing, hides."""
NOT_A_VALUE = (
    *("null", "true", '"n/a"', '"NaN"', '"inf"', '"1_0"', '"\\ud800"', '""', "[]", "{}", "[[1]]", '{"a": 1}'),
    *("-1", "1.5", "1e999", "-1e999", "NaN", "Infinity", "9" * 30, "9" * 5000, f'"{"x" * 5000}"'),
)
"""JSON, or nearly, of a value that a field does not take."""


def answers(elsewhere: str) -> list[bytes]:
    """Generate more than 200 answers, the same ones each time.

    Args:
        elsewhere: ``host:port`` of another server, to which some redirect.

    """
    chance = random.Random(SEED)
    made = [
        *_redirects(elsewhere),
        *_sizes(),
        *_encodings(chance),
        *_types(),
        *_nestings(),
        *_truncations(chance),
        *_extra_keys(chance),
    ]
    assert len(made) >= 200, len(made)
    chance.shuffle(made)
    return made


def http(body: bytes, *headers: str, status: str = "200 OK", length: object = None) -> bytes:
    """Return an HTTP answer."""
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *headers]
    return "\r\n".join([*head, "Connection: close", "", ""]).encode("latin-1", "replace") + body


def report(**changes: Any) -> bytes:
    """Return an honest report with some fields changed."""
    return http(json.dumps({**REPORT, **changes}).encode())


def _redirects(elsewhere: str) -> Iterator[bytes]:
    places = ("http://./", "http://", "//", "http://[::1", "http://169.254.169.254/latest/meta-data/", "/progress")
    for place in (*places, f"http://{elsewhere}/", f"//{elsewhere}/progress", "file:///etc/passwd", "http://a b/", ""):
        for status in (301, 302, 307):
            yield http(b"", f"Location: {place}", status=f"{status} Elsewhere")
    yield http(b"", status="303 Elsewhere")


def _sizes() -> Iterator[bytes]:
    body = json.dumps(REPORT).encode()
    for size in (65_537, 2**20, 2**24):
        yield http(body + b" " * size)
    for length in (0, 5, 10**6, 10**30, -1, "NaN", "5, 6", ""):
        yield http(body, length=length)
    for size in (9_000, 200_000):
        yield http(body, f"X-Large: {'x' * size}")
    yield http(body, *(f"X-{number}: x" for number in range(5_000)))
    yield http(body, *(f"Set-Cookie: c{number}={'x' * 4_000}" for number in range(20)))
    for chunks in (
        b"zz\r\n",
        b"5\r\nabc",
        b"-1\r\n",
        b"ffffffffffffffff\r\nabc",
        b"1\r\na\r\n" * 70_000 + b"0\r\n\r\n",
    ):
        yield b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n" + chunks


def _encodings(chance: random.Random) -> Iterator[bytes]:
    body = json.dumps(REPORT).encode()
    yield http(gzip.compress(b" " * 2**26 + body), "Content-Encoding: gzip")
    for encoding in ("gzip", "deflate", "br", "zstd", "identity, gzip", "none", "\xff"):
        yield http(gzip.compress(body), f"Content-Encoding: {encoding}")
        yield http(body, f"Content-Encoding: {encoding}")
    for charset in ("utf-16", "utf-32", "utf-7", "cp037"):
        yield http(json.dumps(REPORT).encode(charset), f"Content-Type: application/json; charset={charset}")
    yield http(b"\xef\xbb\xbf" + body)
    for _ in range(8):
        yield http(chance.randbytes(chance.randrange(1, 2_000)))


def _types() -> Iterator[bytes]:
    for name in ("attempt", "section", "step", "epoch", "loss", "memory", "firstStep", "longestStepSeconds"):
        for value in NOT_A_VALUE:
            fields = ", ".join(f'"{key}": {json.dumps(kept)}' for key, kept in REPORT.items() if key != name)
            yield http(f'{{{fields}, "{name}": {value}}}'.encode(errors="replace"))
    for body in (b"", b"null", b"[]", b"1", b'"report"', b"{", b"not JSON"):
        yield http(body)


def _nestings() -> Iterator[bytes]:
    for depth in (200, 1_000, 20_000):
        yield http(b"[" * depth)
        yield http(b'{"memory":' * depth + b"1" + b"}" * depth)
        nested = json.dumps(REPORT)[:-1].encode() + b', "more": ' + b"[" * depth + b"]" * depth + b"}"
        yield http(nested)


def _truncations(chance: random.Random) -> Iterator[bytes]:
    whole = report()
    for _ in range(24):
        yield whole[: chance.randrange(len(whole))]
    yield b""
    yield b"\x00" * 100
    yield b"SSH-2.0-OpenSSH_9.9\r\n"


def _extra_keys(chance: random.Random) -> Iterator[bytes]:
    for count in (1, 40, 2_000):
        yield report(**{f"key{number}": number for number in range(count)})
    for _ in range(12):
        names = {f"component{chance.randrange(10**6)}": chance.randrange(10**9) for _ in range(25)}
        yield report(memory={"predicted": names, "measured": names})
        yield report(memory={"measured": {**names, "peak": 10 ** chance.randrange(40)}})


class HostileRank:
    """Serves the answers in turn. A context manager.

    Args:
        address: of this machine, to listen on.
        port: to listen on.
        said: the answers.

    """

    def __init__(self, address: str, port: int, said: Sequence[bytes]) -> None:
        self.address, self._said = address, said
        self.asked = 0
        """Connections that were taken."""
        self._socket = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((address, port))
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Self:
        self._socket.listen(64)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                line, _ = self._socket.accept()
            except OSError:
                return
            answer = self._said[self.asked % len(self._said)]
            self.asked += 1
            with line:
                line.settimeout(2)
                try:
                    line.recv(65_536)
                    line.sendall(answer)
                except OSError:
                    continue  # the other side has had enough of it
