"""The backend of S3, Google Cloud Storage and Azure Blob Storage, through obstore."""

from __future__ import annotations

import os
import re
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import AzureStore, GCSStore, S3Store

from qlora_storage.backend import CHUNK_BYTES, MIB, Entry, Fault, FaultKind
from qlora_storage.environment import forget_empty_endpoints

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import ClientConfig, RetryConfig

PART_BYTES = 8 * MIB
MAX_PARTS = 9_000
"""S3 takes 10,000 parts an upload."""
REQUEST_SECONDS = 120
INNER_RETRIES = 6
"""obstore's own, per request (about 2 s in all): a part of a large upload is repeated, not the whole."""

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([^<]*)</Code>")
_MESSAGE = re.compile(r"<Message>([^<]*)</Message>")
_BUCKET_CODES = ("NoSuchBucket", "ContainerNotFound")
_OBJECT_CODES = ("", "NoSuchKey", "BlobNotFound")
_CREDENTIAL_SERVICES = ("/latest/api/token", "/latest/meta-data/iam", "/computeMetadata/", "/metadata/identity/")
"""Where the clouds' own machines get credentials: asked last, when the environment has none."""
_ALLOW_HTTP = {"s3": "AWS_ALLOW_HTTP", "gs": "GOOGLE_ALLOW_HTTP", "az": "AZURE_ALLOW_HTTP"}


class BucketBackend:
    """S3, Google Cloud Storage or Azure Blob Storage. Credentials come from the environment.

    Raises:
        BaseError, ValueError: the environment is incomplete or contradicts itself; nothing was asked of the server.

    """

    errors: ClassVar[tuple[type[Exception], ...]] = (BaseError, OSError, ValueError)

    def __init__(self, scheme: str, bucket: str, prefix: str, request_seconds: float = REQUEST_SECONDS) -> None:
        self.scheme = scheme
        forget_empty_endpoints()
        retry: RetryConfig = {"max_retries": INNER_RETRIES, "retry_timeout": timedelta(seconds=REQUEST_SECONDS)}
        client: ClientConfig = {
            "timeout": timedelta(seconds=request_seconds),
            # Passing any option makes obstore ignore this variable.
            "allow_http": os.environ.get(_ALLOW_HTTP[scheme], "").lower() in ("1", "true"),
        }
        bundle = os.environ.get("AWS_CA_BUNDLE")
        if bundle and scheme == "s3":
            client["root_certificate"] = Path(bundle).read_bytes()
        self._store: S3Store | GCSStore | AzureStore
        if scheme == "s3":
            self._store = S3Store(bucket, prefix=prefix or None, client_options=client, retry_config=retry)
        elif scheme == "gs":
            self._store = GCSStore(bucket, prefix=prefix or None, client_options=client, retry_config=retry)
        else:
            self._store = AzureStore(bucket, prefix=prefix or None, client_options=client, retry_config=retry)

    def put(self, key: str, data: bytes | Path) -> None:
        size = len(data) if isinstance(data, bytes) else data.stat().st_size
        part = max(PART_BYTES, -(-size // MAX_PARTS))
        obstore.put(self._store, key, data, chunk_size=part, max_concurrency=4)

    def create(self, key: str, data: bytes) -> None:
        obstore.put(self._store, key, data, mode="create")

    def head(self, key: str) -> Entry:
        meta = obstore.head(self._store, key)
        return Entry(key, meta["size"], meta["e_tag"] or "")

    def first(self, key: str) -> tuple[Entry, bytes]:
        # One GET and no HEAD: a HEAD's 404 has no body and cannot tell a missing bucket from a missing object.
        answer = obstore.get(self._store, key)
        entry = Entry(key, answer.meta["size"], answer.meta["e_tag"] or "")
        small = entry.size <= CHUNK_BYTES
        return entry, bytes(answer.bytes()) if small else self.read(entry, 0, CHUNK_BYTES)

    def read(self, entry: Entry, start: int, end: int) -> bytes:
        options: GetOptions = {"range": (start, end)}
        if entry.etag:
            options["if_match"] = entry.etag
        return bytes(obstore.get(self._store, entry.key, options=options).bytes())

    def entries(self, prefix: str) -> list[Entry]:
        pages = obstore.list(self._store, prefix or None)
        return [Entry(o["path"], o["size"], o["e_tag"] or "") for page in pages for o in page]

    def delete(self, folder: str) -> None:
        obstore.delete(self._store, [e.key for e in self.entries(folder)] or [folder])

    def fault(self, error: Exception) -> Fault:
        return bucket_fault(error)


def bucket_fault(error: Exception) -> Fault:
    """Tell what obstore's error means, from its type, the HTTP status and the server's own code."""
    text = str(error)
    status = int(m[1]) if (m := _STATUS.search(text)) else 0
    code = m[1] if (m := _CODE.search(text)) else ""
    return Fault(*_meaning(error, text, status, code))


def _meaning(error: Exception, text: str, status: int, code: str) -> tuple[FaultKind, str]:
    words = _words(text, status, code)
    if any(path in text for path in _CREDENTIAL_SERVICES):
        return FaultKind.USER, "no credentials were found"
    if "builder error" in text:
        return FaultKind.USER, "the endpoint is not https; set AWS_ALLOW_HTTP=true if that is meant"
    if code in _BUCKET_CODES:
        return FaultKind.USER, f"there is no such bucket ({words})"
    if isinstance(error, FileNotFoundError) and code in _OBJECT_CODES:
        return FaultKind.MISSING, words
    if isinstance(error, AlreadyExistsError):
        return FaultKind.EXISTS, words
    if isinstance(error, PreconditionError):
        return FaultKind.FINAL, f"the object changed while it was read ({words})"
    if status in (401, 403, 404):
        return FaultKind.USER, f"access is denied ({words})"
    if 300 <= status < 500 and status not in (408, 409, 429):
        return FaultKind.USER, f"the server refuses the request ({words})"
    return FaultKind.TRANSIENT, words


def _words(text: str, status: int, code: str) -> str:
    """Cut out the part of obstore's page-long text that says something."""
    if status:
        message = m[1] if (m := _MESSAGE.search(text)) else ""
        return f"{status} {code}: {message}" if message else f"{status} {code}".strip()
    return text.partition("\n")[0][:300]
