"""DeepSpeed around the model: data parallelism and ZeRO.

DeepSpeed is told nothing of 16-bit types: what learns is fp32 (``model.hold_trainable_in_fp32``), so gradients are
accumulated and reduced in fp32 and no second master copy is made. The frozen base keeps its own types.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from qlora_api.batch import BatchSplit
from qlora_api.spec import Offload, ParallelismSpec, TrainingSpec
from qlora_trainer.data.batches import Step
from qlora_trainer.engine.deepspeed_import import deepspeed
from qlora_trainer.engine.optim import make_optimizer
from qlora_trainer.liveness.heartbeat import Heartbeat, Section
from qlora_trainer.model.base_model import trainable
from qlora_trainer.model.loss import NextTokenLoss, call_arguments
from qlora_trainer.ranks import Ranks

REDUCE_BUCKET = 500_000_000
"""DeepSpeed's default: gradients of larger adapters go in several buckets."""


class _Watched:
    """DeepSpeed's way to other ranks, with a sign before and after each wait for them."""

    WAITS = frozenset(
        {
            "all_gather",
            "all_gather_coalesced",
            "all_gather_into_tensor",
            "all_reduce",
            "all_reduce_coalesced",
            "all_to_all_single",
            "barrier",
            "broadcast",
            "reduce",
            "reduce_scatter",
            "reduce_scatter_tensor",
        }
    )

    UNPICKLING = frozenset({"all_gather_object", "broadcast_object_list"})

    def __init__(self, backend: Any, heartbeat: Heartbeat) -> None:
        self._backend = backend
        self._heartbeat = heartbeat

    def __getattr__(self, name: str) -> Any:
        if name in self.UNPICKLING:
            raise RuntimeError(f"{name} unpickles what comes over the network, which could run any code")
        found = getattr(self._backend, name)
        if name not in self.WAITS:
            return found

        def call(*arguments: Any, **named: Any) -> Any:
            with self._heartbeat.during(Section.COLLECTIVE):
                return found(*arguments, **named)

        return call


def join_ranks(device_kind: str, timeout_seconds: float, heartbeat: Heartbeat | None = None) -> Ranks:
    """Meet the other ranks. Reads RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun sets them.

    Args:
        device_kind: "CUDA" or "CPU".
        timeout_seconds: of a collective.
        heartbeat: of this process, if it is watched.

    """
    heartbeat = heartbeat or Heartbeat()
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if device_kind == "CUDA" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        # gloo is enough: the shared-memory collective would need a compiler and 40 s at the first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout_seconds),
        verbose=False,
    )
    deepspeed.comm.comm.cdb = _Watched(deepspeed.comm.comm.cdb, heartbeat)
    return Ranks(dist.get_rank(), local_rank, dist.get_world_size(), device, heartbeat)


def deepspeed_config(
    training: TrainingSpec, parallelism: ParallelismSpec, split: BatchSplit, device: torch.device, learning: int
) -> dict[str, Any]:
    """Return the configuration for ``deepspeed.initialize``. https://www.deepspeed.ai/docs/config-json/

    Args:
        training: of the job.
        parallelism: of the job.
        split: how its global batch is cut.
        device: of this rank.
        learning: elements that learn. Buckets of gradients are allocated whole, by default for 500 million.

    """
    zero: dict[str, Any] = {
        "stage": parallelism.zero_stage,
        "overlap_comm": device.type == "cuda",
        "reduce_bucket_size": min(learning, REDUCE_BUCKET),
    }
    if parallelism.offload is Offload.OPTIMIZER:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    return {
        "train_batch_size": split.global_batch_size,
        "train_micro_batch_size_per_gpu": split.micro_batch_size,
        "gradient_accumulation_steps": split.gradient_accumulation_steps,
        # Without ZeRO DeepSpeed keeps the norm to itself: apply_update clips, and knows it.
        "gradient_clipping": float(training.max_grad_norm) if parallelism.zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }


