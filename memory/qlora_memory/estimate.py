"""Bytes of one rank by component: the formulas of this package put together.

Memory is highest at one of three moments: while the loss is computed, when the last decoder layer goes backward, or at
the update. The estimate has all three; its components are those of the highest.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from qlora_api.spec import LoRASpec, Optimizer, ParallelismSpec, QuantizationSpec, QuantizationType
from qlora_api.status import MemoryComponent
from qlora_memory.activations.forward_backward import Activations, activations
from qlora_memory.activations.setting import OURS, ForwardSetting, Software
from qlora_memory.gpus import CUBLAS_BYTES, MIB, Gpu
from qlora_memory.optimizer import TrainingState, training_state
from qlora_memory.shape.model_shape import AttentionKind, Linear, ModelShape
from qlora_memory.weights import (
    BLOCK,
    AdapterShape,
    compute_width,
    constant_bytes,
    quantized_bytes,
    quantized_layers,
    rounding,
    unquantized_bytes,
)

CONTEXT_BYTES = 720 * MIB
"""CUDA context (619 MiB), cuBLAS (66) and kernels that are loaded when they are first used: measured on an H200. Not in
PyTorch's own count."""
NCCL_BYTES = (490 * MIB, 688 * MIB)
"""Memory of one communicator with one rank, measured on an H200, and with more than two on NVLink (NVIDIA/nccl#964).
Not in
PyTorch's own count."""
COMMUNICATORS = 2
"""The trainer's own collectives, and DeepSpeed's."""
FRAGMENTATION = 0.04
"""Share of what is allocated that lies between blocks, unusable. Measured on an H200: 0.2 to 4%, and where scores are
written out up to one tensor of them more, since freed blocks of that size are not cut up."""
PERSISTENT = 100_000
"""Elements up to which ZeRO-3 keeps a parameter whole: ``stage3_param_persistence_threshold``."""
MOST_LIVE = 1_000_000_000
"""Elements that ZeRO-3 keeps gathered at once: ``stage3_max_live_parameters``."""


class Moment(StrEnum):
    LOADING = "Loading"
    LOSS = "Loss"
    BACKWARD = "Backward"
    UPDATE = "Update"


@dataclass(frozen=True)
class EstimateInput:
    """Input of an estimate: one choice of everything that memory depends on."""

    shape: ModelShape
    lora: LoRASpec
    quantization: QuantizationSpec
    optimizer: Optimizer
    parallelism: ParallelismSpec
    world_size: int
    rows: tuple[int, ...]
    """Tokens of each row of a micro-batch."""
    checkpointing: bool
    accumulates: bool = True
    """More than one micro-batch an update: gradients of the ones before are there."""
    targets: int | None = None
    """Tokens that count; None: all."""
    cuda: bool = True
    """False: a CPU rank, where nothing but tensors counts."""
    flash: bool = True
    """The GPU has flash attention; without it each row is a call of memory-efficient attention."""
    software: Software = OURS


@dataclass(frozen=True)
class MemoryEstimate:
    """Predicted bytes of one rank on a GPU."""

    moments: dict[Moment, dict[MemoryComponent, int]]
    """Bytes that PyTorch allocates at each moment, by component."""
    context_bytes: int
    """CUDA context and NCCL."""
    fragmentation_bytes: int
    paged_bytes: int
    """The part of the optimizer's state that may move to host memory under pressure; PyTorch does not count it."""
    host_bytes: int
    """In host memory, with offload."""

    @property
    def highest(self) -> Moment:
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def peak_bytes(self) -> int:
        """Highest allocation, paged optimizer state included."""
        return sum(self.moments[self.highest].values())

    @property
    def allocated_bytes(self) -> int:
        """Return the expected ``torch.cuda.max_memory_allocated``: without paged state, which CUDA itself manages."""
        return self.peak_bytes - self.paged_bytes

    @property
    def needed_bytes(self) -> int:
        """Return the bytes that the GPU must have."""
        return self.peak_bytes + self.context_bytes + self.fragmentation_bytes

    @property
    def components(self) -> dict[MemoryComponent, int]:
        """Bytes at the highest moment, by component, with what PyTorch does not count; zeros left out."""
        found = dict(self.moments[self.highest])
        found[MemoryComponent.CUDA_CONTEXT] = self.context_bytes
        found[MemoryComponent.FRAGMENTATION] = self.fragmentation_bytes
        return {component: size for component, size in found.items() if size}

    def as_status(self) -> dict[str, int]:
        """For ``status.memory.predicted``: components at the highest moment, and the peak that will be measured.

        On a CPU without the peak: there the whole process is measured, libraries included.
        """
        peak = {str(MemoryComponent.PEAK): self.allocated_bytes} if self.context_bytes else {}
        return {str(component): size for component, size in self.components.items()} | peak


