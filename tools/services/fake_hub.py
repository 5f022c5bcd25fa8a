"""The part of the Hugging Face Hub's HTTP interface that its own client needs to list and download a repository."""

import hashlib
import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from services.http_server import serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories in memory: (kind, name) → path → content, all at COMMIT, which "main" and "v1" point at."""

    def __init__(self):
        self.repositories = {}
        self.refused = {}
        """Repository's name → (status, X-Error-Code)."""
        self.busy = []
        """(status, Retry-After) of the next answers, whatever is asked."""
        self.served = []
        """Paths of files that were downloaded."""
        self.ranges = []
        """Bytes that were sent for each request of a part."""
        self.sized = True
        """False: whole files are sent in chunks, whatever part is asked for, without a word of their size."""
        self.endpoint = ""

    def add(self, name, files, kind="models"):
        self.repositories[kind, name] = files


@contextmanager
def running():
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    with serving(server) as hub.endpoint:
        yield hub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self):
        self._answer(with_body=False)

    def do_GET(self):
        self._answer(with_body=True)

    def log_message(self, *_):
        pass

    def _answer(self, with_body):
        parts = [unquote(p) for p in urlsplit(self.path).path.strip("/").split("/")]
        is_api = parts[0] == "api"
        parts = parts[1:] if is_api else parts
        kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
        name, action, revision, path = "/".join(parts[:2]), parts[2], parts[3], "/".join(parts[4:])
        files = self.hub.repositories.get((kind, name))
        if self.hub.busy:
            status, wait = self.hub.busy.pop(0)
            self._send(status, b"{}", with_body, {"Retry-After": wait} if wait else {})
        elif name in self.hub.refused:
            status, code = self.hub.refused[name]
            self._send(status, b"{}", with_body, {"X-Error-Code": code})
        elif files is None:
            self._send(404, b"{}", with_body, {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", "v1", COMMIT):
            self._send(404, b"{}", with_body, {"X-Error-Code": "RevisionNotFound"})
        elif action == "revision":
            siblings = [{"rfilename": n} for n in files]
            self._json({"id": name, "sha": COMMIT, "siblings": siblings}, with_body)
        elif action == "tree":
            self._json(
                [{"type": "file", "path": n, "size": len(d), "oid": _oid(d)} for n, d in files.items()], with_body
            )
        else:
            if with_body:
                self.hub.served.append(path)
            headers = {"ETag": f'"{_oid(files[path])}"', "X-Repo-Commit": COMMIT}
            self._part(files[path], with_body, headers)

    def _part(self, data, with_body, headers):
        """The bytes that a Range asks for, or all."""
        asked = self.headers.get("Range")
        if not asked or not with_body:
            self._send(200, data, with_body, headers)
            return
        if not self.hub.sized:
            self._send_chunks(data, headers)
            return
        start, _, end = asked.removeprefix("bytes=").partition("-")
        part = data[int(start) : int(end) + 1] if end else data[int(start) :]
        place = f"bytes {start}-{int(start) + len(part) - 1}/{len(data)}"
        self.hub.ranges.append(len(part))
        self._send(206, part, with_body, {**headers, "Content-Range": place})

    def _send_chunks(self, data, headers):
        self.send_response(200)
        for name, value in {"Transfer-Encoding": "chunked", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        for chunk in (data[:100], data[100:], b""):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))

    def _json(self, value, with_body):
        self._send(200, json.dumps(value).encode(), with_body, {"Content-Type": "application/json"})

    def _send(self, status, body, with_body, headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


def _oid(data):
    return hashlib.sha1(data).hexdigest()