def wrap_deepspeed(
    model: NextTokenLoss, training: TrainingSpec, parallelism: ParallelismSpec, split: BatchSplit, device: torch.device
) -> Any:
    """Give the model to DeepSpeed.

    Returns:
        The ``DeepSpeedEngine``; call it, ``backward`` and ``step`` it.

    """
    adapter = trainable(model.model)
    learning = sum(parameter.numel() for parameter in adapter.values())
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer(adapter, training, parallelism.offload),
        config=deepspeed_config(training, parallelism, split, device, learning),
        dist_init_required=False,
    )
    return engine


def accumulate(engine: Any, step: Step, ranks: Ranks, loss_scale: float | None = None) -> float:
    """Gradients of the mean loss over the global batch's target tokens; returns this rank's sum of losses.

    Every target token of the global batch weighs the same, however rows fall on ranks and micro-batches. DeepSpeed
    averages over the ranks, hence the factor ``world_size``.

    Args:
        engine: DeepSpeed's.
        step: this rank's micro-batches.
        ranks: all of them.
        loss_scale: what losses are multiplied by on their way back, and :func:`apply_update` divides gradients by.

    """
    scale = ranks.world_size / step.target_tokens
    if loss_scale is not None and engine.zero_optimization_stage():
        engine.optimizer.override_loss_scale(loss_scale)  # ZeRO multiplies and divides by itself
    elif loss_scale is not None:
        scale *= loss_scale
    loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for index, batch in enumerate(step.micro_batches):
        engine.set_gradient_accumulation_boundary(index == len(step.micro_batches) - 1)
        with ranks.heartbeat.during(Section.FORWARD):
            losses = engine(*call_arguments(batch, ranks.device)).sum()
        weight: float | torch.Tensor = scale
        if loss_scale is not None:
            # 0, or NaN for a loss that overflowed: its gradients may be finite, and no update may be made of them.
            weight = scale + (losses.detach() - losses.detach())
        with ranks.heartbeat.during(Section.BACKWARD):
            engine.backward(losses * weight, scale_wrt_gas=False)
        loss_sum += losses.detach().double()
        del losses  # and its graph, before the next forward pass
    with ranks.heartbeat.during(Section.COLLECTIVE):  # on a GPU all that was asked of it is waited for here
        return loss_sum.item()


def apply_update(engine: Any, max_grad_norm: float, learning_rate: float, loss_scale: float | None = None) -> float:
    """Clip, and take one optimizer step; none where the norm is not finite: the gradients are then thrown away.

    :func:`accumulate` has reduced the gradients over the ranks: the norm, and whether a step is taken, is the same on
    all. Under ZeRO, DeepSpeed looks at the norm and leaves the step out; it says infinity.

    Args:
        engine: DeepSpeed's.
        max_grad_norm: 0 for no clipping.
        learning_rate: of this step.
        loss_scale: what :func:`accumulate` was told.

    Returns:
        The global gradient norm before clipping, of the loss without its scale.

    """
    for group in base_optimizer(engine).param_groups:
        group["lr"] = learning_rate
    if engine.zero_optimization_stage() == 0:
        parameters = [p for p in engine.module.parameters() if p.requires_grad]
        if loss_scale is not None:
            torch._foreach_div_([p.grad for p in parameters if p.grad is not None], loss_scale)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or float("inf")))
        if math.isfinite(norm):
            engine.step()
        else:
            for parameter in parameters:
                parameter.grad = None
        return norm
    engine.step()
    return float(engine.get_global_grad_norm() or 0.0)


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """Return the optimizer that holds the state: ZeRO's wrapper has it inside, without ZeRO it is the engine's own."""
    inner: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return inner


def optimizer_parameters(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Return what the optimizer updates on this rank by ``group.index``: parameters, or ZeRO's flat partitions."""
    if engine.zero_optimization_stage() == 3:
        for index, partition in enumerate(engine.optimizer.fp32_partitioned_groups_flat):
            yield f"{engine.optimizer.sub_group_to_group_id[index]}.{index}", partition
        return
    for g, group in enumerate(base_optimizer(engine).param_groups):
        for p, parameter in enumerate(group["params"]):
            yield f"{g}.{p}", parameter
