"""Prepare once, then run attempts until the run ends, as the operator does with pods.

``qlora_api.lifecycle`` decides what follows an attempt, here and in the operator.
"""

from __future__ import annotations

import math
import platform
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from qlora_api.batch import BatchSplit, split_batch
from qlora_api.contract import ExitCode, JobRef, PrepareReceipt, TerminationMessage, TrainerConfig, reason_of
from qlora_api.lifecycle import FinishJob, after_attempt, restarts
from qlora_api.memory_fallback import Choice
from qlora_api.status import Attempt, Reason
from qlora_cli.kube.target import program
from qlora_cli.local import local_spec, run_folder, run_view
from qlora_cli.local.prepare_view import PrepareDisplay
from qlora_cli.local.progress_view import Poller, Watcher, display_for
from qlora_cli.local.trainer_process import TAIL_LINES, StopSignal, TrainerProcess, shell_code, watch
from qlora_cli.text.paragraphs import Paragraph

if TYPE_CHECKING:
    from datetime import datetime

    from rich.console import Console

    from qlora_api.contract import ProgressReport
    from qlora_api.job import QLoRAJob
    from qlora_cli.local.machine import World
    from qlora_cli.local.run_folder import Lock, ProcessFiles, RunFolder, RunRecord
    from qlora_cli.local.trainer_process import Commands, StopRequests

INTERRUPTED = 130
"""128 + SIGINT, as shells count."""
PAUSED = int(ExitCode.PREEMPTED)
"""The run has reached the step at which its job, or a sweep, suspends it."""
PAUSE_HINT = "With a larger spec.policy.pauseAtStep, or none, the same command resumes this run."


@dataclass(frozen=True)
class AttemptSettings:
    """Settings that are the same for all attempts of one call."""

    job: QLoRAJob
    world: World
    folder: RunFolder
    cache_dir: Path
    commands: Commands
    lock: Lock
    console: Console
    seconds: float = math.inf
    """Time that attempts may take in this call; when it is used up, the run is checkpointed and stopped."""
    brief: bool = False
    """Show progress and failures alone, not what Prepare found and what was published."""


@dataclass(frozen=True)
class ProcessEnd:
    """Result of a trainer process: exit code, signal sent, and what it reported."""

    code: int
    stopped: StopSignal
    termination_message: TerminationMessage | None
    report: ProgressReport | None


