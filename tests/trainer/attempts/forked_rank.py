"""A rank forked from a process that has imported everything: an attempt starts in a second, not in fifteen."""

from __future__ import annotations

import os
import signal
from pathlib import Path

EMULATED_FLOAT16 = "TEST_INITIAL_LOSS_SCALE"
"""Set to an initial loss scale, it has this CPU's slow float16 taken for hardware's."""

STOP_BEFORE_ADAPTER_TASKS = "TEST_STOP_BEFORE_ADAPTER_TASKS"
"""Set, it has each rank receive SIGTERM when the measurement of its adapter begins."""


def emulate_float16(initial_scale: float) -> None:
    from functools import partial

    from qlora_trainer.engine import loss_scale
    from qlora_trainer.model.device import compute_type
    from qlora_trainer.training import resume

    compute_type.fp16_in_hardware = lambda _: True
    resume.LossScale = partial(loss_scale.LossScale, scale=initial_scale)


def stop_before_adapter_tasks() -> None:
    from qlora_trainer.training import train

    measure = train.measure_adapter

    def stop_and_measure(*arguments: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return measure(*arguments)

    train.measure_adapter = stop_and_measure


def run_rank(config_path: str, log_path: str, environment: dict[str, str], rank: int, world_size: int) -> None:
    """Run ``python -m qlora_trainer.rank`` as under torchrun, in a fork."""
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(environment)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    from qlora_api.contract import TrainerConfig
    from qlora_trainer.reporting.rank_exit import run_with_exit_code
    from qlora_trainer.training.train import train

    if initial := environment.get(EMULATED_FLOAT16):
        emulate_float16(float(initial))
    if environment.get(STOP_BEFORE_ADAPTER_TASKS):
        stop_before_adapter_tasks()
    config = TrainerConfig.model_validate_json(Path(config_path).read_bytes())
    os._exit(run_with_exit_code(config, lambda seen: train(config, seen)))
