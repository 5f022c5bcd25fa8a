"""Prepare: everything that can be known without a GPU. ``python -m qlora_trainer.prepare CONFIG.json``

Fetches and checks the model and the rows, tokenizes once, finds out that the adapter's targets exist and that the
destination can be written, and plans the memory: a job that does not fit its GPU ends here. The result is
content-addressed: a second call finds it done, before anything large is imported. What it decided is in the
termination message; the last line on stdout is the :class:`~qlora_api.contract.PrepareReceipt` as JSON, without its
sample rows: more people may read a pod's log than the rows. The samples are in the cache, beside the tokenized rows.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from qlora_api.contract import ExitCode, PrepareReceipt, TerminationMessage, TrainerConfig, reason_of
from qlora_api.spec import TrainingSpec
from qlora_api.status import PrepareResult, Reason
from qlora_memory import Coverage, planned_coverage
from qlora_storage.destination_claim import claim_destination
from qlora_trainer.allocator import keep_freed_memory
from qlora_trainer.configuration import read_config
from qlora_trainer.errors import TrainerError, UserError, system_errors
from qlora_trainer.prepare.local_copy import bring_inputs
from qlora_trainer.prepare.plan_memory import Planned, plan_job
from qlora_trainer.prepare.records import Record, Records, find
from qlora_trainer.prepare.stage_progress import begin_stage, served_progress
from qlora_trainer.prepare.tolerance import check_tolerance
from qlora_trainer.publish.destination_release import release_after, released_after_errors
from qlora_trainer.publish.published_adapter import check_apart_from_inputs, check_destination
from qlora_trainer.python_process import forbid_inspection
from qlora_trainer.reporting import termination_message
from qlora_trainer.storage.authentication import Authenticator
from qlora_trainer.storage.credentials import take_credentials
from qlora_trainer.tracking.sinks import check_tracking

log = logging.getLogger(__name__)


def prepare(config: TrainerConfig) -> PrepareReceipt:
    """Check all that the ranks need, and leave the record of it; without a shared cache also what they need itself.

    Raises:
        UserError: names the field that must change.
        StorageError: a source, the destination or the shared cache is out of reach.

    """
    record = _again(config) or _anew(config)
    _decided(config, record)
    return record.receipt


def _again(config: TrainerConfig) -> Record | None:
    """Return what was found for the same content before; None where there is nothing, or it is damaged."""
    check_apart_from_inputs(config.spec)
    check_destination(config.spec.output.destination, config.job.uid, Authenticator.of(config))
    claim_destination(config.spec.output.destination, config.job)
    records = Records(config)
    if records.of_run() is None:  # later, a tool that is down does not keep the run from going on
        check_tracking(config)
    record = find(config, records)
    if record is None:
        return None
    record = records.begin(record)
    return record if records.is_shared or bring_inputs(config, record, records) else None


def _anew(config: TrainerConfig) -> Record:
    begin_stage("importing PyTorch and Transformers")
    from qlora_trainer.prepare.fetch_and_tokenize import prepare_from_scratch  # noqa: PLC0415 ten seconds of imports

    records = Records(config)
    record = records.keep(prepare_from_scratch(config, records.of_run()))
    if not records.is_shared:
        bring_inputs(config, record, records)
    return record


def _decided(config: TrainerConfig, record: Record) -> Planned:
    """Decide what follows from what was found, for this job: others may take more, or have other GPUs."""
    check_tolerance(config.spec.dataset.tolerance, record.receipt)
    planned = plan_job(config, record.shape, record.receipt)
    check_warmup(config.spec.training, steps_per_epoch(record.receipt, planned))
    return planned


def steps_per_epoch(receipt: PrepareReceipt, planned: Planned) -> int:
    return -(-receipt.train_sequences // planned.batch.global_batch_size)


def check_warmup(training: TrainingSpec, steps_of_an_epoch: int) -> None:
    """Refuse a run that ends before its learning rate has come up.

    Raises:
        UserError: the warmup is as long as the run; of ``maxSteps`` the manifest's own rule says so.

    """
    if training.epochs is None:
        return
    steps = training.epochs * steps_of_an_epoch
    if training.warmup_steps >= steps:
        raise UserError(
            "spec.training.warmupSteps",
            training.warmup_steps,
            f"must be less than the steps of the run, {steps}: {training.epochs} epochs of {steps_of_an_epoch}",
        )


def prepared_message(config: TrainerConfig, record: Record, covered: Coverage | None) -> TerminationMessage:
    """The termination message of a Prepare that found all well.

    Raises:
        UserError: more of the rows is lost than the job takes, it does not fit the GPU, or warms up for too long.

    """
    receipt = record.receipt
    planned = _decided(config, record)
    result = PrepareResult(
        quantized=covered.held if covered else "",
        adapted=covered.adapted if covered else "",
        model_revision=record.model_revision,
        data_hash=receipt.data_hash,
        train_rows=receipt.train_rows,
        train_tokens=receipt.train_tokens,
        train_sequences=receipt.train_sequences,
        steps_per_epoch=steps_per_epoch(receipt, planned),
        eval_rows=receipt.eval_rows,
        truncated=receipt.truncated,
        dropped=receipt.dropped,
        fully_masked=receipt.fully_masked,
        duplicates=receipt.duplicates,
        packing_efficiency=f"{receipt.packing_efficiency:.4f}",
        batch=planned.batch,
        gradient_checkpointing=planned.gradient_checkpointing,
        memory=planned.memory,
        expected_gpu_hours=None if planned.gpu_hours is None else f"{planned.gpu_hours:.3f}",
        seconds=f"{time.time() - psutil.Process().create_time():.1f}",
    )
    return TerminationMessage(exit_code=ExitCode.DONE, reason=Reason.COMPLETED, prepared=result)


def _coverage(config: TrainerConfig, record: Record) -> Coverage | None:
    """Return what will be quantized and adapted; None where the base's shape cannot be told."""
    spec = config.spec
    return planned_coverage(record.shape, spec.lora, spec.quantization) if record.shape else None


