"""The backend of S3, Google Cloud Storage and Azure Blob Storage, through obstore."""

from __future__ import annotations

import os
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, assert_never

import obstore
from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, S3Store

from qlora_storage.backend import CHUNK_BYTES, MIB, Entry, Fault
from qlora_storage.bucket_faults import PanickedError, bucket_fault
from qlora_storage.metadata_addresses import REFUSED, leads_to_metadata
from qlora_storage.retry_after import BUSY, requested_wait
from qlora_storage.store_settings import (
    AWS_BUCKET_IN_ENDPOINT,
    SettingError,
    clean_environment,
    is_on,
    names_bucket,
    read_settings,
    store_urls,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obstore import GetOptions
    from obstore.store import ClientConfig, RetryConfig

    from qlora_storage.backend import BucketScheme
    from qlora_storage.store_settings import StoreSettings

MAX_PARTS = 9_000
"""S3 takes 10,000 parts an upload."""
REQUEST_SECONDS = 120
"""Longest time without progress of a request: one that reads, until the next bytes come; one that writes, until all is
sent and answered, since its client cannot tell how much of it went out."""
READ_SECONDS = 3600
"""For a whole read, in pieces of 16 MiB at most: what comes, however slowly, is progress."""
PART_RETRIES = 6
"""obstore's own, about 2 s in all: a part of a large upload is repeated, not the whole. All other requests are repeated
by :mod:`qlora_storage.retry` alone, which knows when a server wants to be left alone."""
WITHOUT_CREDENTIALS = (
    "no credentials were found, and the store does not allow anonymous access ({message}). The cloud identity of the "
    "pod or machine is used only if allowed (chart value trainer.workloadIdentity; on your machine "
    "QLORA_WORKLOAD_IDENTITY=true)"
)


@dataclass(frozen=True)
class UploadPace:
    """Pace of an upload in parts: they share the line, and each must be through in time."""

    part_bytes: int
    at_once: int
    times: int = 1
    """REQUEST_SECONDS times this is the time of a part."""


PACES = (UploadPace(8 * MIB, 4), UploadPace(5 * MIB, 1), UploadPace(5 * MIB, 1, times=10))
"""The first needs 280 kB/s, the second 44, the third 5: 5 MiB is the smallest part that S3 takes. More than that, since
what was under way of the one before is still on the line."""


class BucketBackend:
    """S3, Google Cloud Storage or Azure Blob Storage. Credentials come from the environment.

    Raises:
        BaseError, OSError, ValueError: the environment is incomplete or contradicts itself; nothing was asked of the
            server.

    """

    errors: ClassVar[tuple[type[Exception], ...]] = (BaseError, OSError, ValueError, PanickedError)

    def __init__(
        self, scheme: BucketScheme, bucket: str, prefix: str, request_seconds: float = REQUEST_SECONDS
    ) -> None:
        clean_environment(os.environ)
        settings = read_settings(scheme, os.environ, Path.home())
        for name, url in store_urls(scheme, os.environ, settings).items():
            if leads_to_metadata(url, os.environ):
                raise SettingError(f"{name}: {REFUSED}")
            if scheme == "s3" and names_bucket(url, bucket) and not is_on(os.environ, AWS_BUCKET_IN_ENDPOINT):
                raise SettingError(
                    f"{name}: must be the server alone, such as https://host:9000: the bucket is named by s3://{bucket}"
                )
        self._settings = settings
        self._pace = 0
        self._request_seconds = request_seconds
        self._open = cache(partial(_open, scheme, bucket, prefix or None, settings))
        with _without_panics():
            self._store = self._open(READ_SECONDS, 0, request_seconds)

    def put(self, key: str, data: bytes | Path) -> None:
        size = len(data) if isinstance(data, bytes) else data.stat().st_size
        with self._paced() as pace:
            part = max(pace.part_bytes, -(-size // MAX_PARTS))
            store = self._open(pace.times * self._request_seconds, PART_RETRIES if size > part else 0)
            obstore.put(store, key, data, chunk_size=part, max_concurrency=pace.at_once)

    def create(self, key: str, data: bytes) -> None:
        with self._paced() as pace:
            obstore.put(self._open(pace.times * self._request_seconds, 0), key, data, mode="create")

    @contextmanager
    def _paced(self) -> Iterator[UploadPace]:
        """Give an upload its pace; one that times out is followed by slower ones."""
        pace = self._pace
        try:
            with _without_panics():
                yield PACES[pace]
        except BaseError as error:
            if bucket_fault(error).timed_out:
                self._pace = min(pace + 1, len(PACES) - 1)
            raise

    def head(self, key: str) -> Entry:
        with _without_panics():
            try:
                meta = obstore.head(self._store, key)
            except FileNotFoundError:
                raise
            except BaseError:  # the answer to a HEAD has no body that would say why: the one to a GET has
                meta = obstore.get(self._store, key).meta
        return Entry(key, meta["size"], meta["e_tag"] or "")

    def first(self, key: str) -> tuple[Entry, bytes]:
        # One GET and no HEAD: a HEAD's 404 has no body and cannot tell a missing bucket from a missing object.
        with _without_panics():
            answer = obstore.get(self._store, key)
            entry = Entry(key, answer.meta["size"], answer.meta["e_tag"] or "")
            if entry.size <= CHUNK_BYTES:
                return entry, bytes(answer.bytes())
        return entry, self.read(entry, 0, CHUNK_BYTES)

    def read(self, entry: Entry, start: int, end: int) -> bytes:
        options: GetOptions = {"range": (start, end)}
        if entry.etag:
            options["if_match"] = entry.etag
        with _without_panics():
            return bytes(obstore.get(self._store, entry.key, options=options).bytes())

    def entries(self, prefix: str) -> list[Entry]:
        with _without_panics():
            pages = obstore.list(self._store, prefix or None)
            return [Entry(o["path"], o["size"], o["e_tag"] or "") for page in pages for o in page]

    def delete(self, folder: str) -> None:
        keys = [e.key for e in self.entries(folder)] or [folder]
        with _without_panics():
            obstore.delete(self._store, keys)

    def fault(self, error: Exception) -> Fault:
        fault = bucket_fault(error)
        if self._settings.anonymous:
            return replace(fault, message=WITHOUT_CREDENTIALS.format(message=fault.message)) if fault.denied else fault
        return replace(fault, retry_after=self._requested_wait()) if fault.status in BUSY else fault

    def _requested_wait(self) -> float | None:
        with suppress(BaseError, ValueError, PanickedError), _without_panics():
            url = obstore.sign(self._store, "HEAD", ".retry-after", timedelta(minutes=1))
            return requested_wait(url, self._settings.certificate)
        return None


def _open(
    scheme: BucketScheme,
    bucket: str,
    prefix: str | None,
    settings: StoreSettings,
    seconds: float,
    retries: int,
    still_seconds: float | None = None,
) -> S3Store | GCSStore | AzureStore:
    """Open a store whose requests may take ``seconds`` in all, and ``still_seconds`` without an answer's next bytes."""
    retry: RetryConfig = {"max_retries": retries, "retry_timeout": timedelta(seconds=seconds)}
    client: ClientConfig = {
        "timeout": timedelta(seconds=seconds),
        "allow_http": settings.allow_http,  # passing any option makes obstore ignore its variable
    }
    if still_seconds is not None:
        client["read_timeout"] = timedelta(seconds=still_seconds)
    if settings.certificate:
        client["root_certificate"] = settings.certificate
    # Each store takes the keys of its own scheme, which the settings were read for.
    config: dict[str, object] = dict(settings.config)
    match scheme:
        case "s3":
            return S3Store(bucket, prefix=prefix, client_options=client, retry_config=retry, config=config)  # type: ignore[arg-type]
        case "gs":
            return GCSStore(bucket, prefix=prefix, client_options=client, retry_config=retry, config=config)  # type: ignore[arg-type]
        case "az":
            return AzureStore(bucket, prefix=prefix, client_options=client, retry_config=retry, config=config)  # type: ignore[arg-type]
        case _:
            assert_never(scheme)


@contextmanager
def _without_panics() -> Iterator[None]:
    """Turn a panic of obstore, which no ``except Exception`` sees, into an error."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise PanickedError(str(error)) from None
