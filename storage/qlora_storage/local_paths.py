"""Paths and URIs as users write them, and files that take their place as a whole."""

from __future__ import annotations

import errno
import os
import re
import stat
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

MOST_BYTES = 64 << 20
"""Largest record or manifest. A larger file is something else, and would fill the memory."""
SCHEMES = ("s3", "gs", "az", "hf", "pvc", "file")
BUCKET = {"s3": r"[A-Za-z0-9._-]+", "gs": r"[A-Za-z0-9._-]+", "az": r"[A-Za-z0-9-]+|\$(root|web|logs)"}
"""Names of buckets, by scheme; those of Azure are containers, some of them the server's own."""
_WITHOUT_SLASHES = re.compile(rf"({'|'.join(SCHEMES)}):|([A-Za-z][A-Za-z0-9+.-]*):(/|$)", re.IGNORECASE)
_VARIABLE = re.compile(r"(^|/)\$[A-Za-z_]|\$[({]")
_QUERY = re.compile(r"\?[\w.-]+=")


def expand_home(path: str) -> Path:
    """Return a path with the home that ``~`` or ``~user`` stands for; as it is where there is no such user."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 Path.expanduser raises a RuntimeError there


def partial_name(name: str) -> str:
    """Return the name of a file for as long as it is not complete; a process that is killed leaves it."""
    return f".{name}.partial"


def open_regular(path: Path) -> IO[bytes]:
    """Open a regular file for reading. A named pipe, which would be opened when somebody writes to it, is refused.

    Raises:
        OSError: the file cannot be opened, or is not a regular one.

    """
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115 returned
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return file


def read_regular(path: Path, most: int = MOST_BYTES) -> bytes:
    """Read a regular file as a whole, unless it is larger than ``most`` bytes.

    Raises:
        OSError: the file cannot be read, is not a regular one, or is too large.

    """
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"Larger than {most} bytes", str(path))
    return data


@contextmanager
def whole_file(path: Path, mode: int = 0o666) -> Iterator[IO[bytes]]:
    """Open a file for writing that takes its name when the block ends well; nothing is left of it otherwise.

    A link is followed. What is no regular file, such as /dev/stdout, is written as it comes.

    Raises:
        OSError: with ``path`` as its file, whatever the system refused.

    """
    target = Path(os.path.realpath(path))
    if target.is_symlink():  # realpath ends at a circle
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    try:
        if target.exists() and not target.is_file():
            with target.open("wb") as file:
                yield file
            return
        partial = target.with_name(partial_name(target.name))
        try:
            partial.unlink(missing_ok=True)  # an older one would keep its mode
            with open(partial, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_whole(path: Path, text: str, mode: int = 0o666) -> None:
    """Write a text file as a whole or not at all."""
    with whole_file(path, mode) as file:
        file.write(text.encode())


def uri_problem(uri: str) -> str | None:
    """Say why a URI or a local path cannot be meant as it is written, and what to write; None where it can.

    The words complete a sentence about the URI and do not repeat it: it may hold a password.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        if found := _WITHOUT_SLASHES.match(uri):
            name = found[1] or found[2]
            example = "file:///folder/name" if name.lower() == "file" else f"{name}://name/folder"
            return f"must be written as {example}; a local folder of that name is ./{name}:…"
        rest = uri
    elif scheme == "file" and not rest.startswith("/"):
        return "must have an absolute path after file://, such as file:///folder/name"
    bucket, slash, key = rest.lstrip("/").partition("/")
    if separator and bucket and scheme in BUCKET:
        if not re.fullmatch(BUCKET[scheme], bucket) and not _VARIABLE.search(bucket):
            return (
                f"must have nothing but the name between {scheme}:// and the next slash: credentials and servers"
                " are read from the environment"
            )
        if _QUERY.search(key):
            return "must not have a query: versions and options of objects are not read"
        rest = f"{slash}{key}" if bucket.startswith("$") and re.fullmatch(BUCKET[scheme], bucket) else rest
    if _VARIABLE.search(rest):
        return "must not have variables: they are not replaced here; write the value"
    return None


def without_password(uri: str) -> str | None:
    """Return a URI as it may be repeated in an error; None where a password may be in it."""
    return None if "@" in uri.partition("://")[2].partition("/")[0] else uri
