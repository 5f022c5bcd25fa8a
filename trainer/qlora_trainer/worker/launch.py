"""The ranks of one worker: started, watched, and ended when it is no use to wait for them."""

from __future__ import annotations

import logging
import os
import resource
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from qlora_api.contract import ExitCode, TerminationMessage, TrainerConfig, reason_of
from qlora_trainer.errors import TrainerError
from qlora_trainer.liveness import heartbeat
from qlora_trainer.liveness.cgroup import MemoryCgroup, OomWatch
from qlora_trainer.liveness.watchdog import Limits, Watchdog, describe_stuck, process_state
from qlora_trainer.python_process import python_command
from qlora_trainer.reporting import termination_message
from qlora_trainer.storage.authentication import Authenticator
from qlora_trainer.worker.peers import LOOPBACK, Rendezvous, WorkerIdentity, hold_store, meet
from qlora_trainer.worker.rank_processes import InterruptedBySignalError, run_ranks
from qlora_trainer.worker.stop import Stop
from qlora_trainer.worker.tracking_processes import TrackingProcesses, environment_with, tracking_processes

PEER_SECONDS = 30
"""Time that ranks have to notice the failure of a rank or worker they depend on, before they are killed."""
WATCH_SECONDS = 1.0
CACHED_PRIMITIVES = 256
"""oneDNN keeps 1,024 of them, each with memory of its own. The sequences of each step have lengths of their own: memory
would grow for hundreds of steps. The layers of one step need fewer than these."""
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
    place = WorkerIdentity.of(config)
    authenticator = Authenticator.of(config)
    raise_open_file_limit()
    with (
        tempfile.TemporaryDirectory(prefix="qlora-heartbeats-") as folder,
        tracking_processes(config, config_path, place.index, stop) as tracking,
    ):
        if config.workers == 1:
            store, port = hold_store()
            code = _run_ranks(config, config_path, place, port, stop, Path(folder), tracking)
            del store  # it has served until here
            tracking.finish(config, code)
            return code
        if authenticator.key is None:
            raise TrainerError(
                f"keyFile: none is given, and {config.workers} workers need one to know each other; "
                "start the attempt with an operator of the trainer's version"
            )
        key = authenticator.derive(f"rendezvous/{config.attempt}")
        rendezvous = meet(place, run_id(config), key, config.spec.policy.stall_timeout_seconds)
        checks = (lambda: _lost(rendezvous),)
        code = _run_ranks(config, config_path, place, rendezvous.store_port, stop, Path(folder), tracking, checks)
        code = _with_cause(config, rendezvous, code)
        tracking.finish(config, code)
        return code


def _with_cause(config: TrainerConfig, rendezvous: Rendezvous, code: int) -> int:
    """Tell the other workers how this one ended; if it only lost a peer, report that peer's message."""
    path = Path(config.termination_message_path)
    # NCCL's watchdog aborts a rank whose peer is gone.
    cause = rendezvous.find_cause() if code in (ExitCode.PEER_LOST, 128 + signal.SIGABRT) else None
    termination = termination_message.read(path)
    if cause is not None:
        code = ExitCode.PEER_LOST
        own = termination.message if termination else ""
        text = own if cause in own else f"{cause}; here: {own}"
        termination = TerminationMessage(exit_code=code, reason=reason_of(code)) if termination is None else termination
        termination = termination.model_copy(update={"exit_code": code, "reason": reason_of(code), "message": text})
        termination_message.write(path, termination)
    rendezvous.leave(code, termination.message if termination else "")
    return code


def run_id(config: TrainerConfig) -> str:
    return f"{config.job.uid}-{config.attempt}"


def rank_environments(
    config: TrainerConfig, place: WorkerIdentity, store_port: int, heartbeats: Path, more: Mapping[str, str]
) -> dict[int, dict[str, str]]:
    """Return the whole environment of each rank of this worker, by rank, with torchrun's names.

    Ranks are clients of the launcher's store and serve none themselves: torch calls that the agent's store. They get
    no credentials of tracking tools. ``more`` are further variables.
    """
    count = config.ranks_per_worker
    cores = os.cpu_count() or 1
    common = {
        **environment_with(frozenset()),
        **more,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // count))),
        "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": "cuda" if config.device == "CUDA" else "cpu",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(CACHED_PRIMITIVES)),
        "PYTORCH_ALLOC_CONF": os.environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True"),
        heartbeat.ENVIRONMENT: str(heartbeats),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(store_port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),  # as torchrun
        "WORLD_SIZE": str(config.workers * count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": str(place.index),
    }
    if config.workers == 1:  # nothing is to be reached from elsewhere, whatever the pod's environment says
        common |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}  # "=": NCCL takes a name for a prefix
    first = place.index * count
    return {first + local: {**common, "RANK": str(first + local), "LOCAL_RANK": str(local)} for local in range(count)}


