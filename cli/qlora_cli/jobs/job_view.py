"""Cut what a command shows of a job out of the API object, or out of the record of a local run."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_cli.kube.errors import ClusterError
from qlora_cli.local.processes import in_use
from qlora_storage.local_paths import read_regular

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from qlora_cli.kube.api_client import Object

OVER = ("Succeeded", "Failed")
UNCOUNTED = ("Preempted", "Suspended", "Paused", "NodeLost", "PeerLost")
"""Reasons of attempts that stopped without a failure of their own."""
NEEDS_ATTENTION = frozenset({"Unschedulable", "QuotaExceeded", "MissingReference", "ImageUnavailable", "Refused"})
"""Reasons of a waiting job that do not go away by waiting."""

UNSEEN = "no operator has processed the job yet"


@dataclass(frozen=True, slots=True)
class AttemptView:
    """One attempt."""

    number: int
    started: datetime | None
    ended: datetime | None
    reason: str
    message: str
    exit_code: int | None
    node: str
    first_step: int | None
    last_step: int | None
    batch: str
    ranks: int


@dataclass(frozen=True, slots=True)
class JobView:
    """One job, or one local run."""

    name: str
    namespace: str
    """Empty for a local run."""
    place: str
    """Argument that names the job in a command: its name, or the folder of a local run."""
    state: str
    reason: str
    message: str
    """Message of the condition that explains the job's state."""
    stage: str
    """Stage of Prepare or of an attempt, apart from training steps; empty while it trains, waits, or is over."""
    stage_start: datetime | None
    step: int | None
    total_steps: int | None
    epoch: str
    loss: str
    eval_loss: str
    best_eval_loss: str
    tokens_per_second: str
    eta_seconds: int | None
    restarts: int
    ranks: int
    peak_bytes: int | None
    created: datetime | None
    started: datetime | None
    ended: datetime | None
    attempts: tuple[AttemptView, ...]
    adapter: Mapping[str, str]
    """uri, manifestUri, manifestSha256; empty: none yet."""
    tasks: tuple[Mapping[str, Any], ...]
    """name, metric, base, adapter, standardError, examples of each task of spec.evaluate."""
    tracking: tuple[Mapping[str, str], ...]
    """type, url, message of the run in each tracking tool."""
    suspend: bool
    deleting: bool

    @property
    def is_finished(self) -> bool:
        return self.state in OVER

    @property
    def needs_attention(self) -> bool:
        return not self.is_finished and self.reason in NEEDS_ATTENTION

    @property
    def seconds(self) -> float | None:
        """Time over all attempts that have ended."""
        ended = [(a.ended - a.started).total_seconds() for a in self.attempts if a.started and a.ended]
        return sum(ended) if ended else None

    @property
    def rank_hours(self) -> float | None:
        """Hours of GPUs (or of CPU ranks) that ended attempts held."""
        ended = [(a.ended - a.started).total_seconds() * a.ranks for a in self.attempts if a.started and a.ended]
        return sum(ended) / 3600 if ended else None


def view(job: Object) -> JobView:
    """An API object, of this version or a later one."""
    meta, spec, status = job["metadata"], job.get("spec") or {}, job.get("status") or {}
    progress = status.get("progress") or {}
    parallelism = spec.get("parallelism") or {}
    state = status.get("state") or "Pending"
    return JobView(
        name=meta["name"],
        namespace=meta.get("namespace", ""),
        place=meta["name"],
        state=state,
        reason=status.get("reason") or "Pending",
        message=_message(status, state) if is_seen(job) else UNSEEN,
        **_stage(status),
        **_progress(progress),
        restarts=status.get("totalRestarts") or status.get("restarts") or 0,
        ranks=(parallelism.get("workers") or 1) * (parallelism.get("gpusPerWorker") or 1),
        peak_bytes=((status.get("memory") or {}).get("measured") or {}).get("peak"),
        created=time(meta.get("creationTimestamp")),
        started=time(status.get("startTime")),
        ended=time(status.get("completionTime")),
        attempts=tuple(_attempt(a) for a in status.get("attempts") or ()),
        adapter=status.get("adapter") or {},
        tasks=_tasks(status),
        tracking=tuple(status.get("tracking") or ()),
        suspend=bool(spec.get("suspend")),
        deleting="deletionTimestamp" in meta,
    )


