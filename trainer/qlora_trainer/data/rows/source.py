"""The files behind a source, found without leaving it.

A link is followed if it ends in the source, or, in a snapshot of the Hugging Face cache, among its blobs. What is no
regular file is refused: pipes, devices and sockets, and all of /proc and /sys.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_storage.object_store import leaves_claim
from qlora_trainer.data.rows.errors import RowsError
from qlora_trainer.errors import UserError
from qlora_trainer.row_files import ALLOWED, MOST_FILES, STATE, Kind, RowFilesError, Selection, kind_of, select

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import BufferedReader

EVAL_FIELD = "spec.dataset.eval.source"
KERNEL_FOLDERS = ("/proc", "/sys")
"""Their files are regular by name and made up when they are read."""
MOST_STATE_BYTES = 16 << 20
DEEPEST_FOLDER = 64


@dataclass(frozen=True)
class SourceFile:
    """A regular file as it was when it was found; one that has changed since is not read."""

    path: Path
    """Without links."""
    name: str
    """Inside the source, for a person."""
    size: int
    mtime_ns: int
    device: int
    inode: int

    def open(self) -> BufferedReader:
        """Open it for reading.

        Raises:
            RowsError: it is gone, or another one.

        """
        try:
            number = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise RowsError(f"{self.name}: {error.strerror}") from error
        file = os.fdopen(number, "rb")
        try:
            self.check(file)
        except RowsError:
            file.close()
            raise
        return file

    def check(self, file: BufferedReader) -> None:
        """Raise RowsError if the open file is not as it was found, or is reached by a link that was put on its path."""
        now = os.fstat(file.fileno())
        if Path(f"/proc/self/fd/{file.fileno()}").readlink() != self.path:
            raise RowsError(f"{self.name}: changed while it was read")
        if (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns) != (
            self.device,
            self.inode,
            self.size,
            self.mtime_ns,
        ):
            raise RowsError(f"{self.name}: changed while it was read")


@dataclass(frozen=True)
class SourceFiles:
    """The files of a source. ``files`` is all that is read, in the order of the rows."""

    field: str
    """Field of the manifest that names the source; errors in its files are reported for it."""
    path: Path
    """As it was named."""
    kind: Kind
    files: tuple[SourceFile, ...]
    selection: Selection | None = None
    """Choice among the files of a folder, including those that are not read; None for a single file."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def find_source(path: Path, field: str) -> SourceFiles:
    """Find the files behind ``path``.

    Args:
        path: a local file or folder.
        field: what an error is reported at, such as ``spec.dataset.train.source``; for evaluation rows another split is
            chosen where a folder has several.

    Raises:
        UserError: nothing is there, nothing that can be read, or something that must not be.

    """
    try:
        real = path.resolve(strict=True)
        _check_claim(path, real)
        if real.is_dir():
            return _find_in_folder(path, real, field)
        kind = kind_of(path.name)
        if kind is None:
            raise UserError(field, path, f"is of no known type; {ALLOWED}")
        return SourceFiles(
            field, path, kind, (_regular(real, os.fsencode(path.name).decode(errors="backslashreplace")),)
        )
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(field, path, f"is not there; {ALLOWED}") from None
    except (RowsError, RowFilesError) as error:
        raise UserError(field, path, str(error)) from error
    except (OSError, RuntimeError) as error:  # RuntimeError: a circle of links
        raise UserError(field, path, f"cannot be read: {getattr(error, 'strerror', error)}") from error


def contents(source: SourceFiles) -> list[str]:
    """Name what is read by its content: the kind, and the SHA-256 of each file in the order of the rows.

    Raises:
        UserError: a file cannot be read.

    """
    try:
        return [source.kind, *(_sha256(file) for file in source.files)]
    except RowsError as error:
        raise UserError(source.field, source.path, f"cannot be read: {error}") from error
    except OSError as error:
        raise UserError(source.field, source.path, f"cannot be read: {error.strerror}") from error


def _sha256(found: SourceFile) -> str:
    with found.open() as file:
        digest = hashlib.file_digest(file, "sha256")
        found.check(file)
    return digest.hexdigest()