def estimate(run: EstimateInput, gpu: Gpu | None = None) -> MemoryEstimate:
    """Predict the memory of one rank.

    Args:
        run: all that it depends on.
        gpu: adds cuBLAS workspaces; None: those of cards before Hopper.

    """
    adapter = AdapterShape(run.shape, run.lora)
    state = training_state(adapter, run.optimizer, run.parallelism, run.world_size, cuda=run.cuda)
    full = weights(run, adapter)
    held = _partitioned(run, adapter, full) if run.parallelism.zero_stage == 3 else full
    workspace = (gpu.workspace_bytes if gpu else 2 * CUBLAS_BYTES) if run.cuda else 0
    always = held | {MemoryComponent.LIBRARY_WORKSPACES: workspace, MemoryComponent.OPTIMIZER_STATE: state.optimizer}
    always[MemoryComponent.COLLECTIVE_BUFFERS] = _gathered(run) + state.backward_buffers
    forward = _activations(run, adapter)
    gradients = state.accumulating if run.accumulates else 0
    moments = {
        Moment.LOADING: full | {MemoryComponent.DEQUANTIZED_WEIGHTS: _while_loading(run)},
        Moment.LOSS: always | _while_loss(run, state, forward, gradients),
        Moment.BACKWARD: always | _while_backward(run, adapter, forward, gradients),
        Moment.UPDATE: always | _while_update(run, state),
    }
    peak = max(sum(sizes.values()) for sizes in moments.values())
    return MemoryEstimate(
        moments=moments,
        context_bytes=CONTEXT_BYTES + COMMUNICATORS * NCCL_BYTES[run.world_size > 1] if run.cuda else 0,
        fragmentation_bytes=int(FRAGMENTATION * peak) + _scores(run) if run.cuda else 0,
        paged_bytes=state.paged if run.cuda else 0,
        host_bytes=state.host,
    )


def weights(run: EstimateInput, adapter: AdapterShape) -> dict[MemoryComponent, int]:
    """Return the bytes of the base and the adapter, whole."""
    quantization, linears = run.quantization, quantized_layers(run.shape, run.quantization)
    unquantized = unquantized_bytes(run.shape, quantization, adapter)
    if run.software.fp32_embeddings:
        head = 0 if run.shape.head.tied else run.shape.head.linear.elements
        unquantized += (4 - compute_width(quantization)) * (run.shape.embeddings + head + run.shape.norms)
    return {
        MemoryComponent.QUANTIZED_WEIGHTS: sum(quantized_bytes(i, quantization) for i in linears),
        MemoryComponent.QUANTIZATION_CONSTANTS: sum(
            constant_bytes(i, quantization) + (rounding(i, quantization) if run.cuda else 0) for i in linears
        ),
        MemoryComponent.UNQUANTIZED_WEIGHTS: unquantized,
        MemoryComponent.ADAPTER_WEIGHTS: adapter.bytes,
    }


def _while_loading(run: EstimateInput) -> int:
    """Return the bytes of the largest layer or expert in 16 bits, and of the fp32 constants of all experts of a layer.

    ``qlora_trainer.model.experts.packed.Packer`` takes one expert after another.
    """
    width = compute_width(run.quantization)
    experts = [
        width * i.inputs * i.outputs + 4 * i.elements // BLOCK
        for i in run.shape.experts
        if run.quantization.type.is_four_bit and not run.quantization.skips(i.name)
    ]
    return max(width * run.shape.largest, *experts, 0)


def _setting(run: EstimateInput, adapter: AdapterShape, *, dequantizes: bool = True) -> ForwardSetting:
    return ForwardSetting(
        adapter=adapter,
        quantization=run.quantization,
        rows=run.rows,
        cuda=run.cuda,
        flash=run.flash,
        dequantizes=dequantizes,
        targets=run.targets,
        software=run.software,
    )


def _activations(run: EstimateInput, adapter: AdapterShape) -> Activations:
    return activations(run.shape, _setting(run, adapter), checkpointing=run.checkpointing)


