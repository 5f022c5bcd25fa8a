"""Models and rows, brought to a local folder and checked before anything is loaded.

Rows in local folders and on mounted claims are used in place; of a model, wherever it is, a folder is made that holds
what was checked and nothing else (:mod:`qlora_trainer.storage.base_folder`).

What comes over the network lies in the cache under a name made of its source and content, complete or not at all; a
second process waits for the first one's download. Where only headers of weights are wanted, the files are as long as
the weights, with holes where tensors would be.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_memory.shape.safetensors_headers import LENGTH_BYTES, HeaderError, header_length
from qlora_storage.object_store import PVC_MOUNT, local_path, open_store, sha256_bytes
from qlora_trainer.errors import StorageError, UserError
from qlora_trainer.row_files import ALLOWED, RowFilesError, select
from qlora_trainer.storage.base_folder import private_folder
from qlora_trainer.storage.model_files import (
    ModelFilesError,
    check_model,
    check_names,
    headers_revision,
    is_in_place,
    is_side_file,
    max_bytes,
    weight_names,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from qlora_storage.object_store import Entry, Store

__all__ = [
    "PVC_MOUNT",
    "FetchedModel",
    "fetch_model",
    "fetch_rows",
    "model_revision",
    "rows_identity",
    "same_revision",
]

log = logging.getLogger(__name__)

HUB = "hf://"
MODEL_FIELD = "spec.model.source"
EVAL_FIELD = "spec.dataset.eval.source"
FIRST_READ = 128 * 1024
"""Bytes of a weight file that are asked for at once: most headers are shorter."""


@dataclass(frozen=True)
class FetchedModel:
    """A model on this machine, checked."""

    path: Path
    """With the files that were checked, and no others."""
    revision: str
    """Names the content: the commit on the Hub; for object storage a hash of names, sizes and etags; for local
    folders a hash of every byte."""
    source: str
    """As in the manifest."""
    tokenizer_hash: str
    """SHA-256 over names and contents of the tokenizer's files, chat template included; hex."""


def default_cache() -> Path:
    """Return the cache of ``qlora run``."""
    return Path(os.environ.get("QLORA_CACHE", Path.home() / ".cache" / "qlora-operator"))


def fetch_model(
    source: str, cache_dir: Path, pinned: str | None = None, *, headers_only: bool = False, field: str = MODEL_FIELD
) -> FetchedModel:
    """Bring the base model here and check all that can be checked without loading weights.

    Args:
        source: ``spec.model.source``.
        cache_dir: models lie in its folder ``models``.
        pinned: the revision that must come. On the Hub it is asked for, whatever the source's branch says by now.
        headers_only: of weights bring names, types and shapes alone, kilobytes of gigabytes.
        field: that errors name.

    Raises:
        UserError: not there, not readable, incomplete, pickled, without a tokenizer, with code of its own, or at
            another revision than the pinned one.
        StorageError: a server fails, or the cache's disk is full.

    """
    try:
        if source.startswith(HUB):
            path, revision = _model_from_hub(source, field, cache_dir, pinned, headers_only)
        elif local := local_path(source, field):
            path, revision = local, ""
        else:
            path, revision = _model_from_store(source, field, cache_dir, headers_only)
        base = private_folder(path, cache_dir, hash_weights=not revision)
    except ModelFilesError as error:
        raise UserError(field, source, str(error)) from error
    except OSError as error:
        raise StorageError(f"the cache {cache_dir} cannot be written: {error}") from error
    revision = revision or base.revision
    if pinned is not None and not same_revision(source, revision, pinned):
        raise UserError(
            field,
            source,
            f"is at revision {revision} now, and the run began on {pinned}: put that back, or start a new run",
        )
    return FetchedModel(base.path, pinned or revision, source, base.tokenizer_hash)


def same_revision(source: str, revision: str, earlier: str) -> bool:
    """Tell whether ``earlier`` names what is there now, perhaps as an earlier version named a local folder.

    Raises:
        ModelFilesError, OSError: the folder cannot be read.

    """
    if revision == earlier:
        return True
    local = None if source.startswith(HUB) else local_path(source, MODEL_FIELD)
    return local is not None and headers_revision(local) == earlier


