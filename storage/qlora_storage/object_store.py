"""One way to object storage and to local folders, for models, rows, checkpoints and adapters.

Reads and writes are whole objects under keys such as ``step-00000120/rank-0.safetensors``. A write is there as a
whole or not at all. What may go away by itself (a server that restarts, a slow PUT, which obstore does not repeat)
is repeated with a back-off for ``patience_seconds``; what only the user can mend is a :class:`UserError` that names the
field; the rest is a :class:`StorageError`.
"""

from __future__ import annotations

import hashlib
import os
from functools import partial
from io import BytesIO
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeVar

from qlora_storage.backend import BUCKET_SCHEMES, CHUNK_BYTES, Backend, Entry, Fault, FaultKind
from qlora_storage.errors import AlreadyExistsError, NotFoundError, StorageError, UserError
from qlora_storage.folders import FolderBackend
from qlora_storage.local_paths import expand_home, uri_problem, without_password
from qlora_storage.retry import PATIENCE_SECONDS, FaultError, call_patiently

if TYPE_CHECKING:
    import builtins
    from collections.abc import Callable, Iterator

__all__ = [
    "BUCKET_SCHEMES",
    "PVC_MOUNT",
    "AlreadyExistsError",
    "Entry",
    "NotFoundError",
    "Store",
    "claim_of",
    "folders_above",
    "is_place_in",
    "leaves_claim",
    "local_path",
    "open_store",
    "sha256_bytes",
    "sha256_file",
]

PVC_MOUNT = Path("/mnt/pvc")
"""``pvc://claim/path`` is ``<PVC_MOUNT>/claim/path`` in a trainer's pod; whoever makes the pod mounts the claim."""

T = TypeVar("T")


def sha256_bytes(data: bytes) -> str:
    """Lower-case hex digest."""
    return hashlib.file_digest(BytesIO(data), "sha256").hexdigest()


