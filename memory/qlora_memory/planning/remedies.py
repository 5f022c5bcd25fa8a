"""Suggest what would fit, where nothing that the job allows does. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from qlora_api.errors import FieldError
from qlora_api.spec import ComputeType, GradientCheckpointing, Offload, Optimizer, QLoRAJobSpec, QuantizationType
from qlora_api.status import MemoryComponent
from qlora_memory.gpus import GIB, GPUS
from qlora_memory.planning.planner import NoFit, Plan, PlanRequest, plan

SHORTEST = 128
"""Shorter sequences than this are no remedy."""
STEP = 64
"""Sequence lengths that are suggested are multiples of this."""
FEWEST = 4
"""Smaller ranks than this are no remedy."""
_WEIGHTS = (
    MemoryComponent.QUANTIZED_WEIGHTS,
    MemoryComponent.QUANTIZATION_CONSTANTS,
    MemoryComponent.UNQUANTIZED_WEIGHTS,
    MemoryComponent.CUDA_CONTEXT,
)


@dataclass(frozen=True)
class Remedy:
    """One change that alone makes the job fit."""

    field: str
    value: str
    plan: Plan

    def __str__(self) -> str:
        used = f"{self.plan.needed_bytes / GIB:.1f} GiB, micro-batch {self.plan.batch.micro_batch_size}"
        return f"{self.field} {self.value} (uses {used})"


def remedies(request: PlanRequest) -> tuple[Remedy, ...]:
    """Changes of one thing each that make the job fit, the least costly first."""
    found: list[Remedy] = []
    for field, value, spec in _changes(request.spec, request.world_size):
        outcome = plan(replace(request, spec=spec))
        if isinstance(outcome, Plan):
            found.append(Remedy(field, value, outcome))
    for search in (_shorter, _smaller_rank, _other_gpu):
        remedy = search(request)
        if remedy is not None:
            found.append(remedy)
    return tuple(found)


def does_not_fit(request: PlanRequest, outcome: NoFit) -> FieldError:
    """For a person: what is missing, where the memory goes, what would fit."""
    smallest = outcome.smallest
    needed, there = smallest.needed_bytes / GIB, smallest.gpu.memory_bytes / GIB
    parts = sorted(smallest.memory.components.items(), key=lambda item: -item[1])[:3]
    largest = ", ".join(f"{component} {size / GIB:.1f}" for component, size in parts)
    ways = remedies(request)
    fix = f"Any of these would fit: {'; '.join(map(str, ways))}" if ways else "No change of a single field makes it fit"
    field, value, least = _to_change(request, smallest)
    missing = f"needs {needed:.1f} GiB on each GPU{least}, but {smallest.gpu.name} gives {there:.1f}"
    return FieldError(field, value, f"{missing} (mostly {largest} GiB). {fix}")


def _to_change(request: PlanRequest, smallest: Plan) -> tuple[str, object, str]:
    """Field, value, and how small everything else is already."""
    weights = sum(smallest.memory.components.get(component, 0) for component in _WEIGHTS)
    if weights > request.gpu.memory_bytes:
        return "spec.model.source", request.spec.model.source, ""
    if request.spec.training.micro_batch_size is not None:
        return "spec.training.microBatchSize", smallest.batch.micro_batch_size, ""
    return "spec.dataset.maxLength", request.spec.dataset.max_length, " even in micro-batches of 1"


def changed(spec: QLoRAJobSpec, group: str, **values: Any) -> QLoRAJobSpec:
    """Return the spec with fields of one group set."""
    return spec.model_copy(update={group: getattr(spec, group).model_copy(update=values)})


def _changes(spec: QLoRAJobSpec, world_size: int) -> Iterator[tuple[str, str, QLoRAJobSpec]]:
    """Field, value and spec of each change that has one way only."""
    training, quantization, sharing = spec.training, spec.quantization, spec.parallelism
    if training.gradient_checkpointing is GradientCheckpointing.NONE:
        auto = GradientCheckpointing.AUTO
        yield "spec.training.gradientCheckpointing", auto, changed(spec, "training", gradient_checkpointing=auto)
    if training.micro_batch_size is not None and training.micro_batch_size > 1:
        yield "spec.training.microBatchSize", "unset", changed(spec, "training", micro_batch_size=None)
    if not quantization.type.is_four_bit:
        nf4 = QuantizationType.NF4
        yield "spec.quantization.type", nf4, changed(spec, "quantization", type=nf4)
    elif not quantization.double_quantization:
        yield "spec.quantization.doubleQuantization", "true", changed(spec, "quantization", double_quantization=True)
    if quantization.compute_type is ComputeType.FLOAT32:
        changes = changed(spec, "quantization", compute_type=ComputeType.AUTO)
        yield "spec.quantization.computeType", ComputeType.AUTO, changes
    if training.optimizer is not Optimizer.PAGED_ADAMW_8BIT and sharing.offload is Offload.NONE:
        small = Optimizer.PAGED_ADAMW_8BIT
        yield "spec.training.optimizer", small, changed(spec, "training", optimizer=small)
    stages = [stage for stage in (0, 1, 2, 3) if stage != sharing.zero_stage and (stage == 0 or world_size > 1)]
    for stage in stages:
        if sharing.offload is Offload.NONE and not (stage == 3 and quantization.type is QuantizationType.INT8):
            yield "spec.parallelism.zeroStage", str(stage), changed(spec, "parallelism", zero_stage=stage)
    if sharing.offload is Offload.NONE:
        stage = max(1, sharing.zero_stage)
        moved = changed(spec, "parallelism", offload=Offload.OPTIMIZER, zero_stage=stage)
        yield "spec.parallelism.offload", f"Optimizer with zeroStage {stage}", moved


def _shorter(request: PlanRequest) -> Remedy | None:
    """Return the longest sequences that fit, by bisection: memory grows with them."""
    low, high, best = SHORTEST // STEP, request.row // STEP, None
    while low <= high:
        middle = (low + high) // 2
        spec = changed(request.spec, "dataset", max_length=middle * STEP)
        outcome = plan(replace(request, spec=spec, longest=None))
        if isinstance(outcome, Plan):
            best, low = Remedy("spec.dataset.maxLength", str(middle * STEP), outcome), middle + 1
        else:
            high = middle - 1
    return best


def _smaller_rank(request: PlanRequest) -> Remedy | None:
    """Return the largest rank that fits, by halving."""
    rank = request.spec.lora.rank // 2
    while rank >= FEWEST:
        outcome = plan(replace(request, spec=changed(request.spec, "lora", rank=rank)))
        if isinstance(outcome, Plan):
            return Remedy("spec.lora.rank", str(rank), outcome)
        rank //= 2
    return None


def _other_gpu(request: PlanRequest) -> Remedy | None:
    """Return the smallest GPU of the table that holds it."""
    larger = sorted(
        (gpu for gpu in GPUS.values() if gpu.memory_bytes > request.gpu.memory_bytes and gpu.ampere),
        key=lambda gpu: gpu.memory_bytes,
    )
    for gpu in larger:
        outcome = plan(replace(request, gpu=gpu))
        if isinstance(outcome, Plan):
            return Remedy("a GPU such as", gpu.name, outcome)
    return None
