"""Task definitions of a user's own, and the rows that they name, brought to a local folder."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from qlora_storage.object_store import leaves_claim, local_path, open_store, sha256_bytes, sha256_file
from qlora_trainer.errors import UserError
from qlora_trainer.row_files import COMPRESSIONS, KINDS
from qlora_trainer.storage.fetch import HUB, cached, download, hash_of

if TYPE_CHECKING:
    from collections.abc import Iterable

FIELD = "spec.evaluate.folder"
MOST_FILES = 1000
SUFFIXES = (".yaml", ".yml", *KINDS, ".txt")


def fetch_definitions(source: str, cache_dir: Path) -> Path:
    """Bring a folder of definitions here; a local one is used in place.

    Raises:
        UserError: nothing is there, it may not be read, or it has too many files.
        StorageError: a server fails, or the cache's disk is full.

    """
    if source.startswith(HUB):
        from qlora_storage import hub  # noqa: PLC0415 half a second, for nothing where the Hub is not asked

        at = hub.parse(source, FIELD, "dataset")
        commit = hub.commit_of(at)

        def fill(partial: Path) -> None:
            folder = hub.open_folder(at, commit)
            prefix = f"{at.path}/".lstrip("/")
            inside = [name.removeprefix(prefix) for name in folder.names if name.startswith(prefix)]
            folder.download([f"{prefix}{name}" for name in _wanted(inside, source)], partial)
            folder.tidy(partial)

        return cached(cache_dir / "rows" / _place(f"{at.repo} {commit} {at.path}"), fill) / at.path
    local = local_path(source, FIELD)
    if local is not None:
        if not local.is_dir():
            raise UserError(FIELD, source, "must be a folder that exists")
        _wanted_in(local, source)
        return local
    store = open_store(source, FIELD)
    entries = {entry.key: entry for entry in store.entries()}
    names = _wanted(entries, source)
    place = _place(hash_of(store.uri(), [entries[name] for name in names]))
    return cached(cache_dir / "rows" / place, lambda partial: download(store, names, partial))


def definitions_identity(source: str) -> str:
    """Name what the folder holds, without bringing it here.

    Raises:
        UserError, StorageError, OSError: as when it is fetched; there the user is told.

    """
    if source.startswith(HUB):
        from qlora_storage import hub  # noqa: PLC0415

        at = hub.parse(source, FIELD, "dataset")
        return f"{at.repo} {hub.commit_of(at)} {at.path}"
    local = local_path(source, FIELD)
    if local is not None:
        return "\n".join(f"{name} {sha256_file(local / name)}" for name in _wanted_in(local, source))
    store = open_store(source, FIELD)
    entries = {entry.key: entry for entry in store.entries()}
    return hash_of(store.uri(), [entries[name] for name in _wanted(entries, source)])


def _place(text: str) -> str:
    return sha256_bytes(f"{text} definitions".encode())[:32]


def _wanted_in(folder: Path, source: str) -> list[str]:
    """Return what :func:`_wanted` does of a local folder, whose links must not lead out of it or its claim."""
    real = folder.resolve()
    if leaves_claim(folder, real):
        raise UserError(FIELD, source, "leads out of its claim by a link")
    names = _wanted([path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()], source)
    for name in names:
        if not (folder / name).resolve().is_relative_to(real):
            raise UserError(FIELD, source, f"has a link that leads out of it: {name}. Put the file itself there")
    return names


def _wanted(names: Iterable[str], source: str) -> list[str]:
    """Return the files that may be definitions or their rows, sorted."""
    wanted = []
    for name in names:
        suffixes = PurePosixPath(name.lower()).suffixes
        if suffixes[-1:] and suffixes[-1] in COMPRESSIONS:
            suffixes.pop()
        if suffixes[-1:] and suffixes[-1] in SUFFIXES:
            wanted.append(name)
    if not any(name.lower().endswith((".yaml", ".yml")) for name in wanted):
        raise UserError(FIELD, source, "holds no definition of a task; it must be a folder with YAML files")
    if len(wanted) > MOST_FILES:
        raise UserError(FIELD, source, f"holds {len(wanted)} files; at most {MOST_FILES} are read")
    return sorted(wanted)
