"""A hub that gives files in part, and counts what it gave."""

from __future__ import annotations

import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from services.http_server import serving


class Hub:
    """Files of repositories: path after ``/resolve/<revision>/`` → content."""

    def __init__(self):
        self.files = {}
        self.token = None
        """Required, if set."""
        self.ranges = True
        """False: answers every range with the whole file, as some proxies do."""
        self.given = 0
        """Bytes of bodies."""
        self.requests = []


@contextmanager
def running():
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    with serving(server) as hub.endpoint:
        yield hub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.hub.requests.append(self.path)
        match = re.fullmatch(r"/org/(\w+)/resolve/(\w+)/(.+)", self.path)
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.answer(401, b"", {"X-Error-Code": "GatedRepo"})
        if not match or match[1] != "base":
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        if match[2] != "main":
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        content = self.hub.files.get(match[3])
        if content is None:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not wanted or not self.hub.ranges:
            return self.answer(200, content, {})
        start, end = int(wanted[1]), int(wanted[2])
        return self.answer(206, content[start : end + 1], {"Content-Range": f"bytes {start}-{end}/{len(content)}"})

    def answer(self, status, body, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(body)
            self.hub.given += len(body)
        except (BrokenPipeError, ConnectionResetError):  # the reader has enough
            self.close_connection = True