def _scores(run: EstimateInput) -> int:
    """Return the bytes of one tensor of scores in fp32, where they are written out."""
    attention, tokens = run.shape.layers[0].attention, sum(run.rows)
    return 4 * attention.heads * tokens * tokens if attention.kind is AttentionKind.EAGER else 0


def _while_loss(
    run: EstimateInput, state: TrainingState, forward: Activations, gradients: int
) -> dict[MemoryComponent, int]:
    """Stage 2 has its buckets in the backward pass alone; the others keep them (``stage_1_and_2.setup_buckets``)."""
    buckets = 0 if run.parallelism.zero_stage == 2 else state.backward_buffers
    return {
        MemoryComponent.COLLECTIVE_BUFFERS: _gathered(run) + buckets,
        MemoryComponent.ACTIVATIONS: forward.stored + forward.inputs,
        MemoryComponent.LOGITS: forward.loss,
        MemoryComponent.GRADIENTS: gradients,
    }


def _while_backward(
    run: EstimateInput, adapter: AdapterShape, forward: Activations, gradients: int
) -> dict[MemoryComponent, int]:
    """The dequantized weight counts as far as the peak would be lower without it."""
    without = activations(run.shape, _setting(run, adapter, dequantizes=False), checkpointing=run.checkpointing)
    return {
        MemoryComponent.ACTIVATIONS: forward.stored + forward.inputs,
        MemoryComponent.BACKWARD_WORKSPACE: without.layer,
        MemoryComponent.DEQUANTIZED_WEIGHTS: forward.layer - without.layer,
        MemoryComponent.GRADIENTS: gradients,
    }


def _while_update(run: EstimateInput, state: TrainingState) -> dict[MemoryComponent, int]:
    return {
        MemoryComponent.GRADIENTS: state.gradients,
        MemoryComponent.COLLECTIVE_BUFFERS: _gathered(run) + state.step_buffers,
    }


# --------------------------------------------------------------------------------------------------------- ZeRO stage 3


def _storage_elements(linear: Linear, quantization: QuantizationSpec) -> int:
    """Elements as ZeRO-3 sees them: four packed weights are one bf16 number (``bnb_4bit_quant_storage``)."""
    if quantization.type is QuantizationType.NONE:
        return linear.elements
    return -(-quantized_bytes(linear, quantization) // compute_width(quantization))


def _partitioned(
    run: EstimateInput, adapter: AdapterShape, full: dict[MemoryComponent, int]
) -> dict[MemoryComponent, int]:
    """One rank's share of the weights: tensors above 100,000 elements are divided, smaller ones and constants not.

    The adapter's own partition is in the optimizer's state. deepspeed.runtime.zero.parameter_offload.
    """
    linears = quantized_layers(run.shape, run.quantization)
    large = [i for i in linears if _storage_elements(i, run.quantization) > PERSISTENT]
    divided = sum(quantized_bytes(i, run.quantization) for i in large)
    beside = compute_width(run.quantization) * _large_unquantized(run)
    keep = 1 - 1 / run.world_size
    return full | {
        MemoryComponent.QUANTIZED_WEIGHTS: full[MemoryComponent.QUANTIZED_WEIGHTS] - int(keep * divided),
        MemoryComponent.UNQUANTIZED_WEIGHTS: full[MemoryComponent.UNQUANTIZED_WEIGHTS] - int(keep * beside),
        MemoryComponent.ADAPTER_WEIGHTS: 4 * sum(n for n in adapter.tensors if n <= PERSISTENT),
    }


def _large_unquantized(run: EstimateInput) -> int:
    """Elements of unquantized tensors that are divided."""
    shape = run.shape
    table = shape.head.linear.elements
    sizes = [table, shape.embeddings - table, *([] if shape.head.tied else [table])]
    quantized = {layer.name for layer in quantized_layers(shape, run.quantization)}
    sizes += [layer.elements for layer in (*shape.linears, *shape.experts) if layer.name not in quantized]
    return sum(size for size in sizes if size > PERSISTENT)


def _gathered(run: EstimateInput) -> int:
    """Parameters that ZeRO-3 holds gathered while they are used."""
    if run.parallelism.zero_stage < 3:
        return 0
    packed = sum(_storage_elements(i, run.quantization) for i in quantized_layers(run.shape, run.quantization))
    elements = _large_unquantized(run) + packed
    return compute_width(run.quantization) * min(elements, MOST_LIVE)
