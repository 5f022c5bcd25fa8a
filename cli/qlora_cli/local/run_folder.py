"""The folder of one local run: what is in it, and what it means for the next call.

::

    runs/<job name>/
    ├── run.json             RunRecord
    ├── key                  the run's own key, which signs its checkpoints and manifest; mode 0600
    ├── prepare/             config.json, log.txt, termination.json
    ├── attempt-1/           config.json, log.txt, termination.json, rank-0.port
    └── checkpoints/
    runs/.<job name>.lock    held while a run or its trainer lives
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal, TypeVar

from pydantic import Field, ValidationError

from qlora_api.base import Model, Timestamp
from qlora_api.contract import PrepareReceipt, TerminationMessage
from qlora_api.spec import ComputeType, QLoRAJobSpec
from qlora_api.status import Attempt, Count, Decimal, PrepareResult, Reason, Text
from qlora_cli.local.processes import is_alive
from qlora_storage.local_paths import open_regular, read_regular, write_whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path


RecordT = TypeVar("RecordT", bound=Model)

RUN_RECORD = "run.json"
SWEEP_RECORD = "sweep.json"
"""In a folder of 'qlora sweep'."""
KEY_BYTES = 32
PUBLISHING = ("output",)
"""Groups that may change for as long as nothing is published: checkpoints of local runs do not depend on them."""


class RunError(ValueError):
    """A run that cannot start or go on; ``str()`` says what to do."""


class RunRecord(Model):
    """``run.json``: all that is known of a run."""

    name: str
    uid: str
    created: Timestamp
    spec: QLoRAJobSpec
    immutable_hash: str
    device: Literal["CUDA", "CPU"] = "CPU"
    """Device of the newest attempt."""
    attempts: list[Attempt] = []
    receipt: PrepareReceipt | None = None
    prepared: PrepareResult | None = None
    """Result of the newest Prepare: settings of an attempt that starts without a checkpoint."""
    first_eval_loss: Decimal | None = None
    """Before the first step."""
    tokens: dict[int, Count] = Field({})
    """Real tokens of each attempt, over all ranks, as last heard: of a short one, those of its first steps."""
    section_seconds: dict[int, dict[str, float]] = {}
    """Time of rank 0 in each attempt by section, as last heard."""
    result: TerminationMessage | None = None
    """The termination message of the attempt that completed the run."""
    pause_at_step: int | None = None
    """Step at which a sweep suspends the run, to compare it with others."""
    failure: Text = ""
    """Reason why the newest call ended without an adapter; empty if another call can resume it, or if it was
    stopped."""
    signed: bool = False
    """True if the run has had a key since its first attempt; runs of earlier versions have not."""

    @property
    def finished(self) -> bool:
        return self.result is not None

    @property
    def tokens_trained(self) -> int:
        """As the end of the run reports them, with the adapter; before, as each attempt was last heard."""
        known = self.result.tokens if self.result else None
        return sum(self.tokens.values()) if known is None else known

    def with_attempt(self, attempt: Attempt) -> RunRecord:
        """Add an attempt, or put it in the place of the one with its number."""
        others = [a for a in self.attempts if a.number != attempt.number]
        return self.model_copy(update={"attempts": [*others, attempt]})


def read_record_file(path: Path, kind: type[RecordT]) -> RecordT | None:
    """Return the record in a file; None where there is no such file, or its folder is a file itself.

    Raises:
        RunError: the record is damaged.
        OSError: the file cannot be read, or is no record by its kind or size.

    """
    try:
        return kind.model_validate_json(read_regular(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RunError(f"{path} cannot be understood ({where}: {first['msg']}); --fresh starts anew") from None


@dataclass(frozen=True)
class RunFolder:
    """Layout of a run's folder."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def prepare(self) -> ProcessFiles:
        return ProcessFiles(self.path / "prepare")

    def attempt(self, number: int) -> ProcessFiles:
        return ProcessFiles(self.path / f"attempt-{number}")

    def read(self) -> RunRecord | None:
        """Return the record; None where there is no run.

        Raises:
            RunError: the record is damaged.

        """
        return read_record_file(self.path / RUN_RECORD, RunRecord)

    def write(self, record: RunRecord) -> None:
        """Replace the record as a whole, so that a crash leaves the old one or the new one."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.path / RUN_RECORD, record.model_dump_json(by_alias=True, exclude_none=True, indent=1))

    def key_file(self, record: RunRecord) -> Path:
        """Return the file with the run's key; make it where there is none yet.

        Raises:
            RunError: it is gone, and what the run has left was signed with it.

        """
        path = self.path / "key"
        if not path.exists():
            if record.signed and record.attempts:
                raise RunError(
                    f"{path} is gone: without this key the run's own checkpoints cannot be told from others; "
                    "put it back, or start anew with --fresh"
                )
            self.path.mkdir(parents=True, exist_ok=True)
            write_whole(path, f"{secrets.token_hex(KEY_BYTES)}\n", mode=0o600)
        return path

    def require_not(self, record: str, kind: str) -> None:
        """Check that the folder is not one of another kind, which has a record of its own.

        Raises:
            RunError: it is.

        """
        if (self.path / record).exists():
            raise RunError(f"{self.path} holds {kind} of this name: use another metadata.name, or another --runs-dir")

    def has_checkpoints(self) -> bool:
        return self.checkpoints.is_dir() and any(self.checkpoints.iterdir())

    def move_aside(self, now: datetime) -> Path:
        """Give the folder another name; nothing is deleted."""
        stamp = now.strftime("%Y%m%d-%H%M%S")
        target = self.path.with_name(f"{self.path.name}.old-{stamp}")
        count = 1
        while target.exists():
            count += 1
            target = self.path.with_name(f"{self.path.name}.old-{stamp}-{count}")
        return self.path.rename(target)


@dataclass(frozen=True)
class ProcessFiles:
    """The files of one process: Prepare, or an attempt."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def termination(self) -> Path:
        return self.path / "termination.json"

    def begin(self, config: str) -> None:
        """Write the config; what an earlier try left must not be taken for this one's."""
        self.path.mkdir(parents=True, exist_ok=True)
        for stale in (self.termination, self.log, *self.path.glob("rank-*.port")):
            stale.unlink(missing_ok=True)
        write_whole(self.config, config)

    def termination_message(self) -> TerminationMessage | None:
        """Return the termination message; None where the process left none that can be read."""
        try:
            return TerminationMessage.model_validate_json(read_regular(self.termination))
        except (OSError, ValidationError):
            return None

    def log_tail(self, lines: int) -> list[str]:
        """Return the last lines of the log, from its last 64 KiB."""
        try:
            with open_regular(self.log) as log:
                log.seek(max(0, self.log.stat().st_size - 65536))
                return log.read().decode(errors="replace").splitlines()[-lines:]
        except OSError:
            return []


