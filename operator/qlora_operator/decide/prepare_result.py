"""Write Prepare's result into status, with a message: rows, memory, hours and cost. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from qlora_api.status import ConditionType, Memory, PrepareResult, QLoRAJobStatus, Reason
from qlora_memory.gpus import GPU_PRODUCT
from qlora_operator.decide.conditions import with_condition
from qlora_operator.decide.decision import Context
from qlora_operator.manifests.profiles import device_of, gpu_of, profile_of

GPU_NOT_KNOWN = (
    "GPU not known: memory was not planned; set gpu in the job's profile or trainer.gpu in the chart, or "
    f"{GPU_PRODUCT} in spec.scheduling.nodeSelector"
)


NOT_PREPARED = (
    "Prepare ended well without a result that is this job's: no termination message that can be read, or a plan for "
    "other ranks or another batch; is trainer.image of this version?"
)


def is_for(context: Context, result: PrepareResult) -> bool:
    """Return whether a result is a plan for the job's ranks and batch: pods are made by it."""
    batch = result.batch
    return (batch.world_size, batch.global_batch_size) == (
        context.world_size,
        context.job.spec.training.global_batch_size,
    )


def with_correction(context: Context, status: QLoRAJobStatus) -> QLoRAJobStatus:
    """Note by what the one that plans, who is told now, multiplies its bytes."""
    factor = context.observed.memory_correction
    return status.model_copy(update={"memory_correction": None if factor == 1 else f"{factor:.4f}"})


def with_prepared(context: Context, status: QLoRAJobStatus, result: PrepareResult) -> QLoRAJobStatus:
    """Take in what Prepare found."""
    cost = expected_cost(context, result)
    update = {"prepared": result, "memory": Memory(predicted=result.memory), "expected_cost": cost}
    status = status.model_copy(update=update)
    text = ", ".join(_words(context, result, cost))
    return with_condition(context, status, ConditionType.PREPARED, Reason.PREPARED, text, is_true=True)


def expected_cost(context: Context, result: PrepareResult) -> str | None:
    """Money for all GPU-hours; None where hours or price are not known."""
    price = context.config.price_of(gpu_of(context.job.spec, context.config))
    hours = result.expected_gpu_hours
    return None if hours is None or price is None else f"{float(hours) * price:.2f}"


def _is_gpu_unknown(context: Context) -> bool:
    """Return whether neither the operator's settings, nor the profile, nor the job name the GPU that a rank gets."""
    spec, profile = context.job.spec, profile_of(context.job.spec, context.config)
    selectors = (spec.scheduling.node_selector, profile.node_selector if profile else {})
    named = (profile and profile.gpu) or any(GPU_PRODUCT in selector for selector in selectors)
    return device_of(spec, context.config) == "CUDA" and not named


def _words(context: Context, result: PrepareResult, cost: str | None) -> Iterator[str]:
    yield f"{result.train_rows} rows"
    yield f"{result.train_tokens} tokens"
    yield f"model revision {result.model_revision[:12]}"
    if (hours := result.expected_gpu_hours) is None:
        if _is_gpu_unknown(context):
            yield GPU_NOT_KNOWN
        return
    yield f"about {float(hours):.3g} GPU-hours" + (f" for {cost}" if cost else "")
    budget = context.job.spec.policy.budget_gpu_hours
    if budget is not None and float(budget) < float(hours):
        yield f"more than spec.policy.budgetGpuHours ({budget}): the job will be suspended before it has finished"
