"""An HTTP server in a daemon thread, for whoever asks a pod: light to import, and nobody can keep others out."""

from __future__ import annotations

import logging
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from qlora_trainer.listening import listen_everywhere

REQUEST_SECONDS = 5.0
"""A connection on which nothing is said for so long is closed."""
MAXIMUM_CONNECTIONS = 32
log = logging.getLogger(__name__)


def start_server(app: Callable[..., Any], host: str, port: int) -> WSGIServer:
    """Serve a WSGI application from a daemon thread.

    Args:
        app: the application.
        host: address to listen on; empty: all, of IPv4 and IPv6.
        port: to listen on; 0 takes any free one.

    Returns:
        The running server; ``shutdown`` ends it.

    Raises:
        OSError: the port is taken.

    """
    server = make_server(host, port, app, _Server, _Handler)
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    return server


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_SECONDS

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 the base class names it so
        """Scrapes are not worth a line each."""


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each connection, and of too many at once the oldest is closed: nobody can keep others out."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._open: dict[socket.socket, None] = {}
        self._lock = threading.Lock()

    def server_bind(self) -> None:
        """Bind the address; without a host, all of both families."""
        host, port = self.server_address[:2]
        if host:
            super().server_bind()
            return
        self.socket.close()
        self.socket = listen_everywhere(int(port), self.request_queue_size)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = socket.gethostname(), self.server_address[1]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._open[request] = None
            oldest = next(iter(self._open)) if len(self._open) > MAXIMUM_CONNECTIONS else None
            if oldest is not None:
                del self._open[oldest]
        if oldest is not None:
            with suppress(OSError):  # it has just been closed
                oldest.shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 the base class has it
        """Note a connection that broke, or was no HTTP, without a trace in the log."""
        log.debug("a request from %s failed: %s", client_address, sys.exception())
