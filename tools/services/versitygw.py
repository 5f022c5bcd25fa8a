"""A real S3 server on loopback: versitygw over a folder. Signatures, 403, 404 and 412 are its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.binaries import find_or_build
from services.server import Server
from services.tools import VERSITYGW

if TYPE_CHECKING:
    from pathlib import Path

ACCESS_KEY = "test-access"
SECRET_KEY = "test-secret"
REGION = "us-east-1"


class VersityGateway(Server):
    """One server.

    Args:
        folder: for buckets, metadata and the log; made if missing.
        address: where it listens, such as a bridge's that pods reach.

    """

    def __init__(self, folder: Path, address: str = "127.0.0.1") -> None:
        self._binary = find_or_build(VERSITYGW)
        super().__init__("versitygw", folder, address)
        self._data, self._metadata = self._folder / "data", self._folder / "metadata"
        for part in (self._data, self._metadata):
            part.mkdir(parents=True)

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment of a client, under the names the SDKs use."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_ENDPOINT_URL": self.url,
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

    def _command(self) -> list[str | Path]:
        return [
            *(self._binary, "--access", ACCESS_KEY, "--secret", SECRET_KEY, "--region", REGION),
            *("--port", f"{self.address}:{self.port}", "--health", "/health", "--quiet"),
            *("posix", "--sidecar", self._metadata, self._data),
        ]
