"""Take a job's credentials out of the variables in which a pod gets its Secrets."""

from __future__ import annotations

import sys
from collections.abc import MutableMapping

from qlora_api.credentials import KEYS, prefix_of, secrets_of
from qlora_api.spec import QLoRAJobSpec
from qlora_trainer.errors import UserError


def take_credentials(spec: QLoRAJobSpec, environment: MutableMapping[str, str]) -> None:
    """Set the variables of the allowed keys, a later Secret's over an earlier one's; remove all that came with them.

    Without such variables, as with ``qlora run`` or in a pod of an earlier operator, the environment stays as it is.

    Raises:
        UserError: a Secret has keys, and none that is taken.

    """
    for number, (field, name) in enumerate(secrets_of(spec)):
        prefix = prefix_of(number)
        given = {key.removeprefix(prefix): environment.pop(key) for key in list(environment) if key.startswith(prefix)}
        if given and not KEYS & given.keys():
            raise UserError(field, name, f"must be a Secret with some of the keys {', '.join(sorted(KEYS))}")
        environment.update({key: value for key, value in given.items() if key in KEYS})


def python_command() -> tuple[str, ...]:
    """Return the command of a Python like this one: isolated if this one is, as in pods."""
    return (sys.executable, "-I", "-u") if sys.flags.isolated else (sys.executable,)
