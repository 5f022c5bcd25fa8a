"""A kubelet that only serves logs: what a test writes, the API server fetches as from any node."""

from __future__ import annotations

import ssl
import threading
import time
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Self
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from cluster.control_plane import ControlPlane

POLL_SECONDS = 0.05
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


class Kubelet:
    """Logs by pod name. A context manager: while it lives, pods of ``node`` have logs."""

    def __init__(self, cluster: ControlPlane, node: str, host: str) -> None:
        self._cluster, self._node, self._host = cluster, node, host
        self._lines: dict[str, list[tuple[str, str]]] = {}
        self._closed: set[str] = set()
        self._cut: set[str] = set()
        self.asked: list[dict[str, str]] = []
        pair = cluster.authority.issue(f"system:node:{node}", hosts=[host])
        self._server = ThreadingHTTPServer((host, 0), self._handler())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pair.certificate, pair.key)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._server.daemon_threads = True

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(POLL_SECONDS,), daemon=True).start()
        status = {
            "addresses": [{"type": "InternalIP", "address": self._host}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": self._server.server_port}},
        }
        self._cluster.api.patch(f"/api/v1/nodes/{self._node}/status", {"status": status}, kind="strategic")
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def write(self, pod: str, *lines: str, at: float | None = None) -> None:
        """Add lines, a millisecond apart, from ``at`` (seconds after the beginning) or now on."""
        first = BEGIN + timedelta(seconds=at) if at is not None else datetime.now(UTC)
        for number, line in enumerate(lines):
            stamp = (first + timedelta(milliseconds=number)).isoformat().replace("+00:00", "Z")
            self._lines.setdefault(pod, []).append((stamp, line))

    def end(self, pod: str) -> None:
        """The container has ended: whoever follows has all."""
        self._closed.add(pod)

    def cut(self, pod: str) -> None:
        """Break off whoever follows now."""
        self._cut.add(pod)

    def _handler(kubelet) -> type[BaseHTTPRequestHandler]:  # noqa: N805 the handler's own is self
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                asked = {name: values[0] for name, values in parse_qs(parts.query).items()}
                kubelet.asked.append(asked)
                pod = parts.path.split("/")[3]  # /containerLogs/NAMESPACE/POD/CONTAINER
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                shown = [pair for pair in kubelet._lines.get(pod, []) if pair[0] >= asked.get("sinceTime", "")]
                at = len(kubelet._lines.get(pod, []))
                self._send(shown[-int(asked["tailLines"]) :] if asked.get("tailLines") else shown)
                while asked.get("follow") == "true" and pod not in kubelet._closed:
                    if pod in kubelet._cut:
                        kubelet._cut.discard(pod)
                        break
                    time.sleep(POLL_SECONDS)
                    new = kubelet._lines.get(pod, [])[at:]
                    at += len(new)
                    self._send(new)
                else:
                    self._send(kubelet._lines.get(pod, [])[at:])
                self.wfile.write(b"0\r\n\r\n")

            def _send(self, lines: list[tuple[str, str]]) -> None:
                for stamp, line in lines:
                    data = f"{stamp} {line}\n".encode()
                    self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                self.wfile.flush()

            def log_message(self, *_: object) -> None:
                pass

        return Handler
