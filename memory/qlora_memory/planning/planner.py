"""Choose the micro-batch and how much is computed again, or say what would fit. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import assert_never

from qlora_api.batch import TOKENS_PER_MICRO_BATCH, BatchSplit, split_batch
from qlora_api.errors import FieldError
from qlora_api.spec import ComputeType, GradientCheckpointing, Offload, QLoRAJobSpec, QuantizationType
from qlora_api.status import MemoryComponent
from qlora_memory.coverage import check_skip_modules
from qlora_memory.estimate import EstimateInput, MemoryEstimate, estimate
from qlora_memory.gpus import GIB, Gpu, check_gpu, resolved
from qlora_memory.planning.cost import Span, seconds_per_token
from qlora_memory.shape.model_shape import ModelShape
from qlora_memory.shape.on_disk import check_on_disk
from qlora_memory.weights import AdapterShape, quantizable_layers


@dataclass(frozen=True)
class PlanRequest:
    """Input of the planner."""

    spec: QLoRAJobSpec
    shape: ModelShape
    gpu: Gpu
    world_size: int
    longest: int | None = None
    """Tokens of the longest sequence, where the rows are known; None: ``spec.dataset.maxLength``."""
    correction: float = 1.0
    """Factor on the needed bytes: measured over predicted, as learned on this GPU."""

    @property
    def row(self) -> int:
        """Tokens of the longest sequence that a micro-batch can hold."""
        most = self.spec.dataset.max_length
        return most if self.longest is None else min(most, self.longest)


@dataclass(frozen=True)
class Plan:
    """A choice, what it needs and how fast it should be."""

    batch: BatchSplit
    gradient_checkpointing: bool
    zero_stage: int
    offload: Offload
    gpu: Gpu
    memory: MemoryEstimate
    seconds_per_token: Span
    """On one GPU."""
    row: int
    """Tokens of a sequence it was made for."""
    shape: ModelShape
    compute_type: ComputeType
    """As resolved for the GPU."""
    quantization: QuantizationType
    correction: float = 1.0
    """Correction factor of the request."""

    @property
    def needed_bytes(self) -> int:
        """Return the bytes that the GPU must have, corrected; ``memory`` is not, for corrections learn from it."""
        return math.ceil(self.memory.needed_bytes * self.correction)

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.gpu.memory_bytes

    @property
    def notes(self) -> tuple[str, ...]:
        """Return remarks on the prediction."""
        return tuple(_notes(self))

    @property
    def headroom(self) -> int:
        """Bytes left; negative: missing."""
        return self.gpu.memory_bytes - self.needed_bytes


@dataclass(frozen=True)
class NoFit:
    """Nothing that the job allows fits. :mod:`qlora_memory.planning.remedies` says what would."""

    smallest: Plan
    """The choice that needs least."""


def plan(request: PlanRequest) -> Plan | NoFit:
    """Return the fastest choice that fits; the global batch size stays.

    Of all micro-batches that divide a rank's share and hold at most 8,192 tokens, with and without gradient
    checkpointing, as far as the job leaves both open. The larger micro-batch and the lesser recomputation are faster;
    where one costs the other, expected time decides (:mod:`qlora_memory.planning.cost`).

    Raises:
        FieldError: the trainer cannot use the GPU, the global batch cannot be cut, a target names no layer, the base
            is quantized in another way than the job says, has fewer positions than ``maxLength``, or no layer that
            ``skipModules`` names.

    """
    _check_gpu(request)
    choices = [plan_of(request, batch, checkpointing=again) for batch in _batches(request) for again in _again(request)]
    fitting = [choice for choice in choices if choice.fits]
    if fitting:
        return min(fitting, key=lambda c: (c.seconds_per_token.expected, -c.batch.micro_batch_size))
    return NoFit(min(choices, key=lambda c: c.needed_bytes))


def _check_gpu(request: PlanRequest) -> None:
    spec, shape = request.spec, request.shape
    check_gpu(request.gpu, spec.quantization)
    if shape.max_positions is not None and spec.dataset.max_length > shape.max_positions:
        raise FieldError(
            "spec.dataset.maxLength",
            spec.dataset.max_length,
            f"is more than the {shape.max_positions} positions of {spec.model.source}",
        )
    if (
        shape.modelled or shape.counted
    ):  # of others the tensors' names need not be the modules': Prepare looks at the model itself
        names = (layer.name for layer in quantizable_layers(shape, spec.quantization.type))
        check_skip_modules(spec.quantization, names, on_disk=shape.on_disk is not None)
    check_on_disk(shape.on_disk, spec.quantization)


def plan_of(request: PlanRequest, batch: BatchSplit, *, checkpointing: bool) -> Plan:
    """Return the plan of one choice, whether it fits or not."""
    spec, adapter = request.spec, AdapterShape(request.shape, request.spec.lora)
    run = run_of(spec, request.shape, batch, checkpointing=checkpointing, row=request.row, gpu=request.gpu)
    speed = seconds_per_token(
        request.shape,
        adapter,
        run.quantization,
        request.gpu,
        row=request.row,
        tokens=request.row * batch.micro_batch_size,
        recomputes=checkpointing,
    )
    return Plan(
        batch=batch,
        gradient_checkpointing=checkpointing,
        zero_stage=spec.parallelism.zero_stage,
        offload=spec.parallelism.offload,
        gpu=request.gpu,
        memory=estimate(run, request.gpu),
        seconds_per_token=speed,
        row=request.row,
        shape=request.shape,
        compute_type=run.quantization.compute_type,
        quantization=run.quantization.type,
        correction=request.correction,
    )


def run_of(
    spec: QLoRAJobSpec,
    shape: ModelShape,
    batch: BatchSplit,
    *,
    checkpointing: bool,
    row: int,
    cuda: bool = True,
    gpu: Gpu | None = None,
) -> EstimateInput:
    """Return a choice as inputs of :func:`qlora_memory.estimate.estimate`.

    Args:
        spec: of the job.
        shape: of its base.
        batch: how the global batch is cut.
        checkpointing: layers are computed again.
        row: tokens of the longest sequence.
        cuda: False for ranks on a CPU.
        gpu: of each rank, where it is known.

    """
    return EstimateInput(
        shape=shape,
        lora=spec.lora,
        quantization=resolved(spec.quantization, gpu, cuda=cuda),
        optimizer=spec.training.optimizer,
        parallelism=spec.parallelism,
        world_size=batch.world_size,
        rows=(row,) * batch.micro_batch_size,
        checkpointing=checkpointing,
        accumulates=batch.gradient_accumulation_steps > 1,
        cuda=cuda,
        flash=gpu is None or gpu.ampere,
    )


def _notes(plan: Plan) -> Iterator[str]:
    shape = plan.shape
    if not shape.modelled:
        yield (
            f'"{shape.model_type}" is not among the architectures that are modelled: activations are taken to be a '
            "Llama's"
        )
    if not (shape.modelled or shape.counted):
        yield (
            "weights are counted by the names of their tensors, which may miss what this class does with them: Prepare "
            "counts them on the model itself"
        )
    if shape.experts and plan.quantization is QuantizationType.INT8:
        size = sum(weight.elements for weight in shape.experts)
        yield f"{size * 2 / GIB:.1f} GiB are experts, which stay in 16 bits: INT8 takes linear layers alone"
    if plan.zero_stage:
        yield (
            f"ZeRO stage {plan.zero_stage} brings DeepSpeed's buckets for gradients, "
            f"{plan.memory.components.get(MemoryComponent.COLLECTIVE_BUFFERS, 0) / GIB:.1f} GiB"
        )
    if plan.compute_type is ComputeType.BFLOAT16 and not plan.gpu.ampere:
        yield f"{plan.gpu.name} has no bf16 in hardware: BFloat16 is emulated and slow, Float16 is what it is fast in"
    if plan.memory.paged_bytes:
        yield f"{plan.memory.paged_bytes / GIB:.2f} GiB of optimizer state may move to host memory under pressure"


def _batches(request: PlanRequest) -> Iterator[BatchSplit]:
    """Ways to cut the global batch: the job's own micro-batch, or all that divide and are not too long."""
    largest = split_batch(request.spec, request.world_size)
    if request.spec.training.micro_batch_size is not None:
        yield largest
        return
    share = largest.micro_batch_size * largest.gradient_accumulation_steps
    most = max(1, TOKENS_PER_MICRO_BATCH // request.row)
    for micro in range(1, min(share, most) + 1):
        if share % micro == 0:
            yield BatchSplit(
                world_size=request.world_size, micro_batch_size=micro, gradient_accumulation_steps=share // micro
            )


def _again(request: PlanRequest) -> tuple[bool, ...]:
    match request.spec.training.gradient_checkpointing:
        case GradientCheckpointing.FULL:
            return (True,)
        case GradientCheckpointing.NONE:
            return (False,)
        case GradientCheckpointing.AUTO:
            return (False, True)
        case _:
            assert_never(request.spec.training.gradient_checkpointing)