# ------------------------------------------------------------------------------------------------------------ decisions


@dataclass(frozen=True)
class Change:
    """A field that may not change and did."""

    field: str
    old: object
    new: object

    def __str__(self) -> str:
        return f"{self.field}: {_show(self.old)} → {_show(self.new)}"


@dataclass(frozen=True)
class StartNew:
    """Start a new run; a folder that is there is put aside."""


@dataclass(frozen=True)
class ResumeRun:
    record: RunRecord


@dataclass(frozen=True)
class AlreadyFinished:
    record: RunRecord


@dataclass(frozen=True)
class Refuse:
    """The run there is another one."""

    changes: tuple[Change, ...]


def opening(
    record: RunRecord | None, spec: QLoRAJobSpec, *, trained: bool
) -> StartNew | ResumeRun | AlreadyFinished | Refuse:
    """Decide what a call goes on with. ``trained``: there is something to lose, a step taken or a checkpoint."""
    if record is None:
        return StartNew()
    if trained:
        spec = with_recorded_compute_type(record.spec, spec)
    changed = changes(record.spec, spec, spec.immutable) if immutable_hash(spec) != record.immutable_hash else ()
    if record.finished:  # until then, where and how it is published may change
        changed += changes(record.spec, spec, PUBLISHING)
    if changed and trained:
        return Refuse(changed)
    if changed and record.attempts:
        return StartNew()
    if record.finished:
        return AlreadyFinished(record)
    return ResumeRun(record.model_copy(update={"spec": spec, "immutable_hash": immutable_hash(spec)}))


