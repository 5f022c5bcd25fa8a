"""From a YAML file to a QLoRASweep, or to errors with file and line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qlora_api import API_VERSION
from qlora_api.errors import FieldError, ManifestError
from qlora_api.sweep.sweep import SWEEP_KIND, QLoRASweep
from qlora_cli.manifest import crd_schema, job_manifest
from qlora_cli.manifest.hub_names import bare_hub_names
from qlora_cli.manifest.job_manifest import RefusedError, located, missing_type, overridden

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from qlora_cli.manifest.job_manifest import Override
    from qlora_cli.text.kubernetes_yaml import Document

TEMPLATE = "spec.template."
"""Before the fields of the template's job."""


def is_sweep(document: Document) -> bool:
    return isinstance(document.value, dict) and document.value.get("kind") == SWEEP_KIND


def check(document: Document, overrides: Sequence[Override] = ()) -> QLoRASweep:
    """Validate one document.

    Raises:
        RefusedError: every error, each with file and line.

    """
    errors = list(document.errors)
    value = document.value
    if isinstance(value, dict):
        errors += missing_type(value, SWEEP_KIND)
        value = crd_schema.without_nulls(overridden(value, overrides), crd_schema.sweep_root())
        errors += bare_hub_names(value, TEMPLATE)
    try:
        sweep = QLoRASweep.from_manifest(value)
    except ManifestError as error:
        errors += error.errors
    if not errors:
        return sweep
    raise RefusedError(*(located(document, error, overrides) for error in errors)) from None


def parse_override(text: str) -> Override:
    """Return a field of a sweep that is set on the command line: ``maxTrials=12``, ``template.spec.lora.rank=8``.

    Raises:
        RefusedError: no ``=``, or a value that is not YAML.

    """
    return job_manifest.parse_override(text, crd_schema.sweep_root())


def template_job(manifest: Any) -> dict[str, Any]:
    """Return the job of a sweep's template as a manifest of its own; without a spec where there is none."""
    spec = manifest.get("spec") if isinstance(manifest, dict) else None
    template = spec.get("template") if isinstance(spec, dict) else None
    return {"spec": template.get("spec") if isinstance(template, dict) else None}


def in_template(errors: Iterable[FieldError]) -> Iterator[FieldError]:
    """Yield errors of the template's job with the paths of their fields in the sweep."""
    for error in errors:
        sentence = str(error).removeprefix(f"{error.field}: ")
        yield FieldError(f"{TEMPLATE}{error.field}", error.value, error.allowed, sentence=sentence)


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