def _tasks(found: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    tasks = found.get("tasks")
    return tuple(task for task in tasks if isinstance(task, dict)) if isinstance(tasks, list) else ()


def is_seen(job: Object) -> bool:
    """Return whether an operator has processed a job. Before, its status holds defaults alone."""
    return bool((job.get("status") or {}).get("conditions"))


def _message(status: Mapping[str, Any], state: str) -> str:
    """Return the message of the condition that stands for the job; of several, the newest that has one."""
    conditions = status.get("conditions") or ()
    own = [c.get("message", "") for c in conditions if c.get("type") == state and c.get("status") == "True"]
    if state == "Pending":
        own = [c.get("message", "") for c in conditions if c.get("reason") == status.get("reason")]
    return next((text for text in reversed(own) if text), "")


def _stage(status: Mapping[str, Any]) -> dict[str, Any]:
    stage = status.get("stage") or {}
    return {"stage": stage.get("name") or "", "stage_start": time(stage.get("startTime"))}


def _progress(progress: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "step": progress.get("step"),
        "total_steps": progress.get("totalSteps"),
        "epoch": progress.get("epoch") or "",
        "loss": progress.get("loss") or "",
        "eval_loss": progress.get("evalLoss") or "",
        "best_eval_loss": progress.get("bestEvalLoss") or "",
        "tokens_per_second": progress.get("tokensPerSecond") or "",
        "eta_seconds": progress.get("etaSeconds"),
    }


def _attempt(attempt: Mapping[str, Any]) -> AttemptView:
    micro, accumulation = attempt.get("microBatchSize"), attempt.get("gradientAccumulationSteps")
    world = attempt.get("worldSize") or 1
    return AttemptView(
        number=attempt.get("number") or 0,
        started=time(attempt.get("startTime")),
        ended=time(attempt.get("endTime")),
        reason=attempt.get("reason") or "",
        message=attempt.get("message") or "",
        exit_code=attempt.get("exitCode"),
        node=attempt.get("node") or "",
        first_step=attempt.get("firstStep"),
        last_step=attempt.get("lastStep"),
        batch=f"{micro} × {accumulation} × {world}",
        ranks=world,
    )


def time(text: str | None) -> datetime | None:
    """A timestamp of the API's, in UTC where it has no time zone; None where there is none or it is none."""
    try:
        found = datetime.fromisoformat(text) if text else None
    except ValueError:
        return None
    return found.replace(tzinfo=UTC) if found and found.tzinfo is None else found


# ----------------------------------------------------------------------------------------------------------- local runs


def read_run(folder: Path) -> Object:
    """``run.json`` of a local run.

    Raises:
        ClusterError: there is no run, or its record is damaged.

    """
    from qlora_api.errors import ManifestError, validate  # noqa: PLC0415 a cluster's jobs need no pydantic
    from qlora_cli.records.run_record import RecordedRun  # noqa: PLC0415

    path = folder / "run.json"
    try:
        record: Object = json.loads(read_regular(path))
        validate(RecordedRun, record)
    except (FileNotFoundError, NotADirectoryError):
        beside = sorted(str(p.parent) for p in folder.parent.glob("*/run.json"))
        there = f"; there are {', '.join(beside)}" if beside else ""
        raise ClusterError(f"{folder}: is no folder of a local run{there}") from None
    except OSError as error:
        raise ClusterError(f"{path}: cannot be read: {error.strerror}") from None
    except ManifestError as error:
        raise ClusterError(f"{path}: {error.errors[0]}") from None
    except (ValueError, RecursionError):
        raise ClusterError(f"{path}: is no JSON") from None
    return record


def local_runs(runs_dir: Path) -> list[Path]:
    """Folders of all local runs, those put aside left out."""
    return sorted(path.parent for path in runs_dir.glob("*/run.json") if ".old-" not in path.parent.name)


def view_damaged_run(folder: Path, error: ClusterError) -> JobView:
    """A local run whose record cannot be read, so that it is seen beside the others."""
    return replace(view_run(folder, {"name": folder.name}), state="Unknown", reason="Damaged", message=str(error))


def view_run(folder: Path, record: Object) -> JobView:
    """A local run, in the words of a job's status."""
    result = record.get("result") or {}
    attempts = tuple(_attempt(a) for a in record.get("attempts") or ())
    last = attempts[-1] if attempts else None
    state, reason, message = _local_state(folder, result, last)
    progress = _progress(result.get("progress") or {})
    if progress["step"] is None and last is not None:
        progress["step"] = last.last_step
    return JobView(
        name=record["name"],
        namespace="",
        place=str(folder),
        state=state,
        reason=reason,
        message=message,
        **_stage({}),
        **progress,
        restarts=sum(1 for a in attempts[:-1] if a.reason not in UNCOUNTED),
        ranks=last.ranks if last else 1,
        peak_bytes=((result.get("memory") or {}).get("measured") or {}).get("peak"),
        created=time(record.get("created")),
        started=attempts[0].started if attempts else None,
        ended=last.ended if last and state in OVER else None,
        attempts=attempts,
        adapter=result.get("adapter") or {},
        tasks=_tasks(result),
        tracking=tuple(result.get("tracking") or ()),
        suspend=False,
        deleting=False,
    )


def _local_state(folder: Path, result: Mapping[str, Any], last: AttemptView | None) -> tuple[str, str, str]:
    if result:
        return "Succeeded", "Completed", result.get("message") or ""
    if in_use(folder):
        return "Running", "Training" if last and last.ended is None else "Preparing", ""
    if last is None:
        return _prepare_state(folder)
    if last.ended is None:
        return "Suspended", "NodeLost", "'qlora run' or the machine went down; 'qlora run' goes on from a checkpoint"
    if last.reason in UNCOUNTED:
        return "Suspended", last.reason, last.message
    return "Failed", last.reason, last.message


def _prepare_state(folder: Path) -> tuple[str, str, str]:
    """State of a run without an attempt, by what its Prepare left when it ended."""
    try:
        left = json.loads(read_regular(folder / "prepare" / "termination.json"))
        failed = bool(left["exitCode"])
        reason, message = str(left["reason"]), str(left.get("message") or "")
    except (OSError, KeyError, TypeError, ValueError, RecursionError):
        return "Pending", "Pending", "no attempt yet"
    return ("Failed", reason, message) if failed else ("Pending", "Prepared", "no attempt yet")


# -------------------------------------------------------------------------------------------------------------- several


def in_order(views: Iterable[JobView]) -> list[JobView]:
    """Sort jobs: those that need a hand, then running, waiting and finished ones, the newest of each first."""
    rank = {"Running": 1, "Pending": 2, "Suspended": 3, "Failed": 4, "Succeeded": 5}

    def key(job: JobView) -> tuple[int, float, str]:
        when = job.ended if job.is_finished else job.created
        place = 0 if job.needs_attention else rank.get(job.state, 2)
        return place, -(when.timestamp() if when else 0), job.name

    return sorted(views, key=key)


def counted(views: Iterable[JobView]) -> str:
    """``3 Running, 1 Pending``."""
    counts: dict[str, int] = {}
    for job in in_order(views):
        counts[job.state] = counts.get(job.state, 0) + 1
    return ", ".join(f"{count} {state}" for state, count in counts.items())
