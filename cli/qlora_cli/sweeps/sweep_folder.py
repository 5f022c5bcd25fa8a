"""The folder of one sweep, and what its trials tell.

::

    runs/<sweep>/
    ├── sweep.json           SweepRecord
    └── trials/
        ├── <sweep>-0/       a run, as of 'qlora run'
        └── <sweep>-1/
    runs/.<sweep>.lock       held while 'qlora sweep' lives
"""

from __future__ import annotations

import glob
import re
import uuid
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from qlora_api.base import Model, Timestamp
from qlora_api.status import Reason
from qlora_api.sweep.parameters import text_of
from qlora_api.sweep.spec import QLoRASweepSpec
from qlora_api.sweep.trials import TRIALS_FOLDER, Trial, TrialState, trial_name
from qlora_cli.local import run_folder
from qlora_cli.local.run import read_record
from qlora_cli.local.run_folder import RunError, RunFolder, RunRecord, read_record_file
from qlora_storage.local_paths import write_whole
from qlora_sweep.results import objective_value

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from qlora_api.contract import TerminationMessage
    from qlora_api.sweep.spec import ObjectiveMetric

NUMBER = re.compile(r"0|[1-9][0-9]*")
"""Number of a trial in the name of its folder: demo-01 is no second folder of demo-1."""
FIXED = ("template", "parameters", "algorithm", "objective", "earlyStopping")
"""Groups that may not change: trials of other settings cannot be compared. Limits and the budget may."""


class SweepRecord(Model):
    """``sweep.json``: what a sweep began with. All else is in its trials."""

    name: str
    uid: str
    created: Timestamp
    spec: QLoRASweepSpec
    """With the paths of this machine."""


@dataclass(frozen=True)
class SweepFolder:
    """Layout of a sweep's folder."""

    path: Path

    @property
    def trials(self) -> Path:
        return self.path / TRIALS_FOLDER

    def trial(self, number: int) -> RunFolder:
        return RunFolder(self.trials / trial_name(self.path.name, number))

    def runs(self) -> Iterator[tuple[int, RunFolder, RunRecord]]:
        """Yield the trials that there are, by number, those beyond a ``maxTrials`` that was lowered later too."""
        prefix = trial_name(self.path.name, 0).removesuffix("0")
        numbers = (path.name.removeprefix(prefix) for path in self.trials.glob(f"{glob.escape(prefix)}*"))
        for number in sorted(int(text) for text in numbers if NUMBER.fullmatch(text)):
            if (record := read_record(self.trial(number))) is not None:
                yield number, self.trial(number), record

    def read(self) -> SweepRecord | None:
        """Return the record; None where there is no sweep.

        Raises:
            RunError: the record is damaged.

        """
        return read_record_file(self.path / run_folder.SWEEP_RECORD, SweepRecord)

    def write(self, record: SweepRecord) -> None:
        """Replace the record as a whole."""
        self.path.mkdir(parents=True, exist_ok=True)
        text = record.model_dump_json(by_alias=True, exclude_none=True, indent=1)
        write_whole(self.path / run_folder.SWEEP_RECORD, text)

    def move_aside(self, now: datetime) -> Path:
        return RunFolder(self.path).move_aside(now)


def new_record(name: str, spec: QLoRASweepSpec, now: datetime) -> SweepRecord:
    return SweepRecord(name=name, uid=str(uuid.uuid4()), created=now, spec=spec)


def resumed(folder: SweepFolder, record: SweepRecord, spec: QLoRASweepSpec) -> SweepRecord:
    """Return the record with what may change as it is now.

    Raises:
        RunError: the folder has the trials of another sweep.

    """
    fixed = [*FIXED, *(["maxTrials"] if spec.early_stopping else [])]  # how many go on depends on how many there are
    changed = run_folder.changes(record.spec, spec, fixed)
    if changed:
        lines = "\n".join(f"  {change}" for change in changed)
        raise RunError(
            f"{folder.path} holds a sweep of another spec, and its trials cannot be compared with others:\n{lines}\n"
            "Use another metadata.name, or --fresh to put that sweep aside and start anew."
        )
    return record.model_copy(update={"spec": spec})


# -------------------------------------------------------------------------------------------------------------- trials


def read_trials(folder: SweepFolder, spec: QLoRASweepSpec) -> list[Trial]:
    """Return the trials that there are, by number; none of them runs while a sweep reads them."""
    return [trial_of(number, record, spec, last_message(run, record)) for number, run, record in folder.runs()]


def last_message(run: RunFolder, record: RunRecord) -> TerminationMessage | None:
    """Return the termination message of a run's newest attempt."""
    if record.result is not None:
        return record.result
    return run.attempt(record.attempts[-1].number).termination_message() if record.attempts else None


def values_by_step(run: RunFolder, record: RunRecord, metric: ObjectiveMetric) -> dict[int, float]:
    """Return the objective at each step at which an attempt of a run ended."""
    found = {}
    for attempt in record.attempts:
        message = run.attempt(attempt.number).termination_message()
        value = _value(metric, message)
        if value is not None and message and message.progress:
            found[message.progress.step] = float(value)
    return found


def trial_of(number: int, record: RunRecord, spec: QLoRASweepSpec, message: TerminationMessage | None) -> Trial:
    """Return what a run tells of its trial."""
    state = TrialState.FAILED if record.failure else TrialState.SUSPENDED
    step = max((attempt.last_step or 0 for attempt in record.attempts), default=0)
    paused = bool(record.attempts) and record.attempts[-1].reason is Reason.SUSPENDED
    if record.pause_at_step is not None and not paused and not record.finished:
        step = min(step, record.pause_at_step - 1)  # an attempt without its last checkpoint has no value to compare
    return Trial(
        number=number,
        name=record.name,
        parameters={parameter.path: text_of(record.spec.at(parameter.path)) for parameter in spec.parameters},
        state=TrialState.SUCCEEDED if record.finished else state,
        pause_at_step=record.pause_at_step,
        step=step,
        value=_value(spec.objective.metric, message),
        gpu_seconds=gpu_seconds(record),
        message=record.failure[:4096],
        adapter=record.result.adapter if record.result else None,
    )


def gpu_seconds(record: RunRecord) -> int:
    """Return the time of all ranks over all attempts that have ended."""
    return round(sum(run_folder.seconds_of(attempt) * attempt.world_size for attempt in record.attempts))


def _value(metric: ObjectiveMetric, message: TerminationMessage | None) -> str | None:
    return objective_value(metric, message.progress, message.memory) if message else None
