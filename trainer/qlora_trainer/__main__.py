"""Start the ranks of one worker and answer with the contract's exit code: ``python -m qlora_trainer CONFIG.json``

torchrun itself answers 1 whatever happened; its library tells which rank ended first, and how.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from qlora_api.contract import ExitCode, TerminationMessage, TrainerConfig
from qlora_trainer.prepared import Prepared

GRACE_SECONDS = 86_400
"""Ranks that were told to stop are waited for; whoever sent the signal has the shorter patience."""


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
        shutdown_timeout=GRACE_SECONDS,
    )
    try:
        elastic_launch(plan, sys.executable)("-m", "qlora_trainer.rank", str(config_path))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return _last_word(config) or failure.exitcode
    except SignalException as error:
        return _last_word(config) or 128 + error.sigval
    return ExitCode.DONE


def _last_word(config: TrainerConfig) -> int | None:
    """The exit code of the rank that wrote the termination message, which is the one that failed first."""
    path = Path(config.termination_message_path)
    if not path.exists() or path.stat().st_size == 0:
        return None
    return TerminationMessage.model_validate_json(path.read_bytes()).exit_code


def main() -> int:
    path = Path(sys.argv[1])
    config = TrainerConfig.model_validate_json(path.read_bytes())
    if Prepared.read(config) is None:
        done = subprocess.run([sys.executable, "-m", "qlora_trainer.prepare", str(path)], check=False)
        if done.returncode:
            return done.returncode
    return launch(config, path)


if __name__ == "__main__":
    sys.exit(main())
