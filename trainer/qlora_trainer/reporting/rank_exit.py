"""End an attempt: an exit code, and a termination message that says why in one paragraph."""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import torch
import transformers

from qlora_api.contract import ExitCode, ProgressReport, TerminationMessage, TrainerConfig, reason_of
from qlora_api.status import Memory, MemoryComponent, Progress, Reason
from qlora_storage.errors import of_system
from qlora_trainer.errors import PreemptedError, StorageError, TrainerError
from qlora_trainer.liveness.heartbeat import Heartbeat, activity
from qlora_trainer.reporting import termination_message

log = logging.getLogger(__name__)


QUIET = ("bitsandbytes", "DeepSpeed", "transformers", "peft")
KNOWN_WARNINGS = (
    ".*is_gradient_checkpointing. is deprecated",  # peft 0.21 on transformers 5.23
    "Paged optimizers are not supported on CPU",  # said once by optim.make_optimizer
    "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter",  # merge_adapter unties it
)


def quiet_libraries() -> None:
    """Keep libraries' progress bars and notes out of a log that a person reads for this job's own lines."""
    for name in QUIET:
        logger = logging.getLogger(name)
        logger.setLevel(logging.ERROR)  # for its children
        logger.addFilter(lambda record: record.levelno >= logging.ERROR)  # for those that set a level when imported
    for message in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    transformers.utils.logging.disable_progress_bar()


@dataclass
class LastSeen:
    """Last known state of an attempt, for the message of a failure; filled in as soon as there is something to say."""

    report: Callable[[], ProgressReport] | None = None
    heartbeat: Heartbeat = field(default_factory=Heartbeat.of_this_rank)

    @staticmethod
    def peak_bytes() -> int:
        """Return the most memory this process has held: on a device if it has one, else on the host."""
        on_device: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return torch.cuda.max_memory_allocated() if on_device else getrusage(RUSAGE_SELF).ru_maxrss * 1024


def run_with_exit_code(config: TrainerConfig, work: Callable[[LastSeen], TerminationMessage | None]) -> int:
    """Run ``work``; turn its end, good or bad, into an exit code and a termination message."""
    seen = LastSeen()
    rank = os.environ.get("RANK", "0")
    level = logging.INFO if rank == "0" else logging.WARNING
    logging.basicConfig(
        level=level, format=f"%(asctime)s rank {rank} %(levelname)s %(message)s", stream=sys.stderr, force=True
    )
    quiet_libraries()
    try:
        message = work(seen)
    except PreemptedError as error:
        log.info("%s", error)
        return _leave(config, ExitCode(error.exit_code), str(error), rank, seen, error.reason)
    except TrainerError as error:
        log.error("%s", error)  # noqa: TRY400 one paragraph for a person; the trace would hide it
        return _leave(config, ExitCode(error.exit_code), str(error), rank, seen)
    except Exception as error:
        code = ExitCode.CRASHED
        if memory := _out_of_memory(error):
            log.exception("out of memory")
            return _leave(config, memory, _memory_message(memory, error, seen), rank, seen)
        if isinstance(full := of_system(error), StorageError):
            log.exception("a disk failed")
            return _leave(config, ExitCode(full.exit_code), str(full), rank, seen)
        if _is_stall(error):
            code = ExitCode.STALLED
        log.exception("the attempt ended")
        if code is ExitCode.CRASHED and (cause := _lost_peer(error)):
            return _leave(config, ExitCode.PEER_LOST, f"another rank is gone: {cause}", rank, seen)
        return _leave(config, code, f"{type(error).__name__}: {error}", rank, seen)
    if message is not None and rank == "0":
        termination_message.write(Path(config.termination_message_path), message)
    seen.heartbeat.done()
    return ExitCode.DONE


def progress_of(report: ProgressReport) -> Progress:
    """Return the part of a report that a job's status keeps."""
    return Progress(**{name: getattr(report, name) for name in Progress.model_fields})


def _out_of_memory(error: Exception) -> ExitCode | None:
    """Return the exit code for the memory that an allocation failed in; None for other errors.

    Allocations fail in PyTorch, in cuBLAS and in bitsandbytes, on the device and on the host, each with its own words.
    """
    text = str(error)
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return ExitCode.OUT_OF_HOST_MEMORY
    if "DefaultCPUAllocator" in text or "Cannot allocate memory" in text:
        return ExitCode.OUT_OF_HOST_MEMORY
    device = isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in text
    return ExitCode.OUT_OF_DEVICE_MEMORY if device or "out of memory" in text.lower() else None


def _memory_message(code: ExitCode, error: Exception, seen: LastSeen) -> str:
    """Describe where the memory ran out, and the peak of this rank."""
    kind = "device" if code is ExitCode.OUT_OF_DEVICE_MEMORY else "host"
    peak = seen.peak_bytes() / 2**30
    where = activity(seen.heartbeat.section, seen.heartbeat.step)
    reason = str(error).partition("\n")[0] or type(error).__name__
    return f"out of {kind} memory in {where}; the peak of this rank was {peak:.2f} GiB: {reason}"


def _is_stall(error: Exception) -> bool:
    """A collective that outlasted policy.stallTimeoutSeconds, in gloo's words or NCCL's."""
    return isinstance(error, RuntimeError) and "timed out" in str(error).lower()


BROKEN_CONNECTIONS = (
    "connection closed by peer",  # gloo: the other process has ended
    "connection reset by peer",
    "broken pipe",
    "connection refused",  # gloo, connecting to a rank that has ended already
    "connection was likely closed",  # TCPStore
    "remote process exited",  # NCCL's ncclRemoteError
)


def _lost_peer(error: Exception) -> str | None:
    """Return how a collective, or the store, noticed that its other end is gone; None where that is not what happened.

    Storage and the Hub raise other types than RuntimeError.
    """
    text = str(error).lower()
    return next((words for words in BROKEN_CONNECTIONS if isinstance(error, RuntimeError) and words in text), None)


def _leave(
    config: TrainerConfig, code: ExitCode, text: str, rank: str, seen: LastSeen, reason: Reason | None = None
) -> int:
    """Write the termination message unless another rank's says more already; the reason follows from the code."""
    report = seen.report() if seen.report else None
    measured = {**report.memory.measured, MemoryComponent.PEAK.value: seen.peak_bytes()} if report else None
    message = TerminationMessage(
        exit_code=code,
        reason=reason or reason_of(code),
        message=text,
        rank=int(rank),
        progress=progress_of(report) if report else None,
        first_step=report.first_step if report else None,
        compute_type=report.compute_type if report else None,
        memory=Memory(predicted=report.memory.predicted, measured=measured) if report and measured else None,
    )
    termination_message.write_unless_told(Path(config.termination_message_path), message)
    return code
