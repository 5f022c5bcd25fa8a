"""Run by torchrun in test_memory_measured.py: build each case as the trainer does, train two micro-batches, measure.

``memory_worker.py MODELS CASES.json OUT.json``; rank 0 writes what it saw, in bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qlora_api.batch import BatchSplit
from qlora_api.spec import LoRASpec, ParallelismSpec, QuantizationSpec, TrainingSpec
from qlora_trainer.checkpoint import engine_state
from qlora_trainer.engine.deepspeed_engine import apply_update, base_optimizer, wrap_deepspeed
from qlora_trainer.model.base_model import add_lora, load_base, weight_bytes
from qlora_trainer.model.loss import NextTokenLoss, call_arguments, end_to_end, head_is_plain
from qlora_trainer.ranks import Ranks
from random_rows import random_rows
from rank_cases import run_cases

ACCUMULATION = 2


def distinct(tensors: list[torch.Tensor]) -> int:
    """Bytes of storages, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def optimizer_tensors(engine: Any) -> list[torch.Tensor]:
    """Moments, and the partitions that are copies of the weights."""
    own = {p.untyped_storage().data_ptr() for p in engine.module.parameters()}
    optimizer = base_optimizer(engine)
    partitions = list(getattr(engine.optimizer, "fp32_partitioned_groups_flat", ()))
    partitions += [p for group in optimizer.param_groups for p in group["params"]]
    copies = [p for p in partitions if p.untyped_storage().data_ptr() not in own]
    states = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return copies + states


def gradient_tensors(engine: Any) -> list[torch.Tensor]:
    flat = getattr(engine.optimizer, "grad_partitions_flat_buffer", None)
    if flat is not None:  # of ZeRO-3; all else are views of it
        return [flat]
    tensors = [p.grad for p in engine.module.parameters() if p.grad is not None]
    for name in ("averaged_gradients", "all_grad_tensors"):
        for group in (getattr(engine.optimizer, name, None) or {}).values():
            tensors += [t for t in group or () if isinstance(t, torch.Tensor)]
    return tensors


def content(tensors: list[torch.Tensor]) -> int:
    """Bytes of tensors: views of one buffer count for themselves."""
    return sum({(t.data_ptr(), t.numel()): t.numel() * t.element_size() for t in tensors}.values())


def partitioned(engine: Any) -> dict[str, int]:
    """Bytes of the weights as ZeRO-3 leaves them on this rank."""
    sizes = {"quantizedWeights": 0, "unquantizedWeights": 0, "adapterWeights": 0}
    for p in engine.module.parameters():
        whole = p.numel() > 0
        size = p.numel() * p.element_size() if whole else p.ds_tensor.numel() * p.ds_tensor.element_size()
        if p.requires_grad:
            sizes["adapterWeights"] += size if whole else 0  # the partition is the optimizer's
        else:
            sizes["quantizedWeights" if hasattr(p, "quant_state") else "unquantizedWeights"] += size
    return sizes


def measure(case: dict[str, Any], models: Path, ranks: Ranks) -> dict[str, Any]:
    parallelism = ParallelismSpec.model_validate(case.get("parallelism", {}))
    training = TrainingSpec.model_validate({"maxSteps": 6, **case.get("training", {})})
    quantization = QuantizationSpec.model_validate(case.get("quantization", {}))
    base = load_base(models / case["model"], quantization, ranks.device, parallelism.zero_stage)
    model = add_lora(base, LoRASpec.model_validate(case.get("lora", {})), seed=1)
    model.train()
    seen: dict[str, Any] = {"weights": weight_bytes(model)}
    split = BatchSplit(world_size=ranks.world_size, micro_batch_size=1, gradient_accumulation_steps=ACCUMULATION)
    engine = wrap_deepspeed(
        NextTokenLoss(model, fused=head_is_plain(model)), training, parallelism, split, ranks.device
    )
    for index in range(ACCUMULATION):
        engine.set_gradient_accumulation_boundary(index == ACCUMULATION - 1)
        batch = end_to_end(random_rows(24, 16, seed=index))
        engine.backward(engine(*call_arguments(batch, ranks.device)).sum() * 0.01, scale_wrt_gas=False)
        seen["accumulating" if index == 0 else "gradients"] = int(ranks.max(content(gradient_tensors(engine)))[0])
    apply_update(engine, 0.3, 1e-3)
    seen["optimizer"] = distinct(optimizer_tensors(engine))
    seen["partitioned"] = partitioned(engine) if parallelism.zero_stage == 3 else {}
    saved = engine_state.optimizer_tensors(engine)
    own = sum(t.numel() * t.element_size() for name, t in saved.items() if name != "numbers")
    shared = ranks.sum(own)[0] if parallelism.zero_stage else own
    adapter = engine_state.adapter_tensors(engine.module.model)
    seen["checkpoint"] = int(shared) + sum(t.numel() * t.element_size() for t in adapter.values())
    return seen


run_cases(measure)
