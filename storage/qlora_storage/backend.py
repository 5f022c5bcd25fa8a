"""Protocol of a store's backend, and the meaning of its errors.

A backend does one thing once and raises what the system raises. ``fault`` then says in words what that means;
retrying and telling the user is the store's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import ClassVar, Literal, Protocol, get_args

BucketScheme = Literal["s3", "gs", "az"]
"""Scheme of the URI of a bucket."""
BUCKET_SCHEMES: tuple[BucketScheme, ...] = get_args(BucketScheme)
MIB = 1 << 20
CHUNK_BYTES = 16 * MIB
"""Bytes per read request: the most that is asked for again when one fails."""


class FaultKind(Enum):
    MISSING = auto()
    EXISTS = auto()
    USER = auto()
    """Only the user can mend it."""
    TRANSIENT = auto()
    """May go away by itself."""
    FINAL = auto()
    """Will not go away by itself, and is not the manifest's fault."""


@dataclass(frozen=True)
class Fault:
    """Meaning of an error of the system."""

    kind: FaultKind
    message: str
    status: int = 0
    """Status of the HTTP answer; 0 if there was none."""
    denied: bool = False
    """Credentials are missing, or do not give the right."""
    timed_out: bool = False
    """No answer came in time: what is sent next should be smaller."""
    retry_after: float | None = None
    """Seconds that the server asks to be left alone."""


@dataclass(frozen=True)
class Entry:
    """An object below a store's root. ``etag`` changes with the content; for local files it is the time of change."""

    key: str
    size: int
    etag: str


class Backend(Protocol):
    """All that a store needs; keys are already checked."""

    errors: ClassVar[tuple[type[Exception], ...]]

    def put(self, key: str, data: bytes | Path) -> None: ...
    def create(self, key: str, data: bytes) -> None: ...
    def head(self, key: str) -> Entry: ...
    def read(self, entry: Entry, start: int, end: int) -> bytes: ...
    def first(self, key: str) -> tuple[Entry, bytes]: ...
    def entries(self, prefix: str) -> list[Entry]: ...
    def delete(self, folder: str) -> None: ...
    def fault(self, error: Exception) -> Fault: ...