class LocalRun:
    """One call of 'qlora run': continues from ``record`` until the run ends or is told to stop."""

    def __init__(self, setting: AttemptSettings, record: RunRecord, stop: StopRequests) -> None:
        self.record = record
        self._setting = setting
        self._stop = stop
        self._call_began_at = len(record.attempts)

    def run(self) -> int:
        """Prepare and train; return the exit code of the call."""
        code = self._prepare()
        while code is None:
            code = self._attempt()
        return code

    def _prepare(self) -> int | None:
        """Check the rows before any rank starts; return None on success, else the exit code of the call."""
        console, step = self._setting.console, self._setting.folder.prepare
        out = step.path / "out.txt"
        step.begin(
            self._config(step, next_choice(self._setting, self.record)).model_dump_json(
                by_alias=True, exclude_none=True
            )
        )
        out.unlink(missing_ok=True)
        with PrepareDisplay(console, step.log) as display:
            process = TrainerProcess(
                [*self._setting.commands.prepare, str(step.config)], step.log, self._setting.lock, out
            )
            code, stopped = watch(process, self._stop, console.print, display.tick)
        if stopped is not StopSignal.NONE:
            return self._interrupted()
        if code != ExitCode.DONE:
            return self._failed(step, None, shell_code(code))
        try:
            receipt = PrepareReceipt.model_validate_json(out.read_text(encoding="utf-8").rstrip().rsplit("\n", 1)[-1])
        except ValidationError as error:
            raise run_folder.RunError(f"{out}: its last line is no receipt: {error.errors()[0]['msg']}") from None
        receipt = with_samples(receipt, self._setting.cache_dir)
        refuse_other_rows(self.record, receipt, trained=self._trained())
        termination = step.termination_message()
        prepared = termination.prepared if termination else None
        self._keep(self.record.model_copy(update={"receipt": receipt, "prepared": prepared}))
        if not self._setting.brief:
            console.print(Paragraph(display.summary()), crop=False)
            console.print(run_view.receipt(receipt, None if self.record.attempts else prepared), crop=False)
        return None

    def _attempt(self) -> int | None:
        """Run one attempt; return None if another one follows, else the exit code of the call."""
        choice = next_choice(self._setting, self.record)
        batch = choice.batch
        attempt = Attempt(
            number=len(self.record.attempts) + 1,
            world_size=batch.world_size,
            micro_batch_size=batch.micro_batch_size,
            gradient_accumulation_steps=batch.gradient_accumulation_steps,
            gradient_checkpointing=choice.gradient_checkpointing,
            start_time=run_folder.now(),
            node=platform.node(),
        )
        step = self._setting.folder.attempt(attempt.number)
        step.begin(self._config(step, choice).model_dump_json(by_alias=True, exclude_none=True))
        self._keep(self.record.with_attempt(attempt).model_copy(update={"failure": ""}))
        ended = self._train(attempt.number, step)
        attempt = close_attempt(attempt, ended, step.log, run_folder.now(), self._pause_at_step)
        record = self.record.with_attempt(attempt)
        if attempt.reason is Reason.COMPLETED:
            termination = ended.termination_message or TerminationMessage(
                exit_code=ExitCode.DONE, reason=Reason.COMPLETED
            )
            record = record.model_copy(update={"result": termination})
        self._keep(record)
        return self._after(step, attempt, ended)

    def _train(self, number: int, step: ProcessFiles) -> ProcessEnd:
        setting = self._setting
        poller = Poller(step.path)
        stop_at = time.monotonic() + self._seconds_left()
        try:
            with display_for(setting.console, number, setting.world.device) as display:
                watcher = Watcher(poller, display, setting.job.spec.training.evaluation.every_steps)
                process = TrainerProcess([*setting.commands.train, str(step.config)], step.log, setting.lock)
                code, stopped = watch(process, self._stop, display.say, lambda: self._tick(watcher, stop_at))
        finally:
            poller.close()
        last = watcher.last
        update: dict[str, object] = {}
        if last:
            update["tokens"] = {**self.record.tokens, number: last.tokens}
            update["section_seconds"] = {**self.record.section_seconds, number: last.section_seconds}
        if self.record.first_eval_loss is None:
            update["first_eval_loss"] = watcher.first_eval_loss
        self.record = self.record.model_copy(update=update)
        return ProcessEnd(code, stopped, step.termination_message(), last)

    def _tick(self, watcher: Watcher, stop_at: float) -> None:
        """Poll, and ask for a stop while there is time left for a last step and a checkpoint."""
        watcher.tick()
        last = watcher.last
        to_stop = last.longest_step_seconds + last.longest_save_seconds if last else 0.0
        if time.monotonic() + to_stop >= stop_at:
            self._stop.over_budget = True

    def _seconds_left(self) -> float:
        """Return the time left for attempts: Prepare and the waits between attempts take none of it."""
        return self._setting.seconds - sum(map(run_folder.seconds_of, self.record.attempts[self._call_began_at :]))

    def _after(self, step: ProcessFiles, attempt: Attempt, ended: ProcessEnd) -> int | None:
        """Decide what follows an attempt; None for another attempt."""
        console, policy = self._setting.console, self._setting.job.spec.policy
        if attempt.reason is Reason.SUSPENDED:
            if not self._setting.brief:
                console.print(f"{attempt.message}. {PAUSE_HINT}", style="bold", soft_wrap=True)
            return PAUSED
        # Who types the command again has looked at what happened: each call has its own restarts.
        decision = after_attempt(policy, self.record.attempts[self._call_began_at :])
        if isinstance(decision, FinishJob):
            if decision.succeeded:
                if not self._setting.brief:
                    console.print(run_view.result(self.record, next_commands(self._setting.folder.path)), crop=False)
                return int(ExitCode.DONE)
            return self._failed(step, ended.termination_message, shell_code(ended.code), decision.message, attempt)
        if self._seconds_left() <= 0:
            self._stop.over_budget = True
        if ended.stopped is not StopSignal.NONE or self._stop.over_budget:
            return self._interrupted(attempt)
        console.print(run_view.retry(attempt, decision), soft_wrap=True)
        self._stop.wait(decision.wait_seconds)
        return self._interrupted(attempt) if self._stop.asked else None

    # ------------------------------------------------------------------------------------------------------ smaller

    def _config(self, step: ProcessFiles, choice: Choice) -> TrainerConfig:
        job, world = self._setting.job, self._setting.world
        return TrainerConfig(
            job=JobRef(name=job.metadata.name, namespace=job.metadata.namespace, uid=self.record.uid),
            spec=job.spec,
            attempt=len(self.record.attempts) + 1,
            restarts=restarts(self.record.attempts),
            batch=choice.batch,
            device=world.device,
            ranks_per_worker=world.ranks,
            pause_at_step=self._pause_at_step,
            key_file=str(self._setting.folder.key_file(self.record)),
            accepts_unsigned=not self.record.signed,
            gradient_checkpointing=choice.gradient_checkpointing,
            gpu=world.gpu,
            checkpoint_uri=str(self._setting.folder.checkpoints),
            cache_dir=str(self._setting.cache_dir),
            termination_message_path=str(step.termination),
            metrics_port=0,
            metrics_host="127.0.0.1",
            ports_dir=str(step.path),
        )

    @property
    def _pause_at_step(self) -> int | None:
        """Return the step at which an attempt is to pause: a sweep's, else the job's own."""
        policy = self._setting.job.spec.policy
        return self.record.pause_at_step if self.record.pause_at_step is not None else policy.pause_at_step

    def _keep(self, record: RunRecord) -> None:
        self.record = record
        self._setting.folder.write(record)

    def _trained(self) -> bool:
        return run_folder.trained(self.record) or self._setting.folder.has_checkpoints()

    def _interrupted(self, attempt: Attempt | None = None) -> int:
        how = attempt.message[:1].upper() + attempt.message[1:] if attempt else "Stopped"
        self._setting.console.print(f"{how}. The same command resumes this run.", style="bold", soft_wrap=True)
        return INTERRUPTED

    def _failed(
        self,
        step: ProcessFiles,
        termination: TerminationMessage | None,
        code: int,
        message: str = "",
        last: Attempt | None = None,
    ) -> int:
        termination = termination or step.termination_message()
        message = message or (
            termination.message
            if termination
            else f"Prepare ended with exit code {code} and left no termination message"
        )
        self._keep(self.record.model_copy(update={"failure": message}))
        tail = [] if termination else step.log_tail(TAIL_LINES)
        self._setting.console.print(
            run_view.failure(reason_of(code) if termination is None else termination.reason, message, tail, step.log),
            crop=False,
        )
        if last is not None:
            self._setting.console.print(run_view.attempts(self.record.attempts))
        return code


