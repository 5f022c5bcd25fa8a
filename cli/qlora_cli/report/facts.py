"""``qlora report``: all that is known of one run, on one page that needs nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from qlora_api.base import in_utc
from qlora_api.contract import PrepareReceipt
from qlora_api.errors import validate
from qlora_cli.local import run_folder
from qlora_cli.records.adapter_manifest import RecordedManifest
from qlora_cli.report import training_history
from qlora_cli.report.answers import AnswerLine, kept
from qlora_cli.report.training_history import MergedHistory
from qlora_storage.local_paths import read_regular

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qlora_api.contract import TerminationMessage
    from qlora_api.status import Attempt
    from qlora_cli.local.run_folder import RunRecord

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Facts:
    """Facts in a report, wherever they were found."""

    name: str
    uid: str
    created: datetime
    spec: dict[str, Any]
    history: MergedHistory
    attempts: Sequence[Attempt] = ()
    tokens: int = 0
    device: str = ""
    termination_message: TerminationMessage | None = None
    """The termination message of the attempt that ended the run."""
    receipt: PrepareReceipt | None = None
    predicted: dict[str, int] = field(default_factory=dict)
    measured: dict[str, int] = field(default_factory=dict)
    manifest: dict[str, Any] | None = None
    """As published, where it can be read here."""
    trainer_answers: Sequence[AnswerLine] = ()
    """Answers of base and adapter, before the first step and after the last."""
    answers: Sequence[AnswerLine] = ()
    """As far as they were asked later."""

    @property
    def published(self) -> bool:
        return self.manifest is not None or bool(self.termination_message and self.termination_message.adapter)


def gather(run: str, runs_dir: Path) -> tuple[Facts, Path]:
    """Return what is known of a run, and the folder it is in."""
    for place in (runs_dir / run, Path(run)):
        folder = run_folder.RunFolder(place.absolute())
        record = folder.read()
        if record is not None:
            return of_run(folder, record), folder.path
    place = Path(run)
    manifest = place if place.name == MANIFEST else place / MANIFEST
    if manifest.is_file():
        return of_adapter(manifest), manifest.parent
    known = sorted(p.parent.name for p in runs_dir.glob("*/run.json") if ".old-" not in p.parent.name)
    there = f"; there are {', '.join(known)}" if known else ""
    raise run_folder.RunError(
        f"{run}: no run of this name in {runs_dir}{there}, and no folder with a {MANIFEST}; the report of a job in a "
        "cluster needs its adapter here: qlora download JOB"
    )


def of_run(folder: run_folder.RunFolder, record: RunRecord) -> Facts:
    """A local run, finished or not."""
    newest = folder.attempt(record.attempts[-1].number) if record.attempts else None
    termination = record.result or (newest.termination_message() if newest else None)
    memory = termination.memory if termination else None
    published = termination.adapter.uri.removeprefix("file://") if termination and termination.adapter else "://"
    history = training_history.of_run(folder.path, None if "://" in published else Path(published))
    device = next((a.device for a in reversed(history.attempts.values()) if a.device), None)
    return Facts(
        name=record.name,
        uid=record.uid,
        created=record.created,
        spec=record.spec.to_json_dict(),
        history=history,
        attempts=record.attempts,
        tokens=record.tokens_trained,
        device=device or record.device,
        termination_message=termination,
        receipt=record.receipt,
        predicted=memory.predicted if memory else {},
        measured=memory.measured if memory else {},
        manifest=_local_manifest(termination),
        trainer_answers=trainer_answers(history),
        answers=kept(folder.path),
    )


def of_adapter(manifest: Path) -> Facts:
    """A published adapter, copied here or made here: what its manifest and its history say."""
    try:
        found = _read_manifest(manifest)
        history = training_history.of_file(manifest.parent / found["adapter"] / training_history.PUBLISHED_FILE)
        return Facts(
            name=str(found["job"]),
            uid=str(found["runUid"]),
            created=in_utc(datetime.fromisoformat(found["created"])),
            spec=found["config"],
            history=history,
            receipt=_receipt(history.end.get("receipt")),
            predicted=_sizes(history.end.get("predicted")),
            measured=_sizes(history.end.get("measured")),
            tokens=found["metrics"].get("tokens") or 0,
            device=next((a.device for a in reversed(history.attempts.values()) if a.device), None) or "",
            manifest=found,
            trainer_answers=trainer_answers(history),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise run_folder.RunError(f"{manifest} is no manifest of an adapter ({error})") from None


def _read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of an adapter.

    Raises:
        OSError: it cannot be read.
        ValueError, RecursionError: it is none.

    """
    found: dict[str, Any] = json.loads(read_regular(path))
    validate(RecordedManifest, found)
    return found


def _sizes(found: Any) -> dict[str, int]:
    """Return bytes by component; empty where there are none."""
    return {str(name): int(size) for name, size in found.items()} if isinstance(found, dict) else {}


def trainer_answers(history: MergedHistory) -> list[AnswerLine]:
    """Return the answers that the trainer itself asked for before the first step and after the last, by prompt."""
    base, adapter = (history.answers.get(who, {}) for who in ("base", "adapter"))
    return [AnswerLine(prompt=p, base=base.get(p), adapter=adapter.get(p)) for p in {**base, **adapter}]


def _local_manifest(termination: TerminationMessage | None) -> dict[str, Any] | None:
    adapter = termination.adapter if termination else None
    if adapter is None or "://" in adapter.manifest_uri.removeprefix("file://"):
        return None
    try:
        return _read_manifest(Path(adapter.manifest_uri.removeprefix("file://")))
    except (OSError, ValueError, RecursionError):
        return None


def _receipt(numbers: Any) -> PrepareReceipt | None:
    try:
        return PrepareReceipt.model_validate({**numbers, "samples": []}) if numbers else None
    except (ValidationError, TypeError):
        return None
