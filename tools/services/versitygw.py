"""A real S3 server on loopback: versitygw over a folder. Signatures, 403, 404 and 412 are its own."""

from __future__ import annotations

import signal
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from services.binaries import find_or_build
from services.tools import VERSITYGW
from testing.ports import free_port
from testing.timeouts import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ACCESS_KEY = "test-access"
SECRET_KEY = "test-secret"
REGION = "us-east-1"
READY_SECONDS = PATIENCE_SECONDS
STOP_SECONDS = 5


class VersityGateway:
    """One server. ``stop`` and ``start`` keep port and content: to a client, the server was away.

    Args:
        folder: for buckets, metadata and the log; made if missing.
        address: where it listens, such as a bridge's that pods reach.

    """

    def __init__(self, folder: Path, address: str = "127.0.0.1") -> None:
        self.address = address
        self._binary = find_or_build(VERSITYGW)
        self._data, self._metadata = folder / "data", folder / "metadata"
        self._log = folder / "versitygw.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port(address)
        for part in (self._data, self._metadata):
            part.mkdir(parents=True)

    @property
    def endpoint(self) -> str:
        return f"http://{self.address}:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment of a client, under the names the SDKs use."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": REGION,
            "AWS_ALLOW_HTTP": "true",
        }

    def bucket(self, name: str) -> str:
        """Make a bucket; its URI."""
        (self._data / name).mkdir(exist_ok=True)
        return f"s3://{name}"

    def folder_of(self, bucket: str) -> Path:
        """Return the folder of a bucket, where objects are files: what is put there is in the bucket."""
        return self._data / bucket

    def start(self) -> None:
        """Start the server and wait until it answers."""
        command = [
            *(self._binary, "--access", ACCESS_KEY, "--secret", SECRET_KEY, "--region", REGION),
            *("--port", f"{self.address}:{self.port}", "--health", "/health", "--quiet"),
            *("posix", "--sidecar", self._metadata, self._data),
        ]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + READY_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"versitygw does not start: {self._log.read_text()[-2000:]}")
            time.sleep(0.02)

    def stop(self) -> None:
        """Stop this server's own process."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Let the server take connections and answer none, as one behind a stuck disk."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.endpoint}/health", timeout=1) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False