def _told(config: TrainerConfig, record: Record) -> TerminationMessage:
    covered = _coverage(config, record)
    message = prepared_message(config, record, covered)
    notes = [*record.receipt.notes, *(covered.notes if covered else ())]
    receipt = record.receipt.model_copy(update={"samples": [], "notes": notes})
    print(receipt.model_dump_json(by_alias=True))  # noqa: T201 the receipt is the output
    return message


def run_in_process(config: TrainerConfig, _: Path) -> int:
    """Do the work of a Prepare that found nothing, in this process; return the exit code."""
    from qlora_trainer.reporting.rank_exit import run_with_exit_code  # noqa: PLC0415 imports torch

    def work(_: object) -> TerminationMessage:
        with system_errors():
            return _told(config, _anew(config))

    return run_with_exit_code(config, work)


def main(anew: Callable[[TrainerConfig, Path], int] = run_in_process) -> int:
    """Prepare as the command line's configuration says.

    Args:
        anew: does what was not found done.

    """
    if sys.flags.isolated:
        forbid_inspection()
    path = Path(sys.argv[1])
    config = read_config(path)
    keep_freed_memory()
    with served_progress(config):
        return _run(config, path, anew)


def _run(config: TrainerConfig, path: Path, anew: Callable[[TrainerConfig, Path], int]) -> int:
    destination = config.spec.output.destination
    termination = Path(config.termination_message_path)
    try:
        take_credentials(config.spec, os.environ)
        with released_after_errors(destination, config.job):
            record = _again(config)
            message = _told(config, record) if record else None
    except TrainerError as error:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        log.error("%s", error)  # noqa: TRY400 one paragraph for a person; the trace would hide it
        code = error.exit_code
        termination_message.write(
            termination, TerminationMessage(exit_code=code, reason=reason_of(code), message=str(error))
        )
        return code
    if message is not None:
        termination_message.write(termination, message)
        return ExitCode.DONE
    code = anew(config, path)
    release_after(code, destination, config.job)
    return code
