"""The ranks of one worker: started under torchrun's agent, watched, and ended when it is no use to wait for them.

torchrun itself answers 1 whatever happened; its library tells which rank ended first, and how.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from qlora_api.contract import ExitCode, TerminationMessage, TrainerConfig, reason_of
from qlora_trainer import heartbeat, last_word
from qlora_trainer.cgroup import MemoryCgroup, OomWatch
from qlora_trainer.peers import Meeting, Place, meet
from qlora_trainer.stop import Stop, child_processes
from qlora_trainer.watchdog import Limits, Watchdog, process_state, words

PEER_SECONDS = 30
"""When a rank or a worker has failed, the ranks that depend on it get this long to notice before they are killed."""
WATCH_SECONDS = 1.0
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """The ranks here must end: why, and how long they may take to do so by themselves."""

    code: ExitCode
    text: str
    rank: int | None = None
    grace_seconds: float = 0


def launch(config: TrainerConfig, config_path: Path, stop: Stop) -> int:
    """Meet the other workers, start all ranks of this one and wait for them.

    Returns:
        The exit code that tells what happened to this worker.

    Raises:
        StalledError, PeerLostError, PreemptedError: the workers did not come together.

    """
    os.environ.update(rank_environment(config))
    place = Place.of(config)
    with tempfile.TemporaryDirectory(prefix="qlora-heartbeats-") as folder:
        os.environ[heartbeat.ENVIRONMENT] = folder
        if config.workers == 1:
            return _run_ranks(config, config_path, place, stop, Path(folder))
        meeting = meet(place, run_id(config), config.spec.policy.stall_timeout_seconds)
        code = _run_ranks(config, config_path, place, stop, Path(folder), (lambda: _lost(meeting),))
        return _with_cause(config, meeting, code)


def _with_cause(config: TrainerConfig, meeting: Meeting, code: int) -> int:
    """Tell the other workers how this one ended; where it only lost one of them, say what that one said."""
    path = Path(config.termination_message_path)
    # NCCL's watchdog aborts a rank whose peer is gone.
    cause = meeting.find_cause() if code in (ExitCode.PEER_LOST, 128 + signal.SIGABRT) else None
    word = last_word.read(path)
    if cause is not None:
        code = ExitCode.PEER_LOST
        said = word.message if word else ""
        text = said if cause in said else f"{cause}; here: {said}"
        word = TerminationMessage(exit_code=code, reason=reason_of(code)) if word is None else word
        word = word.model_copy(update={"exit_code": code, "reason": reason_of(code), "message": text})
        last_word.write(path, word)
    meeting.leave(code, word.message if word else "")
    return code


def run_id(config: TrainerConfig) -> str:
    return f"{config.job.uid}-{config.attempt}"


def rank_environment(config: TrainerConfig) -> dict[str, str]:
    """Threads for each rank, an accelerator for DeepSpeed, and no network where none is expected."""
    cores = os.cpu_count() or 1
    return {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // config.ranks_per_worker))),
        "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": "cuda" if config.device == "CUDA" else "cpu",
        "PYTORCH_ALLOC_CONF": os.environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True"),
        "TORCH_ELASTIC_WORKER_IDENTICAL": "1",  # rank = worker × ranks_per_worker + local rank
    }


def launch_config(config: TrainerConfig, place: Place) -> LaunchConfig:
    """What torchrun is told. Several workers have their places already; nothing is left to negotiate."""
    several = config.workers > 1
    host, port = place.address
    return LaunchConfig(
        min_nodes=config.workers,
        max_nodes=config.workers,
        nproc_per_node=config.ranks_per_worker,
        run_id=run_id(config),
        rdzv_backend="static" if several else "c10d",
        rdzv_endpoint=f"[{host}]:{port}" if several and ":" in host else f"{host}:{port}" if several else "127.0.0.1:0",
        rdzv_configs={"rank": place.index} if several else {},
        max_restarts=0,
        monitor_interval=0.2,
        shutdown_timeout=PEER_SECONDS,
        signals_to_handle="SIGINT,SIGHUP,SIGQUIT",
    )


def _run_ranks(
    config: TrainerConfig,
    config_path: Path,
    place: Place,
    stop: Stop,
    folder: Path,
    checks: Sequence[Callable[[], Verdict | None]] = (),
) -> int:
    """Run the ranks to their end.

    Args:
        config: of the attempt.
        config_path: where it is, for the ranks.
        place: of this worker.
        stop: told that there are ranks now.
        folder: for their heartbeats.
        checks: looked at beside the heartbeats.

    """
    oom = OomWatch(MemoryCgroup.of_this_process())
    checks = (_Watch(config, place, folder), *checks)
    verdicts: list[Verdict] = []
    stop.ranks_begin = True
    try:
        with _watching(Path(config.termination_message_path), stop, checks, verdicts):
            elastic_launch(launch_config(config, place), sys.executable)("-m", "qlora_trainer.rank", str(config_path))
    except ChildFailedError as error:
        if verdicts:
            return verdicts[0].code
        ends = {rank: failure.exitcode for rank, failure in error.failures.items()}
        return _first_end(config, place, ends, oom, folder)
    except SignalException as error:
        return _last_code(config) or 128 + error.sigval
    return ExitCode.DONE


# ---------------------------------------------------------------------------------------------------- while they run


@contextmanager
def _watching(
    word_path: Path, stop: Stop, checks: Sequence[Callable[[], Verdict | None]], verdicts: list[Verdict]
) -> Iterator[None]:
    """Run ``checks`` beside the ranks; the first verdict ends those that do not end by themselves."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(WATCH_SECONDS):
            if not stop.pass_on():  # before the first rank and after the last; a SIGTERM in between is passed on now
                continue
            verdict = next((v for v in (check() for check in checks) if v is not None), None)
            if verdict is not None:
                if not done.wait(verdict.grace_seconds):
                    verdicts.append(verdict)
                    _end_ranks(word_path, verdict)
                return

    thread = threading.Thread(target=watch, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class _Watch:
    """Names a rank that gives no sign of life."""

    def __init__(self, config: TrainerConfig, place: Place, folder: Path) -> None:
        self._folder, self._place, self._ranks = folder, place, config.ranks_per_worker
        self._stall = float(config.spec.policy.stall_timeout_seconds)
        self._watchdog = Watchdog(Limits.of(self._stall), config.ranks_per_worker)
        heartbeat.prepare_files(folder, config.ranks_per_worker)

    def __call__(self) -> Verdict | None:
        beats = heartbeat.read_all(self._folder)
        stuck = self._watchdog.look(beats, time.monotonic(), [process_state(b.pid) for b in beats])
        if stuck is None:
            return None
        rank = self._place.index * self._ranks + stuck.local_rank
        return Verdict(ExitCode.STALLED, words(stuck, rank, self._place.node, self._stall), rank)


def _lost(meeting: Meeting) -> Verdict | None:
    said = meeting.lost()
    return Verdict(ExitCode.PEER_LOST, said, grace_seconds=PEER_SECONDS) if said else None


def _end_ranks(word_path: Path, verdict: Verdict) -> None:
    """Say why, then kill: a rank that hangs in a collective, or is stopped, does not hear a SIGTERM."""
    log.error("%s", verdict.text)
    word = TerminationMessage(
        exit_code=verdict.code, reason=reason_of(verdict.code), message=verdict.text, rank=verdict.rank
    )
    last_word.write_unless_told(word_path, word)
    for child in child_processes():  # the ranks, now
        with suppress(psutil.NoSuchProcess):
            child.kill()


# ---------------------------------------------------------------------------------------------------- when they ended


def _first_end(config: TrainerConfig, place: Place, exit_codes: dict[int, int], oom: OomWatch, folder: Path) -> int:
    """The exit code that tells what happened.

    A rank that was killed wrote no message, and the one its peers wrote is of the broken connection: the kill is said
    instead. The kernel's out-of-memory killer is known by its counter, since a SIGKILL does not say who sent it.
    """
    path = Path(config.termination_message_path)
    for rank, code in exit_codes.items():
        if code < 0 and -code != signal.SIGTERM:
            beat = heartbeat.read_all(folder)[rank - place.index * config.ranks_per_worker]
            phase = heartbeat.phase(beat.section, beat.step)
            name = signal.Signals(-code).name
            if -code == signal.SIGKILL and oom.struck():
                end = int(ExitCode.OUT_OF_HOST_MEMORY)
                text = f"rank {rank} was killed in {phase} by the kernel, out of host memory: {oom.words()}"
            else:
                end = ExitCode.CRASHED if -code == signal.SIGKILL else 128 - code
                text = f"rank {rank} on {place.node} was killed by {name} in {phase}; the kernel's log may say why"
            peers = last_word.read(path)
            word = TerminationMessage(exit_code=end, reason=reason_of(end), message=text, rank=rank)
            if peers is not None:  # what the others knew of the step and of memory
                word = word.model_copy(update={"progress": peers.progress, "memory": peers.memory})
            last_word.write(path, word)
            return end
    first = next(iter(exit_codes.values()))
    return _last_code(config) or (first if first > 0 else 128 - first)


def _last_code(config: TrainerConfig) -> int | None:
    """The exit code of the rank that wrote the termination message, which is the one that failed first."""
    word = last_word.read(Path(config.termination_message_path))
    return word.exit_code if word else None
