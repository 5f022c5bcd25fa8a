"""Run one rank, as :mod:`qlora_trainer.worker.launch` starts it: ``python -m qlora_trainer.rank CONFIG.json``"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from qlora_api.contract import TerminationMessage, TrainerConfig
from qlora_trainer.allocator import keep_freed_memory
from qlora_trainer.reporting.rank_exit import LastSeen, run_with_exit_code


def main() -> int:
    config = TrainerConfig.model_validate_json(Path(sys.argv[1]).read_bytes())
    if config.device == "CPU":
        keep_freed_memory()

    def work(seen: LastSeen) -> TerminationMessage:
        from qlora_trainer.training.train import train  # noqa: PLC0415 an import that fails ends in a termination message too

        return train(config, seen)

    return run_with_exit_code(config, work)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: daemon threads of gloo and of the metrics server must not hold up a rank that is done.
    os._exit(code)
