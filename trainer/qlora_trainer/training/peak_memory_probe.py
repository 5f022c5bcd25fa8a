"""One step on the largest micro-batch there can be, before the first real one.

What would run out of memory after an hour, when the longest rows come together, does so in the first minute, and the
peak that is measured is the peak that was predicted. Nothing of it stays: weights and optimizer state are taken before,
as a checkpoint holds them, and put back after, which is also the first proof that saving and taking up work here.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from qlora_api.status import MemoryComponent
from qlora_trainer.checkpoint import engine_state
from qlora_trainer.data.batches import IGNORED
from qlora_trainer.engine.deepspeed_engine import accumulate, apply_update
from qlora_trainer.engine.memory_use import gradient_bytes, optimizer_bytes
from qlora_trainer.prepare.plan_memory import predicted
from qlora_trainer.reporting.metrics import peak_bytes

if TYPE_CHECKING:
    from qlora_trainer.data.batches import MicroBatch
    from qlora_trainer.training.context import TrainingContext

MICRO_BATCHES = 2
"""So that gradients of one are there while the other goes backward."""
MIB = 1 << 20
log = logging.getLogger(__name__)


def probe_peak_memory(context: TrainingContext) -> float:
    """Go through a step on this rank's largest micro-batch, and show what it took. A collective.

    Returns:
        Its seconds a token of this rank. It informs, and decides nothing.

    Raises:
        Whatever a step raises: out of memory above all.

    """
    began = time.monotonic()
    engine, recorder = context.engine, context.recorder
    count = min(MICRO_BATCHES, context.config.batch.gradient_accumulation_steps)
    step = context.batches.largest(count)
    largest = step.micro_batches[0]
    predict(context, largest)
    with engine_state.unchanged(engine):
        start = time.monotonic()
        accumulate(engine, step, context.ranks)
        seconds = time.monotonic() - start
        gradients = gradient_bytes(engine)
        apply_update(engine, float(context.config.spec.training.max_grad_norm), learning_rate=0.0)
    peak = peak_bytes(context.ranks.device)
    recorder.memory(
        {
            MemoryComponent.GRADIENTS.value: gradients,
            MemoryComponent.OPTIMIZER_STATE.value: optimizer_bytes(engine),
        }
        | peak
    )
    expected = recorder.report.memory.predicted.get(MemoryComponent.PEAK)
    log.info(
        "the largest micro-batch, %d tokens, took %.1f s; peak %.0f MiB%s",
        largest.input_ids.numel(),
        time.monotonic() - began,
        peak[MemoryComponent.PEAK] / MIB,
        f", predicted {expected / MIB:.0f}" if expected else "",
    )
    return seconds / sum(batch.input_ids.numel() for batch in step.micro_batches)


def expected_seconds(context: TrainingContext, done: int, seconds_per_token: float) -> int:
    """Return about how long the steps after the first ``done`` and their evaluations take.

    A pass without a backward one takes a third of the time.
    """
    receipt = context.data.receipt
    steps = context.total_steps - done
    tokens = steps * receipt.train_tokens / context.batches.steps_per_epoch
    if receipt.eval_tokens:
        evaluations = -(-steps // context.steps_between_evaluations) + (done == 0)
        tokens += evaluations * receipt.eval_tokens / 3
    return round(tokens * seconds_per_token / context.ranks.world_size)


def predict(context: TrainingContext, largest: MicroBatch) -> None:
    """Show what this very micro-batch should need."""
    shape = context.prepared.shape
    if shape is not None:
        rows = tuple(largest.cu_seqlens.diff().tolist())
        context.recorder.predict(predicted(context.config, shape, rows, int((largest.labels != IGNORED).sum())))
