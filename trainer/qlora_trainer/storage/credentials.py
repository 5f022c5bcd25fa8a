"""Take a job's credentials out of the variables in which a pod gets its Secrets."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass

from qlora_api.credentials import KEYS, TRACKING_KEYS, prefix_of, secrets_of
from qlora_api.environment import WORKLOAD_IDENTITY
from qlora_api.spec import QLoRAJobSpec
from qlora_storage.store_settings import (
    AWS_ENDPOINTS,
    AWS_KEYS,
    AZURE_KEYS,
    AZURE_POD_TOKEN,
    GOOGLE_KEY,
    GOOGLE_KEYS,
)
from qlora_trainer.errors import UserError


@dataclass(frozen=True)
class _Family:
    """Variables of one kind of server: where it is, and what it would be sent to let the job in."""

    endpoints: tuple[str, ...]
    credentials: tuple[str, ...]


FAMILIES = (
    _Family(("HF_ENDPOINT",), ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH")),
    _Family(
        AWS_ENDPOINTS,
        (
            *AWS_KEYS,
            "AWS_SESSION_TOKEN",
            "AWS_TOKEN",
            "AWS_PROFILE",
            "AWS_DEFAULT_PROFILE",
            "AWS_CONFIG_FILE",
            "AWS_SHARED_CREDENTIALS_FILE",
            "AWS_WEB_IDENTITY_TOKEN_FILE",
            "AWS_ROLE_ARN",
            "AWS_CONTAINER_CREDENTIALS_FULL_URI",
            "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        ),
    ),
    _Family(("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"), (*AZURE_KEYS, AZURE_POD_TOKEN)),
    _Family((GOOGLE_KEY, "GOOGLE_BASE_URL"), GOOGLE_KEYS),
)
SET_BY_CLOUDS = {
    "AWS_WEB_IDENTITY_TOKEN_FILE": ("AWS_REGION", "AWS_DEFAULT_REGION"),
    "AWS_CONTAINER_CREDENTIALS_FULL_URI": ("AWS_REGION", "AWS_DEFAULT_REGION"),
    AZURE_POD_TOKEN: ("AZURE_CLIENT_ID", "AZURE_TENANT_ID"),
}
"""Variables that EKS and AKS put into a pod with the first one; no administrator chose them, and a Secret's win."""


def take_credentials(spec: QLoRAJobSpec, environment: MutableMapping[str, str]) -> None:
    """Set the variables of the allowed keys, a later Secret's over an earlier one's; remove all that came with them.

    What is in the environment already is the administrator's and wins. It is not sent to a server that a Secret names:
    where a Secret's endpoint counts, credentials of its family that are not a Secret's are removed.

    Credentials of tracking tools are a Secret's alone, since a job names the servers that they are sent to.

    Without such variables, as with ``qlora run`` or in a pod of an earlier operator, the environment stays as it is.

    Raises:
        UserError: a Secret has keys, and none that is taken.

    """
    taken: dict[str, str] = {}
    for number, (field, name) in enumerate(secrets_of(spec)):
        prefix = prefix_of(number)
        given = {key.removeprefix(prefix): environment.pop(key) for key in list(environment) if key.startswith(prefix)}
        if given and not KEYS & given.keys():
            raise UserError(field, name, f"must be a Secret with some of the keys {', '.join(sorted(KEYS))}")
        taken |= {key: value for key, value in given.items() if key in KEYS}
    if WORKLOAD_IDENTITY in environment:  # a pod: the job names the tool's server, and may name one of its author's own
        for name in TRACKING_KEYS:
            environment.pop(name, None)
    yields = {name for token, names in SET_BY_CLOUDS.items() if token in environment for name in names}
    for family in FAMILIES:
        if any(environment.get(name, "").strip() for name in family.endpoints):
            taken = {key: value for key, value in taken.items() if key not in family.endpoints}
        elif any(taken.get(name, "").strip() for name in family.endpoints):
            for name in family.credentials:
                environment.pop(name, None)
    environment.update({key: value for key, value in taken.items() if key in yields or key not in environment})
