"""``qlora validate``: every error of every manifest."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_cli.manifest import job_manifest, local_model, local_paths, local_rows, sweep_manifest
from qlora_cli.text import units

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from qlora_api.errors import FieldError
    from qlora_cli.manifest.job_manifest import Located
    from qlora_cli.text.kubernetes_yaml import Document


@dataclass(frozen=True)
class ValidationReport:
    """Contents of one file."""

    source: str
    jobs: tuple[str, ...] = ()
    """Names of the jobs and sweeps without an error."""
    passed_over: tuple[str, ...] = ()
    """Documents of other kinds."""
    errors: tuple[Located | str, ...] = ()

    @property
    def good(self) -> bool:
        return not self.errors


def check_file(path: Path) -> ValidationReport:
    """Validate every document of a file."""
    jobs: list[str] = []
    passed_over: list[str] = []
    errors: list[Located | str] = []
    try:
        documents = job_manifest.documents(path)
    except job_manifest.RefusedError as error:
        return ValidationReport(str(path), errors=error.errors)
    for document in documents:
        if job_manifest.is_foreign(document):
            passed_over.append(f"{document.value['kind']} (line {document.line})")  # type: ignore[index]
            continue
        local = _local_errors(document)
        errors += [job_manifest.located(document, error) for error in local]
        check = sweep_manifest.check if sweep_manifest.is_sweep(document) else job_manifest.check
        try:
            name = check(document).metadata.name
        except job_manifest.RefusedError as error:
            errors += error.errors
        else:
            jobs += [] if local else [name]
    if not jobs and not errors:
        errors.append(f"{path}: holds no QLoRAJob, only {units.listing(passed_over)}")
    return ValidationReport(str(path), tuple(jobs), tuple(passed_over), job_manifest.in_order(errors))


def _local_errors(document: Document) -> list[FieldError]:
    """Return the errors of a manifest's places, and those that this machine shows."""
    if sweep_manifest.is_sweep(document):
        job = sweep_manifest.template_job(document.value)
        return [*sweep_manifest.in_template([*local_paths.place_errors(job), *content_errors(job)])]
    return [*local_paths.place_errors(document.value), *content_errors(document.value)]


def content_errors(manifest: object) -> list[FieldError]:
    """Return the errors of a manifest that its model folder and its rows on this machine show."""
    return [*local_model.model_errors(manifest), *local_rows.row_errors(manifest)]


def as_text(reports: Sequence[ValidationReport]) -> str:
    """Return a line for each error; a line for each good file."""
    lines: list[str] = []
    for report in reports:
        lines += [str(error) for error in report.errors]
        if report.good:
            passed = f"; ignored: {units.listing(report.passed_over)}" if report.passed_over else ""
            lines.append(f"{report.source}: {_valid(report.jobs)}{passed}")
    wrong = sum(len(report.errors) for report in reports)
    if wrong > 1:
        lines.append(f"{wrong} errors")
    return "\n".join(lines)


def _valid(jobs: Sequence[str]) -> str:
    return f"{jobs[0]} is valid" if len(jobs) == 1 else f"{len(jobs)} jobs are valid: {', '.join(jobs)}"


def as_json(reports: Sequence[ValidationReport]) -> str:
    """Return the reports as JSON."""
    return json.dumps(
        [
            {
                "source": report.source,
                "valid": report.good,
                "jobs": report.jobs,
                "passedOver": report.passed_over,
                "mistakes": [_plain(error) for error in report.errors],
            }
            for report in reports
        ],
        indent=2,
        ensure_ascii=False,
    )


def _plain(error: Located | str) -> dict[str, object]:
    if isinstance(error, str):
        return {"message": error}
    inner = error.error
    return {"place": error.place, "field": inner.field, "allowed": inner.allowed, "message": str(inner)}
