"""Training steps of this project's trainer, timed: its own ``build`` and ``train_step``, without what surrounds them.

``torchrun --nproc-per-node 2 our_trainer.py CONFIG.json REPORT.json [PROFILE]``, with a prepared TrainerConfig. Rank 0
writes the seconds, the minor page faults and the real tokens of each optimizer step, and with PROFILE where its time
went.
"""

from __future__ import annotations

import cProfile
import json
import logging
import os
import pstats
import sys
import time
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

from qlora_api.contract import TrainerConfig
from qlora_trainer.allocator import keep_freed_memory
from qlora_trainer.engine.deepspeed_engine import join_ranks
from qlora_trainer.reporting.metrics import MetricsRecorder
from qlora_trainer.reporting.rank_exit import quiet_libraries
from qlora_trainer.training.context import StopFlag, build
from qlora_trainer.training.resume import resume_or_start
from qlora_trainer.training.train import train_step

WARM_UP = 2
"""Steps that are not profiled."""


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    quiet_libraries()
    config = TrainerConfig.model_validate_json(Path(sys.argv[1]).read_bytes())
    keep_freed_memory()
    ranks = join_ranks(config.device, config.spec.policy.stall_timeout_seconds)
    recorder = MetricsRecorder(config, ranks)
    context = build(config, ranks, recorder, StopFlag())
    run = resume_or_start(context)
    steps = context.batches.steps(0, context.total_steps)
    profile = cProfile.Profile() if len(sys.argv) > 3 and ranks.is_first else None
    seconds, cpu_seconds, faults, tokens, losses = [], [], [], [], []
    for number in range(context.total_steps):
        if profile and number == WARM_UP:
            profile.enable()
        start, cpu_start, before = time.monotonic(), time.process_time(), run.tokens
        faults_before = getrusage(RUSAGE_SELF).ru_minflt
        train_step(context, run, steps)
        seconds.append(time.monotonic() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
        faults.append(getrusage(RUSAGE_SELF).ru_minflt - faults_before)
        tokens.append(run.tokens - before)
        losses.append(float(recorder.report.loss or "nan"))
    if profile:
        profile.disable()
        with Path(sys.argv[3]).open("w") as out:
            pstats.Stats(profile, stream=out).sort_stats("tottime").print_stats(45)
    if ranks.is_first:
        report = {"seconds": seconds, "cpu_seconds": cpu_seconds, "page_faults": faults, "tokens": tokens}
        report |= {"losses": losses, "peak_bytes": getrusage(RUSAGE_SELF).ru_maxrss * 1024}
        Path(sys.argv[2]).write_text(json.dumps(report))
    ranks.sum(0)
    os._exit(0)  # as qlora_trainer.rank does: gloo's threads must not hold up the end


if __name__ == "__main__":
    main()
