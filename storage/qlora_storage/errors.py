"""Errors that end a job, the two of storage among them.

::

    JobError
    ├── UserError     40  never retried: the manifest, the credentials, the model or the rows must change
    └── StorageError  47  disk full, or object storage or the Hub out of reach

``exit_code`` is :class:`qlora_api.contract.ExitCode`'s value, written out: the API's types take a third of a second to
import, and the command line reads a local folder without them.
"""

from __future__ import annotations

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


class NotFoundError(KeyError):
    """No object under this key."""

    def __str__(self) -> str:
        return f"{self.args[0]}: not found"


class AlreadyExistsError(Exception):
    """A create-only write found the key taken: by another writer, or by itself where an earlier answer was lost."""
