"""A server of a test's own words, for what a real one does not do on demand: hang up, expire, be rude."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from qlora_cli.kube.api_client import ApiClient
from qlora_cli.kube.kubeconfig import Access, User


class FakeServer:
    """Answers from a list, in order: (status, body) with a body of JSON, text, or a list of lines to be streamed."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                outer.asked.append((self.command, urlsplit(self.path).path, self.query(), dict(self.headers)))
                status, body = outer.answers.pop(0) if outer.answers else (500, {"message": "nothing left to say"})
                if body is None:  # hang up
                    self.close_connection = True
                    return
                self.send_response(status)
                if isinstance(body, list):
                    self.send_header("Transfer-Encoding", "chunked")
                    self.end_headers()
                    for line in body:
                        data = (json.dumps(line) if isinstance(line, dict) else line).encode() + b"\n"
                        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                    self.wfile.write(b"0\r\n\r\n")
                    return
                data = (body if isinstance(body, str) else json.dumps(body)).encode()
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_POST(self):
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.do_GET()

            def do_PATCH(self):
                self.do_POST()

            def query(self):
                return {k: v[0] for k, v in parse_qs(urlsplit(self.path).query).items()}

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def api(self, **user):
        return ApiClient(Access(context="test", server=self.url, namespace="default", user=User(**user)))

    def kubeconfig(self):
        """Return the text of a kubeconfig whose context ``here`` is this server, without a user."""
        return json.dumps(
            {
                "clusters": [{"name": "c", "cluster": {"server": self.url}}],
                "contexts": [{"name": "here", "context": {"cluster": "c"}}],
                "current-context": "here",
            }
        )

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
