"""Start the ranks of one worker and answer with the contract's exit code: ``python -m qlora_trainer CONFIG.json``

torchrun itself answers 1 whatever happened; its library tells which rank ended first, and how.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from qlora_api.contract import ExitCode, TerminationMessage, TrainerConfig, reason_of
from qlora_trainer.prepared import Prepared

PEER_SECONDS = 30
"""When a rank has failed, the others get this long to notice before they are killed."""


def rank_environment(config: TrainerConfig) -> dict[str, str]:
    """Threads for each rank, an accelerator for DeepSpeed, and no network where none is expected."""
    cores = os.cpu_count() or 1
    return {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // config.ranks_per_worker))),
        "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": "cuda" if config.device == "CUDA" else "cpu",
        "PYTORCH_ALLOC_CONF": os.environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True"),
    }


def launch(config: TrainerConfig, config_path: Path) -> int:
    """Start all ranks of this worker under torchrun's agent and wait for them.

    Returns:
        The exit code of the rank that ended first in failure, or 0.

    """
    os.environ.update(rank_environment(config))
    plan = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.ranks_per_worker,
        run_id=f"{config.job.uid}-{config.attempt}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.2,
        shutdown_timeout=PEER_SECONDS,
        signals_to_handle="SIGINT,SIGHUP,SIGQUIT",
    )
    try:
        elastic_launch(plan, sys.executable)("-m", "qlora_trainer.rank", str(config_path))
    except ChildFailedError as error:
        return _first_end(config, {rank: failure.exitcode for rank, failure in error.failures.items()})
    except SignalException as error:
        return _last_word(config) or 128 + error.sigval
    return ExitCode.DONE


def _first_end(config: TrainerConfig, exit_codes: dict[int, int]) -> int:
    """The exit code that tells what happened.

    A rank that was killed wrote no message, and the one its peers wrote is of the broken connection: the kill is said
    instead.
    """
    for rank, code in exit_codes.items():
        if code < 0 and -code != signal.SIGTERM:
            text = f"rank {rank} was killed by {signal.Signals(-code).name}; see the log of its node for the reason"
            said = TerminationMessage(exit_code=128 - code, reason=reason_of(code), message=text, rank=rank)
            Path(config.termination_message_path).write_bytes(said.to_bytes())
            return said.exit_code
    first = next(iter(exit_codes.values()))
    return _last_word(config) or (first if first > 0 else 128 - first)


def _pass_on(*_: object) -> None:
    """Tell the ranks to stop, and go on waiting for them: whoever sent the signal has the patience that counts.

    torchrun's own handler would end the attempt before its ranks had agreed on a step and written a checkpoint. With
    nothing started yet there is nothing to wait for.
    """
    children = psutil.Process().children()
    if not children:
        sys.exit(ExitCode.PREEMPTED)
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.terminate()


def _last_word(config: TrainerConfig) -> int | None:
    """The exit code of the rank that wrote the termination message, which is the one that failed first."""
    path = Path(config.termination_message_path)
    if not path.exists() or path.stat().st_size == 0:
        return None
    return TerminationMessage.model_validate_json(path.read_bytes()).exit_code


def main() -> int:
    path = Path(sys.argv[1])
    config = TrainerConfig.model_validate_json(path.read_bytes())
    signal.signal(signal.SIGTERM, _pass_on)
    if Prepared.read(config) is None:
        done = subprocess.run([sys.executable, "-m", "qlora_trainer.prepare", str(path)], check=False)
        if done.returncode:
            return done.returncode if done.returncode > 0 else 128 - done.returncode
    return launch(config, path)


if __name__ == "__main__":
    sys.exit(main())
