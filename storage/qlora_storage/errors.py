"""Errors that end a job, the two of storage among them.

::

    JobError
    ├── UserError     40  never retried: the manifest, the credentials, the model or the rows must change
    ├── PathError     40  the operating system refuses a path or a permission
    └── StorageError  47  disk full, or object storage or the Hub out of reach

``exit_code`` is :class:`qlora_api.contract.ExitCode`'s value, written out: the API's types take a third of a second to
import, and the command line reads a local folder without them.
"""

from __future__ import annotations

import errno
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora_api.errors import FieldError


class JobError(Exception):
    """Ends an attempt or a command with ``exit_code``; ``str()`` is one paragraph for a person."""

    exit_code: int = 1


class UserError(JobError):
    """An error only the user can mend.

    Args:
        field: path in the manifest, such as ``spec.lora.targetModules``.
        value: what stands there.
        allowed: what may stand there, or what to do; completes the sentence ``field: "value" …``.

    """

    exit_code = 40

    def __init__(self, field: str, value: object, allowed: str) -> None:
        from qlora_api.errors import FieldError  # noqa: PLC0415 slow, and needed where something is wrong alone

        self.arguments = (field, None if value is None else str(value), allowed)
        self.error: FieldError = FieldError(field, value, allowed)
        super().__init__(str(self.error))


class StorageError(JobError):
    """A store or a disk fails, and not through what the user wrote."""

    exit_code = 47


class PathError(JobError):
    """The operating system refuses a path or a permission: the command, the manifest or the machine must change."""

    exit_code = 40


_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO})
_PATH = frozenset(
    {
        *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR),
        *(errno.ENAMETOOLONG, errno.ELOOP, errno.EEXIST),
    }
)


_IN_TEXT = re.compile(r"\(os error (\d+)\)")
"""The number in the text of errors of libraries in Rust, such as safetensors and tokenizers, which are no OSError."""


def of_system(error: Exception) -> JobError | None:
    """Return what an error of the operating system means for a job; None where that is not known by its number."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _IN_TEXT.search(str(error))):
        number = int(found[1])
    if number in _DISK:
        return StorageError(in_words(error))
    return PathError(in_words(error)) if number in _PATH else None


def in_words(error: Exception) -> str:
    """Name the file that the system refused, where the error has it, and the reason."""
    if not isinstance(error, OSError):
        return str(error)
    names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    reason = error.strerror or str(error) or type(error).__name__
    return f"{names}: {reason}" if names else reason


class NotFoundError(KeyError):
    """No object under this key."""

    def __str__(self) -> str:
        return f"{self.args[0]}: not found"


class AlreadyExistsError(Exception):
    """A create-only write found the key taken: by another writer, or by itself where an earlier answer was lost."""
