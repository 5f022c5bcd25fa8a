"""The program of a worker under torchrun: run cases on real ranks, and leave what they saw in a file."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from qlora_trainer.engine.deepspeed_engine import join_ranks

if TYPE_CHECKING:
    from collections.abc import Callable

    from qlora_trainer.ranks import Ranks


def run_cases(run: Callable[[dict[str, Any], Path, Ranks], dict[str, Any]]) -> NoReturn:
    """Do what ``WORKER MODELS CASES.json OUT.json`` says, and end this process.

    Args:
        run: given a case, the path of the models and the ranks, returns what rank 0 writes of the case.

    """
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    models, cases, out = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    ranks = join_ranks("CPU", 60)
    seen = {name: run(case, models, ranks) for name, case in cases.items()}
    if ranks.is_first:
        out.write_text(json.dumps(seen))
    ranks.sum(0)
    os._exit(0)