def with_recorded_compute_type(began: QLoRAJobSpec, spec: QLoRAJobSpec) -> QLoRAJobSpec:
    """Return ``spec`` with the compute type that a run began with where the manifest leaves it to the device.

    Versions before ``Auto`` recorded their default, BFloat16, for a manifest that names none.
    """
    if spec.quantization.compute_type is not ComputeType.AUTO:
        return spec
    kept = spec.quantization.model_copy(update={"compute_type": began.quantization.compute_type})
    return spec.model_copy(update={"quantization": kept})


def new_record(name: str, spec: QLoRAJobSpec, now: datetime) -> RunRecord:
    return RunRecord(
        name=name, uid=str(uuid.uuid4()), created=now, spec=spec, immutable_hash=immutable_hash(spec), signed=True
    )


def seconds_of(attempt: Attempt) -> float:
    """Return how long an attempt took; 0 while it has not ended."""
    return (attempt.end_time - attempt.start_time).total_seconds() if attempt.end_time else 0.0


def close_orphaned_attempt(record: RunRecord, termination: TerminationMessage | None, ended: datetime) -> RunRecord:
    """End the attempt that nobody saw end: 'qlora run' itself was killed, or the machine went down.

    Its trainer may have gone on alone and left a termination message; then that counts.
    """
    attempt = record.attempts[-1]
    if termination is None:
        lost = "'qlora run' or the machine went down during this attempt"
        return record.with_attempt(
            attempt.model_copy(update={"end_time": ended, "reason": Reason.NODE_LOST, "message": lost})
        )
    step = termination.progress.step if termination.progress else attempt.last_step
    update = {
        "end_time": ended,
        "reason": termination.reason,
        "message": termination.message,
        "exit_code": termination.exit_code,
        "last_step": step,
    }
    record = record.with_attempt(attempt.model_copy(update=update))
    return record.model_copy(update={"result": termination}) if termination.reason is Reason.COMPLETED else record


def trained(record: RunRecord | None) -> bool:
    return record is not None and (record.finished or any(a.last_step for a in record.attempts))


def immutable_hash(spec: QLoRAJobSpec) -> str:
    """SHA-256 of the groups that may not change."""
    plain = spec.to_json_dict()
    groups = {name: plain.get(name) for name in sorted(spec.immutable)}
    return hashlib.sha256(json.dumps(groups, sort_keys=True).encode()).hexdigest()


def changes(old: Model, new: Model, groups: Iterable[str]) -> tuple[Change, ...]:
    """Fields of some groups that differ."""
    before, after = _flat(old, groups), _flat(new, groups)
    return tuple(
        Change(f"spec.{field}", before.get(field), after.get(field))
        for field in sorted(before.keys() | after.keys())
        if before.get(field) != after.get(field)
    )


def _flat(spec: Model, groups: Iterable[str]) -> dict[str, object]:
    flat: dict[str, object] = {}

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(f"{prefix}.{name}", inner)
        else:
            flat[prefix] = value

    plain = spec.to_json_dict()
    for group in groups:
        walk(group, plain.get(group))
    return flat


def _show(value: object) -> str:
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)


# ------------------------------------------------------------------------------------------------------------ the lock


@dataclass(frozen=True)
class Lock:
    """Held as long as this process, or a trainer that it handed ``descriptor`` to, lives."""

    descriptor: int

    def name_holders(self, *pids: int) -> None:
        """Leave word of who holds it."""
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, " ".join(str(pid) for pid in pids).encode(), 0)

    def holders(self) -> list[int]:
        """Return the processes that are named."""
        return [int(pid) for pid in os.pread(self.descriptor, 64, 0).split() if pid.isdigit()]


@contextmanager
def locked(runs: Path, name: str) -> Iterator[Lock]:
    """Keep every other 'qlora run' away from a run.

    Raises:
        RunError: it is in use; names the process.

    """
    runs.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(runs / f".{name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(_in_use(runs / name, os.pread(descriptor, 64, 0).decode(errors="replace"))) from None
        lock = Lock(descriptor)
        lock.name_holders(os.getpid())
        try:
            yield lock
        finally:
            lock.name_holders(*(pid for pid in lock.holders() if pid != os.getpid()))
    finally:
        os.close(descriptor)


def _in_use(folder: Path, holders: str) -> str:
    alive = [pid for pid in holders.split() if pid.isdecimal() and is_alive(int(pid))]
    who = f" by process {alive[0]}; 'kill {alive[0]}' stops it with a checkpoint" if alive else ""
    return f"{folder} is in use{who}"


def now() -> datetime:
    return datetime.now(UTC)
