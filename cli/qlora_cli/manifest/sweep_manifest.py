"""From a YAML file to a QLoRASweep, or to errors with file and line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_api import API_VERSION
from qlora_api.errors import ManifestError
from qlora_api.sweep.sweep import SWEEP_KIND, QLoRASweep
from qlora_cli.manifest import job_manifest
from qlora_cli.manifest.hub_names import bare_hub_names
from qlora_cli.manifest.job_manifest import RefusedError, located, missing_type

if TYPE_CHECKING:
    from pathlib import Path

    from qlora_cli.text.kubernetes_yaml import Document


def is_sweep(document: Document) -> bool:
    return isinstance(document.value, dict) and document.value.get("kind") == SWEEP_KIND


def check(document: Document) -> QLoRASweep:
    """Validate one document.

    Raises:
        RefusedError: every error, each with file and line.

    """
    errors = list(document.errors)
    value = document.value
    if isinstance(value, dict):
        errors += missing_type(value, SWEEP_KIND)
        errors += bare_hub_names(value, "spec.template.")
    try:
        sweep = QLoRASweep.from_manifest(value)
    except ManifestError as error:
        errors += error.errors
    if not errors:
        return sweep
    raise RefusedError(*(located(document, error) for error in errors)) from None


def one_sweep(path: Path) -> QLoRASweep:
    """Read the only QLoRASweep of a file.

    Raises:
        RefusedError: not exactly one, or with errors.

    """
    ours = [document for document in job_manifest.documents(path) if not job_manifest.is_foreign(document)]
    if len(ours) != 1:
        raise RefusedError(
            f"{path}: holds {len(ours)} documents of {API_VERSION.split('/', maxsplit=1)[0]}; "
            f"'qlora sweep' takes exactly one {SWEEP_KIND}"
        )
    return check(ours[0])
