"""A rank forked from a process that has imported everything: an attempt starts in a second, not in fifteen."""

from __future__ import annotations

import os
from pathlib import Path


def run_rank(config_path: str, log_path: str, environment: dict[str, str], rank: int, world_size: int) -> None:
    """What ``python -m qlora_trainer.rank`` does under torchrun."""
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(environment)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    from qlora_api.contract import TrainerConfig
    from qlora_trainer.outcome import guarded
    from qlora_trainer.train import train

    config = TrainerConfig.model_validate_json(Path(config_path).read_bytes())
    os._exit(guarded(config, lambda seen: train(config, seen)))
