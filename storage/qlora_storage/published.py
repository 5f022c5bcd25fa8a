"""The one verifier of published adapters: every byte of the folders that will be used, and nothing beside.

::

    <place>/3f2a9c01-attempt-2/adapter/… and merged/…    as published: paths as the manifest has them
    <place>/adapter/… and merged/…                       as 'qlora download' lays it down

A library loads what it finds in a folder (a chat template, a pickle, weights of another name), so a file that the
manifest does not list is as bad as one that was changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_storage.errors import JobError, NotFoundError, StorageError
from qlora_storage.local_paths import partial_name
from qlora_storage.object_store import folders_above, local_path, open_store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from qlora_storage.object_store import Store

ADAPTER, MERGED = "adapter", "merged"
MANIFEST = "manifest.json"
MOST_MANIFEST_BYTES = 16 << 20
PATIENCE_SECONDS = 20.0
"""For folders above a place, which need not be there."""


@dataclass(frozen=True)
class PublishedFile:
    """One file that a manifest lists."""

    path: str
    """Relative to the manifest's folder, as published."""
    size: int
    sha256: str


def is_inside(path: str) -> bool:
    """Tell whether a path of a manifest stays in its folder."""
    return "\\" not in path and all(part not in ("", ".", "..") for part in path.split("/"))


def short_path(path: str) -> str:
    """Path of a downloaded file: as published, without the attempt's folder."""
    return path.partition("/")[2] or path


def enclosing_manifest(uri: str, field: str) -> str | None:
    """Return the manifest of an adapter in whose folders a place is, where whatever is written damages the adapter.

    A folder above the place that may not be read is taken for one without a manifest.

    Raises:
        UserError: the URI names no place.
        StorageError: a folder is out of reach; the others are then, too, and each would be waited for.

    """
    for folder, inner in folders_above(uri, field):
        store = open_store(folder, field, PATIENCE_SECONDS)
        try:
            adapter = json.loads(store.read(MANIFEST, 0, MOST_MANIFEST_BYTES)[0])["adapter"]
        except StorageError:
            raise
        except (JobError, ValueError, LookupError, TypeError, RecursionError):
            continue
        if isinstance(adapter, str) and inner in (adapter.partition("/")[0], ADAPTER, MERGED):
            return store.uri(MANIFEST)
    return None


def differences(
    store: Store,
    adapter: str,
    files: Iterable[PublishedFile],
    tell: Callable[[str], None] = lambda _: None,
    *,
    sizes_alone: Callable[[str], bool] = lambda _: False,
    downloaded: bool = True,
) -> list[str]:
    """Compare what is there with what a manifest lists, and return a line for each difference.

    Args:
        store: the manifest's folder.
        adapter: the adapter's folder in it, as published.
        files: that the manifest lists.
        tell: called with the path of each file before it is read.
        sizes_alone: for which paths it is enough that the size is right.
        downloaded: look at a downloaded copy beside or instead of the published one, too.

    Raises:
        UserError, StorageError: the store cannot be read.

    """
    listed = {file.path: file for file in files}
    if outside := [path for path in (adapter, *listed) if not is_inside(path)]:
        return [f'the manifest names a file outside its folder: "{path}"' for path in outside]
    published = _listing(store, [adapter.rpartition("/")[0] or adapter])
    copied = _listing(store, [ADAPTER, MERGED]) if downloaded else {}
    copy = {short_path(path): file for path, file in listed.items()}
    if not any(path.startswith(f"{MERGED}/") for path in copied):  # 'qlora download --adapter-only'
        copy = {path: file for path, file in copy.items() if not path.startswith(f"{MERGED}/")}
    problems = []
    if published or not copied:
        problems += _compare(store, listed, published, tell, sizes_alone)
    if copied:
        problems += _compare(store, copy, copied, tell, sizes_alone)
    return problems


def unlisted(store: Store, files: Iterable[PublishedFile]) -> list[str]:
    """Return the paths in a download's folders that no file of its manifest has, whether complete or not."""
    paths = [short_path(file.path) for file in files]
    partial = [f"{folder}/{partial_name(name)}" for folder, _, name in (path.rpartition("/") for path in paths)]
    return sorted(_listing(store, [ADAPTER, MERGED]).keys() - {*paths, *partial})


def _listing(store: Store, folders: Iterable[str]) -> dict[str, int]:
    """Path → size of all that is below folders; a negative one for a link to a folder."""
    found: dict[str, int] = {}
    for folder in folders:
        found |= dict(store.list(folder))
        if local := local_path(store.uri(folder), store.field):
            for parent, names, _ in os.walk(local):
                links = (Path(parent) / name for name in names if (Path(parent) / name).is_symlink())
                found |= {f"{folder}/{link.relative_to(local).as_posix()}": -1 for link in links}
    return found


def _compare(
    store: Store,
    listed: Mapping[str, PublishedFile],
    there: Mapping[str, int],
    tell: Callable[[str], None],
    sizes_alone: Callable[[str], bool],
) -> list[str]:
    problems = []
    for path, file in listed.items():
        tell(path)
        if problem := difference(store, path, file, there.get(path), content=not sizes_alone(path)):
            problems.append(f"{path} {problem}")
    return problems + [f"{path} is not in the manifest" for path in sorted(there.keys() - listed.keys())]


def difference(store: Store, path: str, file: PublishedFile, size: int | None, *, content: bool = True) -> str | None:
    """Say how what is at a path, of a size, differs from a file of a manifest; None where it does not."""
    if size is None:
        return "is missing"
    if size != file.size:
        return f"has {size} bytes where {file.size} were published"
    if not content:
        return None
    digest = hashlib.sha256()
    try:
        for piece in store.chunks(path):
            digest.update(piece)
    except NotFoundError:
        return "is missing"
    return None if digest.hexdigest() == file.sha256 else "is not what was published: its SHA-256 differs"
