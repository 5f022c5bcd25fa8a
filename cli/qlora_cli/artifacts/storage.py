"""Folders on this machine and in object storage, to read published adapters from and to put rows into.

Object storage is reached through obstore, with credentials from the environment, named as in a job's Secret.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qlora_cli.kube.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Iterator

BUCKETS = ("s3", "gs", "az")
CHUNK = 8 << 20
_ALLOW_HTTP = {"s3": "AWS_ALLOW_HTTP", "gs": "GOOGLE_ALLOW_HTTP", "az": "AZURE_ALLOW_HTTP"}
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT")
_NEEDS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION (AWS_ENDPOINT_URL for a server other than AWS)",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
}
_CODE = re.compile(r"<Code>([^<]*)</Code>")
_MESSAGE = re.compile(r"<Message>([^<]*)</Message>")
_STATUS = re.compile(r"status code: (\d{3})")


class StorageError(ClusterError):
    """A place that cannot be read or written; says which, and what would help."""


class MissingError(StorageError):
    """No such object."""


class Folder(Protocol):
    """Folder that objects are read from."""

    def uri(self, key: str) -> str: ...

    def size(self, key: str) -> int:
        """Bytes.

        Raises:
            MissingError: there is none.

        """

    def chunks(self, key: str) -> Iterator[bytes]:
        """The content in pieces.

        Raises:
            MissingError: there is none.

        """


def open_folder(uri: str) -> Folder:
    """A folder by URI or path.

    Raises:
        StorageError: it cannot be reached from here.

    """
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme == "file":
        return LocalFolder(Path(rest if separator else uri))
    if scheme == "pvc":
        raise StorageError(
            f"{uri}: only pods of its namespace reach a claim; copy it out of one that mounts it (kubectl cp)"
        )
    if scheme not in BUCKETS:
        raise StorageError(f"{uri}: must be a folder, or start with s3://, gs:// or az://")
    return BucketFolder(scheme, *rest.partition("/")[::2])


@dataclass(frozen=True)
class LocalFolder:
    """On this machine."""

    root: Path

    def uri(self, key: str) -> str:
        return str(self.root / key)

    def size(self, key: str) -> int:
        try:
            return (self.root / key).stat().st_size
        except OSError as error:
            raise _local(error, self.uri(key)) from None

    def chunks(self, key: str) -> Iterator[bytes]:
        try:
            with (self.root / key).open("rb") as file:
                while piece := file.read(CHUNK):
                    yield piece
        except OSError as error:
            raise _local(error, self.uri(key)) from None


def _local(error: OSError, path: str) -> StorageError:
    kind = MissingError if isinstance(error, FileNotFoundError | NotADirectoryError) else StorageError
    return kind(f"{path}: {error.strerror}")


class BucketFolder:
    """In object storage."""

    def __init__(self, scheme: str, bucket: str, prefix: str) -> None:
        """Raises StorageError: obstore is not there, or the environment is incomplete."""
        try:
            import obstore  # noqa: PLC0415 only who reaches into object storage needs it
            from obstore import store as stores  # noqa: PLC0415
        except ImportError:
            raise StorageError(
                f"{scheme}://{bucket}: object storage is read through obstore, which is not installed: "
                "pip install 'qlora-operator[storage]'"
            ) from None
        self._obstore: Any = obstore
        self._root = f"{scheme}://{bucket}" + (f"/{prefix.strip('/')}" if prefix.strip("/") else "")
        self._scheme = scheme
        for name in ENDPOINTS:
            if os.environ.get(name) == "":  # of a variable that was not set; obstore panics on it
                del os.environ[name]
        kinds = {"s3": stores.S3Store, "gs": stores.GCSStore, "az": stores.AzureStore}
        # Passing any option makes obstore ignore these variables.
        options: dict[str, Any] = {"allow_http": os.environ.get(_ALLOW_HTTP[scheme], "").lower() in ("1", "true")}
        if (bundle := os.environ.get("AWS_CA_BUNDLE")) and scheme == "s3":
            options["root_certificate"] = Path(bundle).read_bytes()
        kind: Any = kinds[scheme]
        try:
            self._store: Any = kind(bucket, prefix=prefix.strip("/") or None, client_options=options)
        except (obstore.exceptions.BaseError, ValueError, OSError) as error:
            raise self._fault(error, self._root) from None

    def uri(self, key: str) -> str:
        return f"{self._root}/{key}" if key else self._root

    def size(self, key: str) -> int:
        try:
            found: int = self._obstore.head(self._store, key)["size"]
        except (self._obstore.exceptions.BaseError, OSError, ValueError) as error:
            raise self._fault(error, self.uri(key)) from None
        return found

    def chunks(self, key: str) -> Iterator[bytes]:
        try:
            for piece in self._obstore.get(self._store, key).stream(min_chunk_size=CHUNK):
                yield bytes(piece)
        except (self._obstore.exceptions.BaseError, OSError, ValueError) as error:
            raise self._fault(error, self.uri(key)) from None

    def put(self, key: str, path: Path) -> None:
        """Write a file's content."""
        try:
            self._obstore.put(self._store, key, path)
        except (self._obstore.exceptions.BaseError, OSError, ValueError) as error:
            raise self._fault(error, self.uri(key)) from None

    def _fault(self, error: Exception, place: str) -> StorageError:
        """The part of obstore's page that says something, and which variables count."""
        text = str(error)
        code, message = _CODE.search(text), _MESSAGE.search(text)
        status = _STATUS.search(text)
        missing = isinstance(error, FileNotFoundError) and (code is None or code[1] in ("NoSuchKey", "BlobNotFound"))
        if missing:
            return MissingError(f"{place}: is not there")
        words = (
            f"{code[1]}: {message[1]}"
            if code and message
            else f"HTTP {status[1]}"
            if status
            else text.partition("\n")[0][:200]
        )
        if "/latest/" in text or "metadata" in text.lower():
            words = "no credentials were found"
        remedy = f"the environment counts: {_NEEDS[self._scheme]}; with --secret, the Secret that the job names"
        return StorageError(f"{place}: cannot be used ({words}); {remedy}")


def upload(source: Path, target: str) -> list[str]:
    """Copy a file, or all files of a folder, into object storage; the URIs.

    Raises:
        StorageError: nothing there, or the target cannot be written.

    """
    scheme, separator, rest = target.partition("://")
    if not separator or scheme not in BUCKETS:
        raise StorageError(f'"{target}": must start with s3://, gs:// or az://')
    if not source.exists():
        raise StorageError(f"{source}: there is no such file or folder")
    bucket, _, key = rest.partition("/")
    if source.is_file() and (not key or key.endswith("/")):
        key = f"{key}{source.name}"
    folder = BucketFolder(scheme, bucket, "")
    if source.is_file():
        pairs = [(source, key)]
    else:
        files = sorted(path for path in source.rglob("*") if path.is_file())
        pairs = [(path, f"{key.rstrip('/')}/{path.relative_to(source).as_posix()}".lstrip("/")) for path in files]
    if not pairs:
        raise StorageError(f"{source}: holds no files")
    for path, name in pairs:
        folder.put(name, path)
    return [folder.uri(name) for _, name in pairs]