def sha256_file(path: Path) -> str:
    """Lower-case hex digest of a file's content, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def local_path(uri: str, field: str) -> Path | None:
    """Find where on this machine a local path or a mounted claim is; None for all that is behind a network.

    Raises:
        UserError: the URI names no place.

    """
    scheme, place = _split(uri, field)
    if scheme == "pvc":
        return PVC_MOUNT / place
    return expand_home(place).absolute() if scheme in ("", "file") else None


def is_place_in(uri: str, folder: str, field: str) -> bool:
    """Tell whether a place is ``folder`` or below it, by their names; on this machine links are followed.

    Raises:
        UserError: a URI names no place.

    """
    (scheme, place), (other, above) = _absolute(uri, field), _absolute(folder, field)
    return scheme == other and place.is_relative_to(above)


def folders_above(uri: str, field: str) -> builtins.list[tuple[str, str]]:
    """Return the URIs of the folders that a place is in, innermost first, each with the next name towards the place.

    Raises:
        UserError: the URI names no place.

    """
    scheme, place = _absolute(uri, field)
    prefix = f"{scheme}://" if scheme else ""
    way = pairwise([place, *place.parents])
    return [(f"{prefix}{above}", below.name) for below, above in way if above.name]


def _absolute(uri: str, field: str) -> tuple[str, PurePosixPath]:
    if local := local_path(uri, field):
        return "", PurePosixPath(os.path.realpath(local))
    scheme, place = _split(uri, field)
    return scheme, PurePosixPath(place)


def claim_of(path: Path) -> Path | None:
    """Return where the claim is mounted that a path is in; None for a path outside of claims."""
    if path == PVC_MOUNT or not path.is_relative_to(PVC_MOUNT):
        return None
    return PVC_MOUNT / path.relative_to(PVC_MOUNT).parts[0]


def leaves_claim(path: Path, real: Path) -> bool:
    """Tell whether ``real``, to which links of ``path`` lead, is outside of the path's claim.

    Whoever may write to a claim must not make it lead to another one's files.
    """
    claim = claim_of(path)
    return claim is not None and not real.is_relative_to(claim.resolve())


def _split(uri: str, field: str) -> tuple[str, str]:
    """Take a URI apart into its scheme, empty for a plain path, and what follows."""
    if problem := uri_problem(uri):
        raise UserError(field, without_password(uri), problem)
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme == "file":
        return ("file", rest) if separator else ("", uri)
    place = rest.strip("/")
    if not _is_key(place):
        raise UserError(
            field, uri, f"must name a folder, such as {scheme}://name/folder, without empty parts, . and .."
        )
    return scheme, place


def open_store(uri: str, field: str, patience_seconds: float = PATIENCE_SECONDS) -> Store:
    """Open the folder that ``uri`` names; nothing is read or made yet.

    Args:
        uri: ``s3://bucket/prefix``, ``gs://``, ``az://container/prefix``, ``pvc://claim/path``, or a local folder as
            ``/path``, ``./path`` or ``file:///path``.
        field: path of the manifest's field, for messages; empty where no manifest names the place.
        patience_seconds: how long to repeat what may go away by itself.

    Raises:
        UserError: the URI cannot be used, or the credentials in the environment are incomplete.

    """
    scheme, place = _split(uri, field)
    if scheme in ("", "file"):
        folder = expand_home(place).absolute()
        return Store(FolderBackend(folder), str(folder), field, patience_seconds)
    if scheme == "pvc":
        folder = PVC_MOUNT / place
        return Store(FolderBackend(folder, claim_of(folder)), f"pvc://{place}", field, patience_seconds)
    if scheme not in BUCKET_SCHEMES:
        raise UserError(field, uri, "must start with s3://, gs://, az:// or pvc://, or be a local folder")
    from qlora_storage.bucket_faults import bucket_fault  # noqa: PLC0415
    from qlora_storage.buckets import BucketBackend  # noqa: PLC0415 obstore is for buckets alone

    bucket, _, prefix = place.partition("/")
    try:
        backend = BucketBackend(scheme, bucket, prefix)
    except BucketBackend.errors as error:
        raise _user_error(uri, field, f"cannot be opened: {bucket_fault(error).message}") from error
    return Store(backend, f"{scheme}://{place}", field, patience_seconds)


class Store:
    """Objects below one folder. Made by :func:`open_store`; safe to use from several threads.

    Every method may raise :class:`UserError` and :class:`StorageError` as the module says.
    """

    def __init__(self, backend: Backend, root: str, field: str, patience_seconds: float) -> None:
        self._backend = backend
        self._root = root
        self.field = field
        self._patience_seconds = patience_seconds

    def uri(self, key: str = "") -> str:
        """Return where ``key`` is, for a person and for :func:`open_store`; an absolute path for local folders."""
        return f"{self._root.rstrip('/')}/{_checked(key)}" if key else self._root

    def put(self, key: str, data: bytes | Path) -> None:
        """Write bytes, or a local file's content, under ``key``; replaces what is there."""
        if isinstance(data, Path) and not data.is_file():
            raise FileNotFoundError(data)
        try:
            self._call(f"write {self.uri(key)}", key, lambda: self._backend.put(key, data))
        except AlreadyExistsError as error:
            # A conflict of two plain writes, or a file where a folder is wanted.
            raise StorageError(f"cannot write {self.uri(key)}: {error.__cause__}") from error

    def create(self, key: str, data: bytes) -> None:
        """Write ``data`` unless ``key`` is taken; of several writers exactly one succeeds.

        Raises:
            AlreadyExistsError: the key is taken. Where an answer got lost, the taker may be this very call: compare
                the content.

        """
        self._call(f"write {self.uri(key)}", key, lambda: self._backend.create(key, data))

    def get(self, key: str) -> bytes:
        """Read the whole object.

        Raises:
            NotFoundError: there is none.

        """
        return b"".join(self.chunks(key))

    def chunks(self, key: str) -> Iterator[bytes]:
        """Read the object in pieces of at most 16 MiB; a piece that fails is asked for again, not the whole.

        Raises:
            NotFoundError: there is none.
            StorageError: it changed meanwhile.

        """
        doing = f"read {self.uri(key)}"
        entry, piece = self._call(doing, key, lambda: self._backend.first(key))
        at = len(piece)
        yield piece
        while at < entry.size:
            start, end = at, min(at + CHUNK_BYTES, entry.size)
            piece = self._call(doing, key, partial(self._backend.read, entry, start, end))
            if len(piece) != end - start:
                raise StorageError(f"cannot {doing}: it became shorter while it was read")
            at = end
            yield piece

    def read(self, key: str, start: int, end: int) -> tuple[bytes, int]:
        """Read bytes [start, end) of the object, or fewer where it ends before; with its size.

        Raises:
            NotFoundError: there is none.

        """
        doing = f"read {self.uri(key)}"
        entry = self._call(doing, key, lambda: self._backend.head(key))
        last = min(end, entry.size)
        if start >= last:
            return b"", entry.size
        return self._call(doing, key, lambda: self._backend.read(entry, start, last)), entry.size

    def sha256(self, key: str) -> str:
        """Lower-case hex digest of the object, read in pieces.

        Raises:
            NotFoundError: there is none.

        """
        digest = hashlib.sha256()
        for piece in self.chunks(key):
            digest.update(piece)
        return digest.hexdigest()

    def stat(self, key: str) -> Entry | None:
        """Size and etag of the object under exactly this key."""
        try:
            return self._call(f"look at {self.uri(key)}", key, lambda: self._backend.head(key))
        except NotFoundError:
            return None

    def entries(self, prefix: str = "") -> builtins.list[Entry]:
        """Every object below the folder ``prefix``, sorted by key; none where there is no such folder."""
        found = self._call(f"list {self.uri(prefix)}", prefix, lambda: self._backend.entries(prefix))
        return sorted((e for e in found if _is_key(e.key)), key=lambda e: e.key)

    def list(self, prefix: str = "") -> builtins.list[tuple[str, int]]:
        """Key and size in bytes of every object below the folder ``prefix``."""
        return [(e.key, e.size) for e in self.entries(prefix)]

    def download(self, prefix: str, folder: Path) -> None:
        """Copy every object below ``prefix`` into ``folder``, keys relative to ``prefix`` becoming paths."""
        for entry in self.entries(prefix):
            self.download_file(entry.key, folder / PurePosixPath(entry.key).relative_to(prefix or "."))

    def download_file(self, key: str, target: Path) -> None:
        """Copy one object to a local file, making its folder.

        Raises:
            NotFoundError: there is none.
            StorageError: the local disk is full, or as the module says.

        """
        local = FolderBackend(target.parent)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                for piece in self.chunks(key):
                    file.write(piece)
        except OSError as error:
            raise StorageError(f"cannot write {target}: {local.fault(error).message}") from error

    def delete(self, prefix: str) -> None:
        """Delete every object below the folder ``prefix``, and the object of that name; none is no error."""
        try:
            self._call(f"delete {self.uri(prefix)}", prefix, lambda: self._backend.delete(prefix))
        except NotFoundError:
            return

    def _call(self, doing: str, key: str, call: Callable[[], T]) -> T:
        """Run ``call``, again while that may help, and turn what is left into this package's errors."""
        if key:
            _checked(key)
        try:
            return call_patiently(call, self._fault_of, doing, self._patience_seconds)
        except FaultError as error:
            raise self._translated(error.fault, doing, key) from error.__cause__

    def _fault_of(self, error: Exception) -> Fault | None:
        return self._backend.fault(error) if isinstance(error, self._backend.errors) else None

    def _translated(self, fault: Fault, doing: str, key: str) -> Exception:
        match fault.kind:
            case FaultKind.MISSING:
                return NotFoundError(self.uri(key))
            case FaultKind.EXISTS:
                return AlreadyExistsError(self.uri(key))
            case FaultKind.USER:
                return _user_error(self._root, self.field, fault.message)
            case FaultKind.TRANSIENT:
                return StorageError(f"cannot {doing}: tried for {self._patience_seconds:.0f} s: {fault.message}")
            case FaultKind.FINAL:
                return StorageError(f"cannot {doing}: {fault.message}")


