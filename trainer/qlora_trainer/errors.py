"""Every way a trainer can fail, and the exit code that tells the operator what to do about it.

::

    TrainerError
    ├── UserError              40  never retried: the manifest, the model or the rows must change
    ├── PathError              40  the operating system refuses access to a path
    ├── PreemptedError         43  told to stop; a checkpoint is written
    │   └── PausedError        43  policy.pauseAtStep is reached
    ├── StalledError           44  a rank or a worker does not answer
    ├── NonFiniteLossError     45  stopped before the update
    ├── CheckpointError        46  no checkpoint of this run can be read
    ├── StorageError           47  disk full, or object storage out of reach
    ├── AdapterRejectedError   48  the publish gate rejects the adapter
    └── PeerLostError          49  another worker ended, and reports the cause

Errors of libraries get their codes in :mod:`qlora_trainer.reporting.rank_exit`: out of device memory 41, out of
host memory 42, a collective that timed out 44, a disk that is full 47, a broken connection 49, all else 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qlora_api.contract import ExitCode
from qlora_api.status import Reason
from qlora_storage.errors import JobError, PathError, StorageError, UserError, of_system

__all__ = [
    "AdapterRejectedError",
    "CheckpointError",
    "NonFiniteLossError",
    "PathError",
    "PausedError",
    "PeerLostError",
    "PreemptedError",
    "StalledError",
    "StorageError",
    "TrainerError",
    "UserError",
    "system_errors",
]

TrainerError = JobError
"""Its kinds :class:`UserError` and :class:`StorageError` are raised below the trainer too, in ``qlora_storage``."""


@contextmanager
def system_errors() -> Iterator[None]:
    """Raise what the operating system refuses, also a library, as an error of a job, where its number tells the kind.

    Raises:
        StorageError: a disk is full, or fails.
        PathError: a path or a permission.

    """
    try:
        yield
    except TrainerError:
        raise
    except Exception as error:
        if (known := of_system(error)) is None:
            raise
        raise known from error


class PreemptedError(TrainerError):
    exit_code = ExitCode.PREEMPTED
    reason = Reason.PREEMPTED


class PausedError(PreemptedError):
    """The attempt has done all that its step of pause asks for, the evaluation included."""

    reason = Reason.PAUSED


class StalledError(TrainerError):
    exit_code = ExitCode.STALLED


class NonFiniteLossError(TrainerError):
    exit_code = ExitCode.NON_FINITE_LOSS


class CheckpointError(TrainerError):
    exit_code = ExitCode.CHECKPOINT_UNREADABLE


class AdapterRejectedError(TrainerError):
    """The publish gate refused the adapter or merged model; nothing is published."""

    exit_code = ExitCode.ADAPTER_REJECTED


class PeerLostError(TrainerError):
    """This worker cannot go on without another one; what happened is for that one to say."""

    exit_code = ExitCode.PEER_LOST
