"""Run by torchrun in test_ranks.py: every case trains three steps, is saved, goes on; a second engine takes it up.

``ranks_worker.py MODEL CASES.json OUT.json``; rank 0 writes what it saw.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from qlora_api.batch import BatchSplit
from qlora_api.spec import LoRASpec, ParallelismSpec, QuantizationSpec, TrainingSpec
from qlora_trainer.checkpoint import engine_state
from qlora_trainer.engine.deepspeed_engine import accumulate, apply_update, wrap_deepspeed
from qlora_trainer.engine.memory_use import gradient_bytes, optimizer_bytes
from qlora_trainer.engine.seeding import seed_step
from qlora_trainer.model.base_model import add_lora, enable_gradient_checkpointing, load_base
from qlora_trainer.model.loss import NextTokenLoss, end_to_end, head_is_plain
from qlora_trainer.ranks import Ranks
from random_rows import random_rows
from rank_cases import run_cases

ACCUMULATION = 2


def build(case: dict[str, Any], model: Path, ranks: Ranks) -> Any:
    quantization = QuantizationSpec.model_validate(case.get("quantization", {}))
    parallelism = ParallelismSpec.model_validate(case.get("parallelism", {}))
    training = TrainingSpec.model_validate({"maxSteps": 6, **case.get("training", {})})
    base = load_base(model.with_name(case.get("model", model.name)), quantization, ranks.device, parallelism.zero_stage)
    adapted = add_lora(base, LoRASpec.model_validate(case.get("lora", {})), seed=1, tokens=case.get("tokens", {}))
    adapted.train()
    if case.get("checkpointing"):
        enable_gradient_checkpointing(adapted)
    split = BatchSplit(world_size=ranks.world_size, micro_batch_size=1, gradient_accumulation_steps=ACCUMULATION)
    loss = NextTokenLoss(adapted, fused=head_is_plain(adapted))
    return wrap_deepspeed(loss, training, parallelism, split, ranks.device)


def steps(
    engine: Any, ranks: Ranks, first: int, last: int, scale: float | None = None
) -> tuple[list[float], list[float]]:
    """Losses and gradient norms; step n has the same four rows however many ranks there are."""
    losses, norms = [], []
    for step in range(first, last):
        seed_step(1, step, ranks.rank)
        rows = random_rows(30, 50, 20, 40, seed=step)
        share = len(rows) // (ranks.world_size * ACCUMULATION)
        targets = sum(len(r) - 1 for r in rows)
        mine = rows[ranks.rank :: ranks.world_size]
        batches = [end_to_end(mine[index * share : (index + 1) * share]) for index in range(ACCUMULATION)]
        total = accumulate(engine, SimpleNamespace(micro_batches=batches, target_tokens=targets), ranks, scale)
        norms.append(apply_update(engine, 0.3, 1e-3, scale))
        losses.append(ranks.sum(total)[0] / targets)
    return losses, norms


def run(case: dict[str, Any], model: Path, ranks: Ranks) -> dict[str, Any]:
    engine, scale = build(case, model, ranks), case.get("lossScale")
    losses, norms = steps(engine, ranks, 0, 3, scale)
    skipped = leave_out_a_step(engine, ranks) if scale else {}
    adapter = engine_state.adapter_tensors(engine.module.model)
    optimizer = engine_state.optimizer_tensors(engine)
    onward, _ = steps(engine, ranks, 3, 6, scale)
    second = build(case, model, ranks)
    engine_state.load_adapter_tensors(second.module.model, adapter)
    engine_state.load_optimizer_tensors(second, optimizer)
    resumed, _ = steps(second, ranks, 3, 6, scale)
    third = build(case, model, ranks)
    with engine_state.unchanged(third):
        steps(third, ranks, 6, 8, scale)
    rehearsed, _ = steps(third, ranks, 0, 3, scale)
    return {
        "losses": losses,
        "norms": norms,
        "skipped": skipped,
        "onward": onward,
        "resumed": resumed,
        "rehearsed": rehearsed,
        "files": {"adapter": sorted(adapter), "optimizer": sorted(optimizer)},
        "optimizer_bytes": optimizer_bytes(second),
    }


def leave_out_a_step(engine: Any, ranks: Ranks) -> dict[str, Any]:
    """Take a step whose scaled loss overflows float16, and compare what it must not change. A collective."""
    before = engine_state.adapter_tensors(engine.module.model), engine_state.optimizer_tensors(engine)
    _, (overflowed,) = steps(engine, ranks, 9, 10, scale=2.0**60)
    forward = engine.module.forward
    engine.module.forward = lambda *arguments: forward(*arguments) + math.inf  # whose gradients are finite
    _, (infinite_loss,) = steps(engine, ranks, 9, 10, scale=1.0)
    engine.module.forward = forward
    after = engine_state.adapter_tensors(engine.module.model), engine_state.optimizer_tensors(engine)
    same = all(torch.equal(old[name], new[name]) for old, new in zip(before, after, strict=True) for name in old)
    return {
        "norm_is_finite": math.isfinite(overflowed) or math.isfinite(infinite_loss),
        "changed": not same,
        "gradient_bytes": gradient_bytes(engine),
    }


run_cases(run)
