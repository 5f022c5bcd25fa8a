"""Backends of :class:`qlora_trainer.storage.object_store.Store`: a folder, or a bucket through obstore.

A backend does one thing once and raises what the system raises. ``fault`` then says in words what that means;
retrying and telling the user is the store's business.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum, auto
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import AzureStore, GCSStore, S3Store

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import ClientConfig, RetryConfig

MIB = 1 << 20
CHUNK_BYTES = 16 * MIB
"""Bytes per read request: at 120 s a request, 140 kB/s still gets through."""
PART_BYTES = 8 * MIB
MAX_PARTS = 9_000
"""S3 takes 10,000 parts an upload."""
REQUEST_SECONDS = 120
INNER_RETRIES = 6
"""obstore's own, per request (about 2 s in all): a part of a large upload is repeated, not the whole."""


class FaultKind(Enum):
    MISSING = auto()
    EXISTS = auto()
    USER = auto()
    """Only the user can mend it."""
    TRANSIENT = auto()
    """May go away by itself."""
    FINAL = auto()
    """Will not go away by itself, and is not the manifest's fault."""


@dataclass(frozen=True)
class Fault:
    """Meaning of an error of the system."""

    kind: FaultKind
    words: str


@dataclass(frozen=True)
class Entry:
    """An object below a store's root. ``etag`` changes with the content; for local files it is the time of change."""

    key: str
    size: int
    etag: str


class Backend(Protocol):
    """All that a store needs; keys are already checked."""

    errors: ClassVar[tuple[type[Exception], ...]]

    def put(self, key: str, data: bytes | Path) -> None: ...
    def create(self, key: str, data: bytes) -> None: ...
    def head(self, key: str) -> Entry: ...
    def read(self, entry: Entry, start: int, end: int) -> bytes: ...
    def first(self, key: str) -> tuple[Entry, bytes]: ...
    def entries(self, prefix: str) -> list[Entry]: ...
    def delete(self, folder: str) -> None: ...
    def fault(self, error: Exception) -> Fault: ...


# ------------------------------------------------------------------------------------------------------- local folders

_temporary = count()
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP)
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)
_LOCAL_USER = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
_LOCAL_TRANSIENT = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN)
"""What network file systems raise while their server is away."""


class FolderBackend:
    """A local folder, written durably.

    Not obstore's LocalStore: that renames without fsync, and after a power loss a renamed file may be empty while the
    marker that vouches for it is there.
    """

    errors: ClassVar[tuple[type[Exception], ...]] = (OSError,)

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, key: str, data: bytes | Path) -> None:
        target = self.root / key
        temporary = self._write_beside(target, data)
        try:
            temporary.replace(target)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(target.parent)

    def create(self, key: str, data: bytes) -> None:
        target = self.root / key
        temporary = self._write_beside(target, data)
        try:
            os.link(temporary, target)  # unlike rename, fails where the name is taken
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            create_without_links(target, data)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(target.parent)

    def head(self, key: str) -> Entry:
        path = self.root / key
        if path.is_dir():
            raise FileNotFoundError(errno.ENOENT, "is a folder", str(path))
        stat = path.stat()
        return Entry(key, stat.st_size, str(stat.st_mtime_ns))

    def first(self, key: str) -> tuple[Entry, bytes]:
        entry = self.head(key)
        return entry, self.read(entry, 0, min(entry.size, CHUNK_BYTES))

    def read(self, entry: Entry, start: int, end: int) -> bytes:
        with (self.root / entry.key).open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    def entries(self, prefix: str) -> list[Entry]:
        paths = (Path(folder) / name for folder, _, names in os.walk(self.root / prefix) for name in names)
        found = []
        for path in paths:
            if not _is_temporary(path.name):
                with suppress(FileNotFoundError):  # deleted since it was seen
                    found.append(self.head(path.relative_to(self.root).as_posix()))
        return found

    def delete(self, folder: str) -> None:
        path = self.root / folder
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def fault(self, error: Exception) -> Fault:
        number = error.errno if isinstance(error, OSError) else None
        words = str(error)
        if number == errno.ENOENT:
            return Fault(FaultKind.MISSING, words)
        if number == errno.EEXIST:
            return Fault(FaultKind.EXISTS, words)
        if number in (errno.ENOSPC, errno.EDQUOT):
            return Fault(
                FaultKind.FINAL, f"the disk is full ({_free(self.root)}): {words}; free space or use a larger volume"
            )
        if number in _LOCAL_USER:
            return Fault(FaultKind.USER, f"cannot be used: {words}")
        return Fault(FaultKind.TRANSIENT if number in _LOCAL_TRANSIENT else FaultKind.FINAL, words)

    def _write_beside(self, target: Path, data: bytes | Path) -> Path:
        """Write and fsync a file in the target's folder; leave none behind where that fails."""
        _make_folder(target.parent)
        temporary = target.parent / f".{target.name}.{os.getpid()}-{threading.get_ident()}-{next(_temporary)}.tmp"
        try:
            with temporary.open("xb") as file:
                if isinstance(data, bytes):
                    file.write(data)
                else:
                    with data.open("rb") as source:
                        shutil.copyfileobj(source, file, MIB)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        return temporary


def create_without_links(target: Path, data: bytes) -> None:
    """Create-only write for file systems without hard links (SMB, some FUSE): exactly one writer gets the name.

    A crash inside leaves a short file, where the way over a hard link leaves none; readers check the content.
    """
    with target.open("xb") as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            target.unlink(missing_ok=True)
            raise


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power loss, where the file system knows of such a thing."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(handle)


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        try:
            folder.mkdir(exist_ok=True)  # another writer may be faster
        except FileExistsError as error:
            raise NotADirectoryError(errno.ENOTDIR, "is a file, not a folder", str(folder)) from error
        sync_folder(folder.parent)


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


def _free(path: Path) -> str:
    there = next(p for p in (path, *path.parents) if p.exists())
    return f"{shutil.disk_usage(there).free / MIB:.1f} MiB free at {there}"


# ------------------------------------------------------------------------------------------------------------- buckets

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([^<]*)</Code>")
_MESSAGE = re.compile(r"<Message>([^<]*)</Message>")
_BUCKET_CODES = ("NoSuchBucket", "ContainerNotFound")
_OBJECT_CODES = ("", "NoSuchKey", "BlobNotFound")
_CREDENTIAL_SERVICES = ("/latest/api/token", "/latest/meta-data/iam", "/computeMetadata/", "/metadata/identity/")
"""Where the clouds' own machines get credentials: asked last, when the environment has none."""
_ALLOW_HTTP = {"s3": "AWS_ALLOW_HTTP", "gs": "GOOGLE_ALLOW_HTTP", "az": "AZURE_ALLOW_HTTP"}
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT")


def forget_empty_endpoints() -> None:
    """Take an empty endpoint for none: a Secret made of an unset variable has one, and obstore panics on it."""
    for name in ENDPOINTS:
        if os.environ.get(name) == "":
            del os.environ[name]


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
