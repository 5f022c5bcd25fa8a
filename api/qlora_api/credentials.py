"""Credentials from the Secrets that a job names: which keys are taken, and how pods get them.

Each Secret comes into a pod's environment under a prefix, so that no key of it has a meaning there; the trainer then
takes the keys of :data:`KEYS` and forgets the rest. Whoever may write a Secret can so neither run code in the pods
(``PYTHONPATH``, ``LD_PRELOAD``) nor redirect what they do (``HTTPS_PROXY``, ``NCCL_DEBUG_FILE``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qlora_api.spec import QLoRAJobSpec

TRACKING_KEYS = frozenset(
    {"MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "WANDB_API_KEY"}
)
"""Credentials of tracking tools. Only the process that writes to such a tool gets them; ranks do not."""
KEYS = TRACKING_KEYS | frozenset(
    {
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        "AWS_ENDPOINT_URL_S3",
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT",
        "AWS_ALLOW_HTTP",
        "AWS_VIRTUAL_HOSTED_STYLE_REQUEST",
        "AWS_REQUESTER_PAYS",
        "AWS_SKIP_SIGNATURE",
        "GOOGLE_SERVICE_ACCOUNT_KEY",
        "GOOGLE_ALLOW_HTTP",
        "GOOGLE_SKIP_SIGNATURE",
        "AZURE_STORAGE_ACCOUNT_NAME",
        "AZURE_STORAGE_ACCOUNT_KEY",
        "AZURE_STORAGE_ACCESS_KEY",
        "AZURE_STORAGE_SAS_KEY",
        "AZURE_STORAGE_SAS_TOKEN",
        "AZURE_CLIENT_ID",
        "AZURE_CLIENT_SECRET",
        "AZURE_TENANT_ID",
        "AZURE_STORAGE_CLIENT_ID",
        "AZURE_STORAGE_CLIENT_SECRET",
        "AZURE_STORAGE_TENANT_ID",
        "AZURE_STORAGE_ENDPOINT",
        "AZURE_ALLOW_HTTP",
        "AZURE_SKIP_SIGNATURE",
        "HF_TOKEN",
        "HF_ENDPOINT",
    }
)
"""Values only: keys that name a file or a program are set by the chart's ``trainer.env``."""


def secrets_of(spec: QLoRAJobSpec) -> Iterator[tuple[str, str]]:
    """Each Secret that a job names, once, as (field, name); of two with the same key the later one counts."""
    named = (
        ("spec.model.credentials", spec.model.credentials),
        ("spec.dataset.train.credentials", spec.dataset.train.credentials),
        ("spec.output.credentials", spec.output.credentials),
        *((f"spec.tracking[{number}].credentials", sink.credentials) for number, sink in enumerate(spec.tracking)),
    )
    seen = set()
    for field, name in named:
        if name and name not in seen:
            seen.add(name)
            yield field, name


def prefix_of(number: int) -> str:
    """Return the prefix of the variables of Secret ``number``, counted from 0 in the order of :func:`secrets_of`."""
    return f"QLORA_SECRET_{number}_"
