"""Exit codes of each command, as its ``--help`` lists them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

CHECK_FAILED = 1
"""The check failed: a watched job failed, an adapter is not what was published, the doctor found a fault."""
UNREACHABLE = 3
"""No cluster answers, or it does not know who asks."""
USER_ERROR = 40
"""As ``qlora_api.contract.ExitCode.USER_ERROR``: a name, a flag, a manifest, a right must change."""
STORAGE_FAILED = 47
"""As ``qlora_api.contract.ExitCode.STORAGE_FAILED``: a disk is full, or fails."""
WRONG_USAGE = 2
INTERRUPTED = 130

_LOCAL = {
    0: "success",
    WRONG_USAGE: "wrong usage",
    USER_ERROR: "invalid manifest, name or value, or a path that cannot be used",
    STORAGE_FAILED: "a disk is full or fails",
    INTERRUPTED: "Ctrl-C",
}
_CLUSTER = _LOCAL | {
    UNREACHABLE: "the cluster cannot be reached, or authentication failed",
    USER_ERROR: "invalid manifest, name or value, or missing permission",
}
_TRAINER = {
    CHECK_FAILED: "the trainer crashed",
    STORAGE_FAILED: "a disk is full or fails, or object storage failed",
}
_ATTEMPT = _TRAINER | {
    41: "out of GPU memory",
    42: "out of host memory",
    43: "stopped before the end, after saving a checkpoint",
    44: "stalled: a rank made no progress",
    45: "the loss is not finite",
    46: "no checkpoint is intact",
    48: "the adapter did not pass its checks",
    49: "another worker was lost",
}
"""As ``qlora_api.contract.ExitCode``."""

_CODES: Mapping[str, Mapping[int, str]] = {
    "run": _LOCAL | _ATTEMPT | {INTERRUPTED: "Ctrl-C; the same command resumes the run"},
    "sweep": _LOCAL
    | {
        CHECK_FAILED: "no trial succeeded, or more failed than spec.maxFailedTrials",
        43: "the budget is used up; with a larger one the same command resumes the sweep",
        INTERRUPTED: "Ctrl-C; the same command resumes the sweep",
    },
    "validate": _LOCAL | {USER_ERROR: "a manifest is invalid or cannot be read"},
    "plan": _LOCAL | {USER_ERROR: "the job does not fit, or its manifest is invalid"},
    "inspect": _LOCAL | _TRAINER,
    "explain": _LOCAL | {USER_ERROR: "no such field"},
    "crds": {code: meaning for code, meaning in _LOCAL.items() if code != USER_ERROR},
    "generate": _LOCAL | _TRAINER,
    "report": _CLUSTER,
    "init": _LOCAL,
    "submit": _CLUSTER | {CHECK_FAILED: "the question was answered with no, or a watched job or sweep failed"},
    "watch": _CLUSTER | {CHECK_FAILED: "a watched job or sweep failed"},
    "cancel": _CLUSTER | {CHECK_FAILED: "the question was answered with no"},
    "verify": _CLUSTER | {CHECK_FAILED: "a file differs from what was published"},
    "merge": _CLUSTER | _TRAINER | {48: "the merged model did not pass its checks"},
    "upload": _LOCAL,
    "doctor": _CLUSTER | {CHECK_FAILED: "a check found a fault"},
}
"""Exit codes of the commands that have more than those of every command that asks a cluster."""
_ALL = _CLUSTER | {CHECK_FAILED: "a watched job failed, a check found a fault, or the question was answered with no"}
_OF_THE_TRAINER = {"41-49": "the trainer ended early: see 'qlora run --help'; 43 from 'qlora sweep': budget used up"}


def exit_codes(command: str | None = None) -> dict[str, str]:
    """Return the exit codes of a command and what they mean, or those of all commands, in their order."""
    codes = sorted((_ALL if command is None else _CODES.get(command, _CLUSTER)).items())
    shown = {str(code): meaning for code, meaning in codes}
    return shown | _OF_THE_TRAINER if command is None else shown
