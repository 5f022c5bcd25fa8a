"""The measuring half of ``bench_memory_gpu.py``: what PyTorch says at each moment of a step, on this process's GPU."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from memory_gpu_cases import BASES, quantization_of, run_of
from qlora_api.batch import BatchSplit
from qlora_api.spec import QuantizationSpec, TrainingSpec
from qlora_memory import EstimateInput, Moment
from qlora_trainer.data.batches import IGNORED, MicroBatch
from qlora_trainer.engine.deepspeed_engine import apply_update, join_ranks, wrap_deepspeed
from qlora_trainer.model.base_model import add_lora, enable_gradient_checkpointing, load_base, weight_bytes
from qlora_trainer.model.loss import NextTokenLoss, call_arguments, head_is_plain
from qlora_trainer.ranks import Ranks
from random_base import random_base

SEED = 42
ACCUMULATION = 2
FIRST = 64
"""Tokens of the update that makes the optimizer's state."""


def join() -> Ranks:
    """Be the only rank, with the allocator as ``qlora_trainer.worker.launch.rank_environments`` sets it."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577"}
    os.environ.update(alone)
    return join_ranks("CUDA", timeout_seconds=600)


class Peaks:
    """The highest allocation of each moment, and of all."""

    def __init__(self) -> None:
        self.moments: Counter[str] = Counter()
        self.reserved = 0
        torch.cuda.reset_peak_memory_stats()

    def end(self, moment: str) -> None:
        """Close a moment; it may come several times."""
        torch.cuda.synchronize()
        self.moments[moment] = max(self.moments[moment], torch.cuda.max_memory_allocated())
        self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())
        torch.cuda.reset_peak_memory_stats()

    @property
    def allocated(self) -> int:
        return max(self.moments.values())


class Bases:
    """The base that is there; the next one takes its place."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._key: tuple[str, QuantizationSpec] | None = None
        self._model: Any = None

    def of(self, case: dict[str, Any]) -> Any:
        key = (case["base"], quantization_of(case))
        if key != self._key:
            self._key = self._model = None
            free()
            self._model = random_base(BASES[case["base"]], key[1], self._device)
            self._key = key
        return self._model

    def forget(self) -> None:
        self._key = self._model = None
        free()


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def beside() -> int:
    """Bytes in use on the GPU that are not PyTorch's: of this process alone only where it is alone."""
    free_bytes, total = torch.cuda.mem_get_info()
    return total - free_bytes - torch.cuda.memory_reserved()


def measure(
    case: dict[str, Any], bases: Bases, ranks: Ranks, watch: Callable[[], None] | None = None
) -> dict[str, Any]:
    """Train two micro-batches on a base that is given back as it was.

    Args:
        case: what to measure.
        bases: makes the base, or has it.
        ranks: this process.
        watch: called before the micro-batch that counts.

    """
    run = run_of(case)
    base = bases.of(case)
    free()
    found: dict[str, Any] = {"before": torch.cuda.memory_allocated(), "besideBefore": beside()}
    model = add_lora(base, run.lora, SEED)
    if run.checkpointing:
        enable_gradient_checkpointing(model)
    try:
        found |= _train(run, model, ranks, watch)
    finally:
        model.unload()
        base.gradient_checkpointing_disable()
        base.disable_input_require_grads()  # switched on with checkpointing, and not off with it
        base.requires_grad_(requires_grad=False)
    return found


def _train(run: EstimateInput, model: Any, ranks: Ranks, watch: Callable[[], None] | None) -> dict[str, Any]:
    vocabulary = run.shape.head.linear.outputs
    model.train()
    fused = head_is_plain(model)
    split = BatchSplit(world_size=1, micro_batch_size=len(run.rows), gradient_accumulation_steps=ACCUMULATION)
    training = TrainingSpec(max_steps=2, global_batch_size=split.global_batch_size, optimizer=run.optimizer)
    engine = wrap_deepspeed(NextTokenLoss(model, fused=fused), training, run.parallelism, split, ranks.device)
    peaks, left = Peaks(), {"weights": torch.cuda.memory_allocated()}

    def micro_batch(batch: MicroBatch, *, last: bool, counts: bool) -> None:
        engine.set_gradient_accumulation_boundary(last)
        losses = engine(*call_arguments(batch, ranks.device)).sum()
        peaks.end(Moment.LOSS if counts else "First")
        left["forward"] = torch.cuda.memory_allocated()
        engine.backward(losses * 1e-4, scale_wrt_gas=False)
        peaks.end(Moment.BACKWARD if counts else "First")
        left["backward"] = torch.cuda.memory_allocated()

    micro_batch(random_rows((FIRST,), FIRST - 1, vocabulary), last=True, counts=False)
    apply_update(engine, 0.3, 1e-4)
    peaks.end("First")
    left["update"] = torch.cuda.memory_allocated()
    for index in range(ACCUMULATION):
        if watch is not None and index == ACCUMULATION - 1:
            watch()
        batch = random_rows(run.rows, run.targets or 0, vocabulary)
        micro_batch(batch, last=index == ACCUMULATION - 1, counts=True)
    apply_update(engine, 0.3, 1e-4)
    peaks.end(Moment.UPDATE)
    seen = {
        "allocated": peaks.allocated,
        "reserved": peaks.reserved,
        "beside": beside(),
        "moments": dict(peaks.moments),
        "left": left,
        "weightBytes": weight_bytes(model),
        "fused": fused,
    }
    engine.destroy()
    return seen


def random_rows(lengths: tuple[int, ...], targets: int, vocabulary: int) -> MicroBatch:
    """Full rows of random tokens, of which the first ``targets`` have a next one that counts."""
    rows = [torch.randint(vocabulary, (length,)) for length in lengths]
    labels = torch.cat([torch.cat([row[1:], torch.tensor([IGNORED])]) for row in rows])
    counted = (labels != IGNORED).cumsum(0)
    labels[counted > targets] = IGNORED
    return MicroBatch(
        input_ids=torch.cat(rows)[None],
        labels=labels[None],
        position_ids=torch.cat([torch.arange(len(row)) for row in rows])[None],
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        max_seqlen=max(lengths),
    )


def measure_loading(name: str, quantization: QuantizationSpec, folder: Path, device: torch.device) -> dict[str, int]:
    """The peak while ``load_base`` reads a base from disk, in files of 1 GB."""
    path = folder / name
    if not path.exists():
        values = dict(BASES[name])
        model = random_base(values, QuantizationSpec.model_validate({"type": "None"}), device)
        model.save_pretrained(path, max_shard_size="1GB")
        del model
    free()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = load_base(path, quantization, device)
    torch.cuda.synchronize()
    return {
        "allocated": torch.cuda.max_memory_allocated() - before,
        "left": torch.cuda.memory_allocated() - before,
        "reserved": torch.cuda.max_memory_reserved(),
        "held": sum(weight_bytes(model).values()),
    }
