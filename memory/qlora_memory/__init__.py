"""The memory of a training, known before a GPU is held.

``config.json`` and safetensors headers → :func:`model_shape` → :func:`plan` → a :class:`Plan` (micro-batch,
checkpointing, bytes by component), or a :class:`NoFit` and :func:`does_not_fit`, which says what would. One formula for
each component, each with its source: docs/explanation/memory.md. Imports pydantic alone.

===================  ========================================================================
headers              safetensors headers, from bytes
families, unknown    ``config.json`` → :class:`ModelShape`
weights              base and adapter
optimizer            gradients, optimizer state, ZeRO, offload, collectives
tape, parts, attend, activations, logits and the backward pass's own, by writing each layer
experts, activations on a tape of what autograd keeps
estimate             all of it, at the moments that can be the highest
gpus, cost           GPUs without having one; time and money
planner, remedies    choose; say what would fit
===================  ========================================================================
"""

from qlora_memory.coverage import Coverage, check_skip_modules, planned_coverage
from qlora_memory.estimate import EstimateInput, MemoryEstimate, Moment, estimate
from qlora_memory.gpus import GPUS, Gpu, check_gpu, gpu_named, gpu_of_device, resolved
from qlora_memory.planning.cost import Cost, Span, cost, flop_per_token
from qlora_memory.planning.planner import NoFit, Plan, PlanRequest, plan, plan_of, run_of
from qlora_memory.planning.remedies import Remedy, does_not_fit, remedies
from qlora_memory.shape.model_shape import ModelShape
from qlora_memory.shape.read_shape import counted_shape, model_shape
from qlora_memory.shape.safetensors_headers import (
    HeaderError,
    TensorInfo,
    header_length,
    parse_header,
    shard_names,
    tensor_infos,
)
from qlora_memory.shape.unknown_models import WeightCounts
from qlora_memory.weights import AdapterShape, base_bytes, skipped_bytes

__all__ = [
    "GPUS",
    "AdapterShape",
    "Cost",
    "Coverage",
    "EstimateInput",
    "Gpu",
    "HeaderError",
    "MemoryEstimate",
    "ModelShape",
    "Moment",
    "NoFit",
    "Plan",
    "PlanRequest",
    "Remedy",
    "Span",
    "TensorInfo",
    "WeightCounts",
    "base_bytes",
    "check_gpu",
    "check_skip_modules",
    "cost",
    "counted_shape",
    "does_not_fit",
    "estimate",
    "flop_per_token",
    "gpu_named",
    "gpu_of_device",
    "header_length",
    "model_shape",
    "parse_header",
    "plan",
    "plan_of",
    "planned_coverage",
    "remedies",
    "resolved",
    "run_of",
    "shard_names",
    "skipped_bytes",
    "tensor_infos",
]
