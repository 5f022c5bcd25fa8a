"""A private folder with exactly the files of a base that were checked, for the libraries to load from.

::

    <cache>/bases/<name>/            copies of configuration and tokenizer, links to the weights
    <cache>/bases/<name>.json        which weights these were: by inode, size and times

Libraries look for many files beside the weights, and follow names that stand in JSON files. Here they find what is in
the closed list of :mod:`qlora_trainer.storage.model_files` and nothing else, without those names. Who may write to the
source may do so at any moment: what is small is read once, checked and kept; of weights every byte is hashed, and
:func:`changed_file` tells whether they are still the same.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

from qlora_storage.object_store import leaves_claim, sha256_bytes, sha256_file
from qlora_trainer.storage.model_files import (
    CONFIGURATIONS,
    TOOL_TEMPLATE,
    ModelFilesError,
    check_names,
    check_weights,
    is_side_file,
    is_tokenizer_file,
    json_object,
    max_bytes,
    weight_names,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from io import BufferedReader

BASES = "bases"
NAMES_A_FILE = re.compile(r"(^|_)(files?|dir|directory|path|spm)$|^(vocab|merges|init_inputs|tokenizer_object)$")
"""Keys of a configuration whose values transformers opens, such as ``tokenizer_file`` and ``gguf_file``."""
NAMES_CODE = re.compile(r"^_?(attn|experts)_implementation(_internal)?$|^(fusion_config|kernel_config|use_kernels)$")
"""Keys that choose what a base is computed with, kernels of the Hub among it: that is for the trainer to choose."""
NO_FILE = re.compile(r"name_or_path$")
"""Keys that say where a model came from, as text for people. transformers replaces their value by the folder."""
HASHES_AT_ONCE = 8
"""Files; of one, SHA-256 takes 0.5 to 2 GB/s."""
LONG_BYTES = 1 << 30
"""Reading as many takes long enough for a word."""
SETTLED_SECONDS = 2.0
"""A file that changed later than so long ago may change again within the resolution of its times."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseFolder:
    """A base's files, checked and kept apart."""

    path: Path
    revision: str
    """SHA-256 over names, sizes and contents of all files; hex. Empty where the weights were not read."""
    tokenizer_hash: str


def private_folder(source: Path, cache_dir: Path, *, hash_weights: bool = True) -> BaseFolder:
    """Check a base's files and make a folder of them.

    Args:
        source: of the base: a person's folder, a mounted claim, or what was fetched.
        cache_dir: the folder is made in it, and hashes of weights are remembered there.
        hash_weights: read the weights whole. Not needed for what only this cache's owner can write.

    Raises:
        ModelFilesError: the first thing that is wrong.
        OSError: the cache cannot be written.

    """
    if not source.is_dir():
        raise ModelFilesError("is not a folder" if source.exists() else "does not exist")
    real = source.resolve()
    if leaves_claim(source, real):
        raise ModelFilesError("leads out of its claim by a link")
    source = real
    names = _names(source)
    check_names(names)
    bases = cache_dir / BASES
    bases.mkdir(parents=True, exist_ok=True)
    made = Path(mkdtemp(prefix=".", dir=bases))
    try:
        copied = {name: _copy(source, name, made) for name in sorted(names) if is_side_file(name)}
        links = {}
        for name in weight_names(names, lambda name: (made / name).read_bytes()):
            with _open(source, name) as file:
                links[name] = _identity(file)
            (made / name).symlink_to(_target(source, name))
        check_weights(made)
        contents = dict(copied)
        if hash_weights:
            with ThreadPoolExecutor(HASHES_AT_ONCE) as pool:
                hashes = pool.map(partial(_hash_weights, source, cache_dir=cache_dir), links.items())
                contents |= dict(zip(links, hashes, strict=True))
        return BaseFolder(
            path=_put(made, bases, copied, links),
            revision=_digest(contents) if hash_weights else "",
            tokenizer_hash=_digest({name: content for name, content in copied.items() if is_tokenizer_file(name)}),
        )
    finally:
        shutil.rmtree(made, ignore_errors=True)


def changed_file(folder: Path) -> str | None:
    """Name a weight file that is no longer the one that was checked; None where all are, or it is no private folder."""
    try:
        known = json.loads(folder.with_name(f"{folder.name}.json").read_bytes())
    except FileNotFoundError:
        return None
    for name, identity in known.items():
        try:
            with (folder / name).open("rb") as file:
                if _identity(file) != identity:
                    return str(name)
        except OSError:
            return str(name)
    return None


