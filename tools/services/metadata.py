"""The metadata service of a machine in a cloud, on loopback: who asks is given credentials, and is recorded."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

from services.http_server import serving

if TYPE_CHECKING:
    from collections.abc import Iterator

EXPIRES = "2099-01-01T00:00:00Z"


@dataclass
class MetadataService:
    """Credentials that are given, and requests that were made. Requests for objects are refused with 403."""

    access_key: str
    secret_key: str
    endpoint: str = ""
    asked: list[str] = field(default_factory=list)
    """Paths of requests for credentials."""
    signed: list[bool] = field(default_factory=list)
    """For each request for an object: True if it had an Authorization header."""

    def answer(self, path: str) -> tuple[int, str]:
        keys = {"AccessKeyId": self.access_key, "SecretAccessKey": self.secret_key, "Expiration": EXPIRES}
        token = {"access_token": "token", "expires_in": "3600", "expires_on": "4000000000", "token_type": "Bearer"}
        if path.startswith("/latest/api/token"):
            return 200, "token"
        if path == "/latest/meta-data/iam/security-credentials/":
            return 200, "node"
        if path == "/latest/meta-data/iam/security-credentials/node":
            return 200, json.dumps({"Code": "Success", "Token": "", **keys})
        if path.startswith(("/computeMetadata", "/tenant/")):
            return 200, json.dumps({**token, "expires_in": 3600})
        if path.startswith("/metadata/identity"):
            return 200, json.dumps(token)
        return 0, ""


@contextmanager
def metadata_service(access_key: str, secret_key: str) -> Iterator[MetadataService]:
    """Run a metadata service whose credentials are these."""
    service = MetadataService(access_key, secret_key)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, text = service.answer(self.path)
            if status:
                service.asked.append(self.path)
            else:
                service.signed.append("Authorization" in self.headers)
                status = 403
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        do_PUT = do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    with serving(server) as service.endpoint:
        yield service
