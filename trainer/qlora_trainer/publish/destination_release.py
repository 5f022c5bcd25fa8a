"""Give up the destination of a job that has ended, where no other attempt follows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qlora_api.contract import ExitCode, JobRef
from qlora_storage.destination_claim import release_destination
from qlora_trainer.errors import TrainerError, system_errors


def release_after(code: int, uri: str, job: JobRef) -> None:
    """Release the destination of a job that has ended with ``code``, where no other attempt follows."""
    if code == ExitCode.USER_ERROR:  # for good, unlike every other: another job may have the place
        release_destination(uri, job.uid)


@contextmanager
def released_after_errors(uri: str, job: JobRef) -> Iterator[None]:
    """Release the destination where an error ends the job for good.

    Raises:
        TrainerError: the error, one of the operating system's as that of its kind.

    """
    try:
        with system_errors():
            yield
    except TrainerError as error:
        release_after(error.exit_code, uri, job)
        raise