def fetch_rows(source: str, field: str, cache_dir: Path) -> Path:
    """Bring rows here: a file, or a folder of them.

    Args:
        source: as in the manifest; on the Hub also a file or folder inside, ``hf://org/name@revision/data/train.jsonl``.
        field: path of the manifest's field, such as ``spec.dataset.train.source``.
        cache_dir: rows lie in its folder ``rows``.

    Raises:
        UserError: nothing is there, or it may not be read.
        StorageError: a server fails, or the cache's disk is full.

    """
    if source.startswith(HUB):
        return _rows_from_hub(source, field, cache_dir)
    local = local_path(source, field)
    if local is None:
        return _rows_from_store(source, field, cache_dir)
    if not local.exists():
        raise UserError(field, source, "does not exist")
    return local


# -------------------------------------------------------------------------------------------------------------- models


def _model_from_hub(
    source: str, field: str, cache_dir: Path, pinned: str | None, headers_only: bool
) -> tuple[Path, str]:
    from qlora_storage import hub  # noqa: PLC0415 half a second, for nothing where the Hub is not asked

    at = hub.parse(source, field, "model")
    if at.path:
        raise UserError(field, source, "must name a repository, hf://org/name@revision, not a folder inside")
    commit = pinned or hub.commit_of(at)

    def fill(partial: Path) -> None:
        folder = hub.open_folder(at, commit)
        names = [n for n in folder.names if is_in_place(n)]
        check_names(names)
        folder.download([n for n in names if is_side_file(n)], partial)
        weights = weight_names(names, lambda n: (partial / n).read_bytes())
        if headers_only:
            _bring_headers(weights, folder.read, partial)
        else:
            folder.download(weights, partial)
        folder.tidy(partial)

    name = f"hf--{at.repo.replace('/', '--')}--{commit}"
    return _model_folder(cache_dir, name, fill, headers_only), commit


def _model_from_store(source: str, field: str, cache_dir: Path, headers_only: bool) -> tuple[Path, str]:
    store = open_store(source, field)
    wanted = _model_objects(store)
    name = hash_of(store.uri(), wanted)

    def fill(partial: Path) -> None:
        weights = [e.key for e in wanted if not is_side_file(e.key)] if headers_only else []
        _bring_headers(weights, store.read, partial)
        download(store, [e.key for e in wanted if e.key not in weights], partial)

    return _model_folder(cache_dir, name, fill, headers_only), hash_of("", wanted)


def _model_folder(cache_dir: Path, name: str, fill: Callable[[Path], None], headers_only: bool) -> Path:
    """Return the model's place in the cache; one with holes is kept apart from what ranks load."""
    whole = cache_dir / "models" / name
    place = cache_dir / "headers" / name if headers_only and not whole.exists() else whole
    return cached(place, fill, check_model)


def _bring_headers(names: list[str], read: Callable[[str, int, int], tuple[bytes, int]], folder: Path) -> None:
    """Make files as long as these, with their headers; ``read`` gives bytes [start, end) and the length of a file."""
    for name in names:
        first, size = read(name, 0, FIRST_READ)
        try:
            end = LENGTH_BYTES + header_length(first)
        except HeaderError as error:
            raise ModelFilesError(f"has a {name} that {error}; copy it again") from error
        rest = read(name, len(first), end)[0] if end > len(first) else b""
        with (folder / name).open("wb") as file:
            file.write((first + rest)[:end])
            file.truncate(size)


def _model_objects(store: Store) -> list[Entry]:
    there = {e.key: e for e in store.entries() if is_in_place(e.key)}
    if not there:
        raise ModelFilesError("holds no files")
    check_names(there)
    sides = [e for e in there.values() if is_side_file(e.key)]
    for entry in sides:
        if entry.size > max_bytes(entry.key):
            raise ModelFilesError(f"has a {entry.key} of {entry.size} bytes; at most {max_bytes(entry.key)} are read")
    weights = weight_names(there, store.get)
    return [*sides, *(there[name] for name in weights)]


# ---------------------------------------------------------------------------------------------------------------- rows


def _rows_from_hub(source: str, field: str, cache_dir: Path) -> Path:
    from qlora_storage import hub  # noqa: PLC0415

    at = hub.parse(source, field, "dataset")
    commit = hub.commit_of(at)

    def fill(partial: Path) -> None:
        folder = hub.open_folder(at, commit)
        prefix = f"{at.path}/".lstrip("/")
        single = [n for n in folder.names if n == at.path]
        inside = [n.removeprefix(prefix) for n in folder.names if n.startswith(prefix)]
        folder.download(single or [f"{prefix}{n}" for n in _row_names(inside, source, field)], partial)
        folder.tidy(partial)

    split = "evaluation" if field == EVAL_FIELD else "training"
    place = sha256_bytes(f"{at.repo} {commit} {at.path} {split}".encode())[:32]
    return cached(cache_dir / "rows" / place, fill) / at.path