def raise_open_file_limit() -> None:
    """Allow the ranks as many open files as the system does: gloo keeps each connection that a stranger makes."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _run_ranks(
    config: TrainerConfig,
    config_path: Path,
    place: WorkerIdentity,
    store_port: int,
    stop: Stop,
    folder: Path,
    tracking: TrackingProcesses,
    checks: Sequence[Callable[[], Verdict | None]] = (),
) -> int:
    """Run the ranks to their end.

    Args:
        config: of the attempt.
        config_path: where it is, for the ranks.
        place: of this worker.
        store_port: of the store, on loopback.
        stop: told that there are ranks now.
        folder: for their heartbeats.
        tracking: what they write their history for.
        checks: looked at beside the heartbeats.

    """
    oom = OomWatch(MemoryCgroup.of_this_process())
    checks = (_StallWatch(config, place, folder), *checks)
    verdicts: list[Verdict] = []
    stop.ranks_begin = True
    command = (*python_command(), "-m", "qlora_trainer.rank", str(config_path))
    environments = rank_environments(config, place, store_port, folder, tracking.rank_environment)
    try:
        with _watching(Path(config.termination_message_path), stop, checks, verdicts):
            failed = run_ranks(command, environments, PEER_SECONDS)
    except InterruptedBySignalError as error:
        return _last_code(config) or 128 + error.number
    if not failed:
        return ExitCode.DONE
    return verdicts[0].code if verdicts else _first_end(config, place, failed, oom, folder)


# ---------------------------------------------------------------------------------------------------- while they run


@contextmanager
def _watching(
    message_path: Path, stop: Stop, checks: Sequence[Callable[[], Verdict | None]], verdicts: list[Verdict]
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
                    _end_ranks(message_path, stop, verdict)
                return

    thread = threading.Thread(target=watch, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class _StallWatch:
    """Names a rank that gives no sign of life."""

    def __init__(self, config: TrainerConfig, place: WorkerIdentity, folder: Path) -> None:
        self._folder, self._identity, self._ranks = folder, place, config.ranks_per_worker
        self._stall = float(config.spec.policy.stall_timeout_seconds)
        self._watchdog = Watchdog(Limits.of(self._stall), config.ranks_per_worker)
        heartbeat.prepare_files(folder, config.ranks_per_worker)

    def __call__(self) -> Verdict | None:
        beats = heartbeat.read_all(self._folder)
        stuck = self._watchdog.look(beats, time.monotonic(), [process_state(b.pid) for b in beats])
        if stuck is None:
            return None
        rank = self._identity.index * self._ranks + stuck.local_rank
        return Verdict(ExitCode.STALLED, describe_stuck(stuck, rank, self._identity.node, self._stall), rank)


def _lost(rendezvous: Rendezvous) -> Verdict | None:
    cause = rendezvous.lost()
    return Verdict(ExitCode.PEER_LOST, cause, grace_seconds=PEER_SECONDS) if cause else None


def _end_ranks(message_path: Path, stop: Stop, verdict: Verdict) -> None:
    """Say why, then kill: a rank that hangs in a collective, or is stopped, does not hear a SIGTERM."""
    log.error("%s", verdict.text)
    termination = TerminationMessage(
        exit_code=verdict.code, reason=reason_of(verdict.code), message=verdict.text, rank=verdict.rank
    )
    termination_message.write_unless_told(message_path, termination)
    for child in stop.child_processes():  # the ranks, now
        with suppress(psutil.NoSuchProcess):
            child.kill()


# ---------------------------------------------------------------------------------------------------- when they ended


def _first_end(
    config: TrainerConfig, place: WorkerIdentity, exit_codes: dict[int, int], oom: OomWatch, folder: Path
) -> int:
    """The exit code that tells what happened.

    A rank that was killed wrote no message, and the one its peers wrote is of the broken connection: the kill is said
    instead. The kernel's out-of-memory killer is known by its counter, since a SIGKILL does not say who sent it.
    """
    path = Path(config.termination_message_path)
    for rank, code in exit_codes.items():
        if code < 0 and -code != signal.SIGTERM:
            beat = heartbeat.read_all(folder)[rank - place.index * config.ranks_per_worker]
            activity = heartbeat.activity(beat.section, beat.step)
            name = signal.Signals(-code).name
            if -code == signal.SIGKILL and oom.oom_killed():
                end = int(ExitCode.OUT_OF_HOST_MEMORY)
                text = f"rank {rank} was killed in {activity} by the kernel, out of host memory: {oom.describe()}"
            else:
                end = ExitCode.CRASHED if -code == signal.SIGKILL else 128 - code
                text = f"rank {rank} on {place.node} was killed by {name} in {activity}; the kernel's log may say why"
            peers = termination_message.read(path)
            termination = TerminationMessage(exit_code=end, reason=reason_of(end), message=text, rank=rank)
            if peers is not None:  # what the others knew of the step and of memory
                known = {name: getattr(peers, name) for name in ("progress", "first_step", "memory")}
                termination = termination.model_copy(update=known)
            termination_message.write(path, termination)
            return end
    first = next(iter(exit_codes.values()))
    return _last_code(config) or (first if first > 0 else 128 - first)


def _last_code(config: TrainerConfig) -> int | None:
    """The exit code of the rank that wrote the termination message, which is the one that failed first."""
    termination = termination_message.read(Path(config.termination_message_path))
    return termination.exit_code if termination else None