def _check_claim(path: Path, real: Path) -> None:
    if leaves_claim(path, real):
        raise RowsError("leads out of its claim by a link")


def _find_in_folder(path: Path, folder: Path, field: str) -> SourceFiles:
    found = dict(_walk(folder))
    selection = select(found, evaluation=field == EVAL_FIELD)
    names = selection.rows
    if selection.kind is Kind.SAVED:
        names = _saved_files(found, selection)
    real: dict[Path, str] = {}  # a file with two names is read once
    for name in names:
        real.setdefault(found[name], name)
    files = tuple(_regular(file, name) for file, name in real.items())
    return SourceFiles(field, path, selection.kind, files, selection)


def _walk(root: Path) -> Iterator[tuple[str, Path]]:
    """Name inside ``root`` and real path of every file below it; each folder once."""
    allowed = [root, *_blobs(root)]
    seen = {root}
    folders = [(root, "")]
    count = 0
    while folders:
        folder, prefix = folders.pop()
        if prefix.count("/") > DEEPEST_FOLDER:
            raise RowsError(f"has folders inside each other more than {DEEPEST_FOLDER} deep")
        for entry in sorted(os.scandir(folder), key=lambda e: e.name):
            name = prefix + os.fsencode(entry.name).decode(errors="backslashreplace")
            real = Path(entry.path)
            if entry.is_symlink():
                if prefix == "" and entry.name.startswith("."):
                    continue  # a mounted ConfigMap's own links; what they lead to is linked by name
                real = real.resolve(strict=True)
                if not any(real.is_relative_to(place) for place in allowed):
                    raise RowsError(f"has a link that leads out of it: {name}. Put the file itself there")
            if not real.is_dir():
                count += 1
                if count > MOST_FILES:
                    raise RowsError(f"has more than {MOST_FILES} files; put more rows into each")
                yield name, real
            elif real not in seen:
                seen.add(real)
                folders.append((real, f"{name}/"))


def _blobs(folder: Path) -> list[Path]:
    """Return the folder with the files of a snapshot of the Hugging Face cache, which holds links to them."""
    for parent in folder.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith(("datasets--", "models--")):
            return [parent.parent / "blobs"]
    return []


def _regular(path: Path, name: str) -> SourceFile:
    """Describe a file, refusing what is none."""
    found = path.stat(follow_symlinks=False)
    if not stat.S_ISREG(found.st_mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
        raise RowsError(f"{name} is {kinds.get(stat.S_IFMT(found.st_mode), 'no file')}; only regular files are read")
    if any(found.st_dev == Path(kernel).stat().st_dev for kernel in KERNEL_FOLDERS if Path(kernel).exists()):
        raise RowsError(f"{name} is made up by the kernel; only files of a disk are read")
    return SourceFile(path, name, found.st_size, found.st_mtime_ns, found.st_dev, found.st_ino)


def _saved_files(found: dict[str, Path], selection: Selection) -> tuple[str, ...]:
    """Names of the dataset's own files: maps and filters leave their caches in the same folder."""
    prefix = f"{selection.folder}/" if selection.folder else ""
    if f"{prefix}{STATE}" not in found:
        raise RowsError(f"cannot be read as {Kind.SAVED}: {prefix}{STATE} is missing")
    try:
        with _regular(found[f"{prefix}{STATE}"], f"{prefix}{STATE}").open() as file:
            state = json.loads(file.read(MOST_STATE_BYTES))
        listed = [entry["filename"] for entry in state["_data_files"]]
        picked = state.get("_indices_data_files")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RowsError(f"cannot be read as {Kind.SAVED}: {STATE}: {type(error).__name__}") from error
    if picked:
        raise RowsError("is a selection of a dataset's rows: save it with flatten_indices()")
    for number, name in enumerate(listed):
        if not isinstance(name, str) or "/" in name or name in ("", ".", "..") or f"{prefix}{name}" not in found:
            raise RowsError(f"has a {STATE} whose _data_files[{number}] is not the name of a file beside it")
    return tuple(f"{prefix}{name}" for name in listed)