def _rows_from_store(source: str, field: str, cache_dir: Path) -> Path:
    store, entries, single = _row_objects(source, field)
    place = hash_of(store.uri(), entries)[:32]
    return (
        cached(cache_dir / "rows" / place, lambda partial: download(store, [e.key for e in entries], partial)) / single
    )


def _row_objects(source: str, field: str) -> tuple[Store, list[Entry], str]:
    """Return the objects below a folder; or the folder of a single object, that object, and its name."""
    store = open_store(source, field)
    entries = {e.key: e for e in store.entries()}
    if entries:
        return store, [entries[name] for name in _row_names(entries, source, field)], ""
    # The source is the object itself rather than a folder.
    parent, _, single = store.uri().rpartition("/")
    bucket_alone = parent.endswith(":/")
    store = store if bucket_alone else open_store(parent, field)
    entry = None if bucket_alone else store.stat(single)
    if entry is None:
        raise UserError(field, source, f"holds no rows; it {ALLOWED}")
    return store, [entry], single


def _row_names(names: Iterable[str], source: str, field: str) -> tuple[str, ...]:
    """Choose the files that hold rows, and say which of the others are left where they are."""
    try:
        selection = select(names, evaluation=field == EVAL_FIELD)
    except RowFilesError as error:
        raise UserError(field, source, str(error)) from error
    if unread := selection.unread():
        log.info("not read of %s: %s", source, unread)
    return selection.rows


# ---------------------------------------------------------------------------------------------------------- identities
# What a source holds, found out without bringing it here.


def model_revision(source: str, cache_dir: Path) -> str:
    """The revision that :func:`fetch_model` would bring; of a local folder, what it was found to hold is remembered.

    Raises:
        ModelFilesError, UserError, StorageError, OSError: as when it is fetched; there the user is told.

    """
    if source.startswith(HUB):
        from qlora_storage import hub  # noqa: PLC0415

        return hub.commit_of(hub.parse(source, MODEL_FIELD, "model"))
    if local := local_path(source, MODEL_FIELD):
        return private_folder(local, cache_dir).revision
    return hash_of("", _model_objects(open_store(source, MODEL_FIELD)))


def rows_identity(source: str, field: str) -> str:
    """Changes whenever the rows behind a network do: by etag in object storage, by commit on the Hub.

    Raises:
        UserError, StorageError, OSError: as when they are fetched; there the user is told.

    """
    if source.startswith(HUB):
        from qlora_storage import hub  # noqa: PLC0415

        at = hub.parse(source, field, "dataset")
        return f"{at.repo} {hub.commit_of(at)} {at.path}"
    store, entries, single = _row_objects(source, field)
    return f"{hash_of(store.uri(), entries)} {single}"


# --------------------------------------------------------------------------------------------------------------- cache


def cached(final: Path, fill: Callable[[Path], None], check: Callable[[Path], None] = lambda _: None) -> Path:
    """Make ``final`` by filling a folder beside it and renaming; what an earlier try left is there for ``fill``.

    Args:
        final: its name must say its content.
        fill: brings the files.
        check: raises if they cannot be used; then nothing of them stays.

    """
    partial = final.with_name(f".{final.name}.partial")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with _alone(final.with_name(f".{final.name}.lock")):
            if not final.exists():
                partial.mkdir(exist_ok=True)
                fill(partial)
                _check_or_clear(partial, check)
                partial.rename(final)
    except OSError as error:
        raise StorageError(f"the cache {final.parent} cannot be written: {error}") from error
    return final


def take_name(partial: Path, folder: Path) -> None:
    """Give a filled folder its name. Who was faster has put the same there: then that stays."""
    try:
        partial.rename(folder)
    except OSError:
        if not folder.exists():
            raise


def _check_or_clear(folder: Path, check: Callable[[Path], None]) -> None:
    try:
        check(folder)
    except ModelFilesError:
        shutil.rmtree(folder)
        raise


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock among processes; the system drops it when the holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def download(store: Store, keys: list[str], folder: Path) -> None:
    """Fetch each object that is not there yet; a file under its own name is whole."""
    for key in keys:
        target = folder / key
        if not target.exists():
            unfinished = target.with_name(f"{target.name}.part")
            store.download_file(key, unfinished)
            unfinished.rename(target)


def hash_of(uri: str, entries: list[Entry]) -> str:
    lines = [f"{e.key} {e.size} {e.etag}" for e in sorted(entries, key=lambda e: e.key)]
    return sha256_bytes("\n".join([uri, *lines]).encode())
