"""The backend of local folders and mounted claims."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import ClassVar

from qlora_storage.backend import CHUNK_BYTES, MIB, Entry, Fault, FaultKind
from qlora_storage.local_paths import open_regular

_temporary = count()
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP)
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)
_LOCAL_USER = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
    errno.EINVAL,  # of open_regular
)
_LOCAL_TRANSIENT = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN)
"""Errors that network file systems raise while their server is unreachable."""


class FolderBackend:
    """A local folder, written durably.

    Not obstore's LocalStore: that renames without fsync, and after a power loss a renamed file may be empty while the
    marker that vouches for it is there.
    """

    errors: ClassVar[tuple[type[Exception], ...]] = (OSError,)

    def __init__(self, root: Path, claim: Path | None = None) -> None:
        """Take the folder, and where the claim is mounted that it is in: no link is followed out of that."""
        self.root = root
        self._claim = claim

    def put(self, key: str, data: bytes | Path) -> None:
        target = self._path(key)
        temporary = self._write_beside(target, data)
        try:
            temporary.replace(target)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(target.parent)

    def create(self, key: str, data: bytes) -> None:
        target = self._path(key)
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
        return self._entry(key, self._path(key, follow=True))

    def first(self, key: str) -> tuple[Entry, bytes]:
        entry = self.head(key)
        return entry, self.read(entry, 0, min(entry.size, CHUNK_BYTES))

    def read(self, entry: Entry, start: int, end: int) -> bytes:
        with open_regular(self._path(entry.key, follow=True)) as file:
            file.seek(start)
            return file.read(end - start)

    def entries(self, prefix: str) -> list[Entry]:
        walked = os.walk(self._path(prefix, follow=True))
        paths = (Path(folder) / name for folder, _, names in walked for name in names)
        found = []
        for path in paths:
            if not _is_temporary(path.name):
                with suppress(FileNotFoundError):  # deleted since it was seen
                    found.append(self._entry(path.relative_to(self.root).as_posix(), path))
        return found

    def delete(self, folder: str) -> None:
        path = self._path(folder)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def fault(self, error: Exception) -> Fault:
        number = error.errno if isinstance(error, OSError) else None
        message = str(error)
        if number == errno.ENOENT:
            return Fault(FaultKind.MISSING, message)
        if number == errno.EEXIST:
            return Fault(FaultKind.EXISTS, message)
        if number in (errno.ENOSPC, errno.EDQUOT):
            return Fault(
                FaultKind.FINAL, f"the disk is full ({_free(self.root)}): {message}; free space or use a larger volume"
            )
        if number in _LOCAL_USER:
            return Fault(FaultKind.USER, f"cannot be used: {message}")
        return Fault(FaultKind.TRANSIENT if number in _LOCAL_TRANSIENT else FaultKind.FINAL, message)

    def _path(self, key: str, *, follow: bool = False) -> Path:
        """Return where a key is.

        Raises:
            OSError: its folder is outside of the claim, by a link; with ``follow`` also where it is a link itself.

        """
        path = self.root / key
        if self._claim is not None:
            real = Path(os.path.realpath(path if follow or not key else path.parent))
            if not real.is_relative_to(os.path.realpath(self._claim)):
                raise OSError(errno.ELOOP, "leads out of its claim by a link", str(path))
        return path

    @staticmethod
    def _entry(key: str, path: Path) -> Entry:
        if path.is_dir():
            raise FileNotFoundError(errno.ENOENT, "is a folder", str(path))
        stat = path.stat()
        return Entry(key, stat.st_size, str(stat.st_mtime_ns))

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