# ------------------------------------------------------------------------------------------------------------ decisions


def next_choice(setting: AttemptSettings, record: RunRecord) -> Choice:
    """Return the settings of the next attempt: as decided after the last one, unless the ranks are other ones."""
    if not record.attempts or record.attempts[-1].world_size != setting.world.ranks:
        planned = record.prepared
        if planned and planned.batch.world_size == setting.world.ranks:
            return Choice(planned.batch, planned.gradient_checkpointing)
        batch = split_batch(setting.job.spec, setting.world.ranks)
        return Choice(batch, local_spec.checkpoints_gradients(setting.job.spec, setting.world))
    last = record.attempts[-1]
    decision = after_attempt(setting.job.spec.policy, record.attempts)
    if not isinstance(decision, FinishJob):
        return Choice(decision.batch, decision.gradient_checkpointing)
    batch = BatchSplit(
        world_size=last.world_size,
        micro_batch_size=last.micro_batch_size,
        gradient_accumulation_steps=last.gradient_accumulation_steps,
    )
    return Choice(batch, last.gradient_checkpointing)


def close_attempt(
    attempt: Attempt, ended: ProcessEnd, log: Path, now: datetime, pause_at_step: int | None = None
) -> Attempt:
    """Return the attempt with its end."""
    code = shell_code(ended.code)
    reason = reason_of(code)
    termination, report = ended.termination_message, ended.report
    message = (
        termination.message
        if termination
        else f"The trainer ended with exit code {code} and left no termination message; see {log}"
    )
    if ended.stopped is StopSignal.KILLED and reason is not Reason.COMPLETED:
        reason, message = Reason.PREEMPTED, "killed by a second Ctrl-C, without a checkpoint"
    elif ended.stopped is StopSignal.ASKED and code == shell_code(-signal.SIGTERM):  # before it could catch the signal
        reason, message = Reason.PREEMPTED, "stopped before it had anything to checkpoint"
    saved = termination.progress if termination and ended.stopped is not StopSignal.KILLED else None
    if reason is Reason.PREEMPTED and saved and pause_at_step is not None and saved.step >= pause_at_step:
        reason = Reason.SUSPENDED
    progress = termination.progress if termination and termination.progress else report
    first = report.first_step if report else None
    return attempt.model_copy(
        update={
            "end_time": now,
            "reason": reason,
            "message": message if reason is not Reason.COMPLETED or termination else "",
            "exit_code": code,
            "compute_type": (termination and termination.compute_type) or (report and report.compute_type),
            "first_step": first if termination is None or termination.first_step is None else termination.first_step,
            "last_step": progress.step if progress else None,
        }
    )


def with_samples(receipt: PrepareReceipt, cache: Path) -> PrepareReceipt:
    """Add the sample rows, which Prepare leaves in the cache and does not print."""
    try:
        kept = PrepareReceipt.model_validate_json((cache / "data" / receipt.data_hash / "receipt.json").read_bytes())
    except (OSError, ValidationError):
        return receipt
    return receipt.model_copy(update={"samples": kept.samples})


def refuse_other_rows(record: RunRecord, found: PrepareReceipt, *, trained: bool) -> None:
    """A resumed run must see the rows it began with.

    Raises:
        RunError: the rows behind the same path are other ones.

    """
    if trained and record.receipt and record.receipt.data_hash != found.data_hash:
        raise run_folder.RunError(
            f"the rows have changed since run {record.uid[:8]} began (data {record.receipt.data_hash[:12]} →"
            f" {found.data_hash[:12]}), and a resumed run must match its checkpoint; put the rows back,"
            f" use another metadata.name, or --fresh"
        )


def next_commands(folder: Path) -> list[str]:
    """Return the commands to use with an adapter."""
    where = "" if folder.parent == Path("runs").absolute() else f" --runs-dir {folder.parent}"
    return [f'{program()} generate --run {folder.name}{where} --prompt "…"']
