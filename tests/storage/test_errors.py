"""Exit codes of storage's errors are the contract's."""

from qlora_api.contract import ExitCode
from qlora_storage.errors import JobError, StorageError, UserError


def test_exit_codes_are_the_contracts():
    assert (JobError.exit_code, UserError.exit_code, StorageError.exit_code) == (
        ExitCode.CRASHED,
        ExitCode.USER_ERROR,
        ExitCode.STORAGE_FAILED,
    )