def without_file_names(value: Any) -> Any:
    """Return a configuration without what names files or kernels, at any depth."""
    if isinstance(value, list):
        return [without_file_names(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: without_file_names(item) for key, item in value.items() if not _leads_elsewhere(key, item)}


def _leads_elsewhere(key: str, value: Any) -> bool:
    names_a_file = NAMES_A_FILE.search(key) and not NO_FILE.search(key)
    return value is not None and bool(names_a_file or NAMES_CODE.search(key))


def _copy(source: Path, name: str, folder: Path) -> str:
    """Keep a side file as the libraries may see it; the SHA-256 of what it is."""
    with _open(source, name) as file:
        data = file.read(max_bytes(name) + 1)
    if len(data) > max_bytes(name):
        raise ModelFilesError(f"has a {name} of more than {max_bytes(name)} bytes")
    kept = data
    if name in CONFIGURATIONS:
        value = json_object(name, data)
        plain = without_file_names(value)
        kept = data if plain == value else json.dumps(plain, indent=2).encode()
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(kept)
    return sha256_bytes(data)


def _put(made: Path, bases: Path, copied: Iterable[str], links: Mapping[str, list[int]]) -> Path:
    """Give a folder the name that follows from what is in it; what is there under that name is the same."""
    targets = {name: [str((made / name).readlink()), *identity] for name, identity in links.items()}
    copies = {name: sha256_file(made / name) for name in copied}
    place = bases / sha256_bytes(json.dumps([copies, targets], sort_keys=True).encode())[:32]
    if not place.exists():
        listed = made.with_name(f"{made.name}.json")
        listed.write_text(json.dumps(links))
        listed.replace(place.with_name(f"{place.name}.json"))
        try:
            made.rename(place)
        except OSError:
            if not place.exists():  # who was faster has put the same there
                raise
    return place


# --------------------------------------------------------------------------------------------------------------- files


def _names(folder: Path) -> list[str]:
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.is_file() or entry.is_symlink()]
        return [*names, TOOL_TEMPLATE] if os.path.lexists(folder / TOOL_TEMPLATE) else names
    except OSError as error:
        raise ModelFilesError(f"cannot be read: {error.strerror}") from error


def _open(folder: Path, name: str) -> BufferedReader:
    """Open a plain file of a folder, whatever is done to the folder meanwhile; a link leads nowhere else.

    In the Hugging Face cache's layout, ``snapshots/<commit>/<name>`` is a link to a file in ``blobs``.
    """
    place = folder / name
    try:
        try:
            number = _open_beside(folder, name)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            place = _target(folder, name)
            if place.parent not in _own_folders(folder):
                refused = f"has a {name} that is a link to {place}, elsewhere; put the file itself there"
                raise ModelFilesError(refused) from None
            number = _open_beside(place.parent, place.name)
    except OSError as error:
        raise ModelFilesError(f"has a {name} that cannot be read: {error.strerror}") from error
    file = os.fdopen(number, "rb")
    if not stat.S_ISREG(os.fstat(number).st_mode):
        file.close()
        raise ModelFilesError(f"has a {name} that is no plain file")
    if Path(f"/proc/self/fd/{number}").readlink() != place:
        file.close()
        raise ModelFilesError(f"has a {name} in a folder that is a link; put the folder itself there")
    return file


def _open_beside(folder: Path, name: str) -> int:
    beside = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=beside)
    finally:
        os.close(beside)


def _own_folders(folder: Path) -> list[Path]:
    """Folder that the links of a base may lead into."""
    in_a_hub_cache = folder.parent.name == "snapshots"
    return [folder, folder.parent.parent / "blobs"] if in_a_hub_cache else [folder]


def _target(folder: Path, name: str) -> Path:
    """Return where a link leads, by one step; a plain file's own place."""
    path = folder / name
    return Path(os.path.normpath(path.parent / path.readlink())) if path.is_symlink() else path


def _identity(file: BufferedReader) -> list[int]:
    """Differs when a file was replaced or written to."""
    found = os.fstat(file.fileno())
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _hash_weights(source: Path, link: tuple[str, list[int]], *, cache_dir: Path) -> str:
    """SHA-256 of a weight file's content, taken once for each identity."""
    name, identity = link
    known = cache_dir / "hashes" / sha256_bytes(f"{source / name} {identity}".encode())
    try:
        return known.read_text("ascii")
    except FileNotFoundError:
        pass
    if identity[2] > LONG_BYTES:
        log.info("reading all %.1f GB of %s, to know it again", identity[2] / 1e9, source / name)
    with _open(source, name) as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        if _identity(file) != identity:
            raise ModelFilesError(f"has a {name} that changes while it is read; start the job when it is whole")
    if time.time_ns() - max(identity[-2:]) > SETTLED_SECONDS * 1e9:
        known.parent.mkdir(exist_ok=True)
        partial_file = known.with_suffix(f".{os.getpid()}")
        partial_file.write_text(found)
        partial_file.replace(known)
    return found


def _digest(contents: Mapping[str, str]) -> str:
    return sha256_bytes("\n".join(_lines(contents)).encode())


def _lines(contents: Mapping[str, str]) -> Iterator[str]:
    for name, content in sorted(contents.items()):
        yield f"{name} {content}"