def _user_error(uri: str, field: str, message: str) -> UserError:
    allowed = f"cannot be used: {message}. {_remedy(uri, field)}"
    return UserError(field, uri, allowed) if field else UserError(uri, None, allowed)


def _remedy(uri: str, field: str) -> str:
    """Say what the user can do about a place that does not let us in."""
    group = field.rpartition(".")[0].replace("dataset.eval", "dataset.train")
    secret = (
        f"the Secret named by {group}.credentials (in a cluster) or in your shell (qlora run)"
        if field
        else "the environment"
    )
    match uri.partition("://")[0]:
        case "s3":
            return (
                f"Check the bucket's name, and set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION "
                f"(AWS_ENDPOINT_URL for a server other than AWS) in {secret}"
            )
        case "gs":
            return f"Check the bucket's name, and set GOOGLE_SERVICE_ACCOUNT_KEY in {secret}"
        case "az":
            return (
                f"Check the container's name, and set AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or "
                f"AZURE_STORAGE_SAS_TOKEN in {secret}"
            )
        case _:
            return "Name a folder that the trainer may write to"


def _is_key(key: str) -> bool:
    return not any(part in ("", ".", "..") for part in key.split("/"))


def _checked(key: str) -> str:
    """Refuse keys that would leave the store's folder, such as those in a manifest someone else wrote."""
    if not _is_key(key):
        raise ValueError(f'key "{key}" has empty parts, . or ..')
    return key
