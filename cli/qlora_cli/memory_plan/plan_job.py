"""``qlora plan``: what a job needs on a GPU and how long it takes, from its manifest and kilobytes of its base."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qlora_api.errors import FieldError
from qlora_cli.local import machine
from qlora_cli.manifest import job_manifest
from qlora_cli.memory_plan.chart_profiles import gpu_of_profile
from qlora_cli.memory_plan.model_headers import read_config, read_model
from qlora_memory import (
    GPUS,
    Cost,
    NoFit,
    Plan,
    PlanRequest,
    Span,
    check_gpu,
    cost,
    does_not_fit,
    gpu_named,
    gpu_of_device,
    model_shape,
    plan,
    planned_coverage,
    remedies,
    skipped_bytes,
)
from qlora_memory.planning.remedies import changed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from qlora_api.job import QLoRAJob
    from qlora_api.spec import QLoRAJobSpec, QuantizationSpec, SchedulingSpec
    from qlora_cli.memory_plan.model_headers import ModelFiles
    from qlora_memory import Gpu

RANKS = (4, 8, 16, 32, 64, 128, 256)
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)


@dataclass(frozen=True)
class PlanOptions:
    """Options of a plan besides the manifest."""

    gpu: str | None = None
    gpus: int | None = None
    price: float | None = None
    """Price of one GPU-hour."""
    tokens: int | None = None
    """Real tokens of one epoch; None: unknown, or maxSteps says how many."""
    what_if: bool = False
    model_config: Path | None = None
    profiles: Path | None = None
    """Values of the operator's chart, whose profiles say which GPU a job gets."""


@dataclass(frozen=True)
class Variation:
    """One row of the what-if: what differs, and what comes of it."""

    kind: str
    """gpu, rank or maxLength."""
    value: str
    chosen: bool
    """Is what the job says."""
    outcome: Plan | NoFit
    cost: Cost | None


@dataclass(frozen=True)
class PlanResult:
    """All that is shown."""

    job: str
    request: PlanRequest
    place: str
    """Description of the place that the base was read from."""
    outcome: Plan | NoFit
    cost: Cost | None
    tokens: int | None
    """Tokens of the whole training, over all epochs; None if unknown."""
    price: float | None
    variations: tuple[Variation, ...]

    @property
    def fits(self) -> bool:
        return isinstance(self.outcome, Plan)


def answer(path: Path, options: PlanOptions, overrides: Sequence[str] = ()) -> PlanResult:
    """Plan the job of a manifest.

    Raises:
        ValueError: an error of the user's, in words.

    """
    return plan_of(job_manifest.one_job(path, overrides), options)


def plan_of(job: QLoRAJob, options: PlanOptions) -> PlanResult:
    """Plan a job.

    Raises:
        ValueError: an error of the user's, in words.

    """
    gpu, here = _gpu(options, job.spec.scheduling)
    check_gpu(gpu, job.spec.quantization, "--gpu")
    world_size = options.gpus or here or job.spec.parallelism.workers * job.spec.parallelism.gpus_per_worker
    files = _files(job.spec, options)
    request = PlanRequest(job.spec, model_shape(files.config, files.tensors, job.spec.model.source), gpu, world_size)
    outcome = plan(request)
    tokens = training_tokens(job.spec, options.tokens)
    return PlanResult(
        job=job.metadata.name,
        request=request,
        place=files.place,
        outcome=outcome,
        cost=_cost(outcome, request, tokens, options.price),
        tokens=tokens,
        price=options.price,
        variations=tuple(_variations(request, tokens, options.price)) if options.what_if else (),
    )


def _gpu(options: PlanOptions, scheduling: SchedulingSpec) -> tuple[Gpu, int | None]:
    """The GPU that is named, by itself or by the job's profile, or that of this machine and how many there are."""
    if options.gpu is not None:
        return gpu_named(options.gpu), None
    if options.profiles is not None:
        return gpu_named(gpu_of_profile(scheduling, options.profiles), "gpu"), None
    if scheduling.profile is not None:
        raise FieldError(
            "--gpu",
            None,
            f'is required, as spec.scheduling.profile "{scheduling.profile}" is a profile of a cluster: name the GPU '
            "of it, or the chart's values with --profiles",
        )
    found = machine.look().gpus
    if not found:
        raise FieldError("--gpu", None, f"is required, as this machine has no GPU; there are {', '.join(GPUS)}")
    least = min(found, key=lambda gpu: gpu.memory_bytes)
    return gpu_of_device(least.name, least.memory_bytes), len(found)


def _files(spec: QLoRAJobSpec, options: PlanOptions) -> ModelFiles:
    return read_model(spec.model.source) if options.model_config is None else read_config(options.model_config)


def training_tokens(spec: QLoRAJobSpec, of_an_epoch: int | None) -> int | None:
    """Tokens over the whole training: of all epochs, or the most that maxSteps can see."""
    if spec.training.epochs is not None:
        return spec.training.epochs * of_an_epoch if of_an_epoch is not None else None
    return (spec.training.max_steps or 0) * spec.training.global_batch_size * spec.dataset.max_length


def _cost(outcome: Plan | NoFit, request: PlanRequest, tokens: int | None, price: float | None) -> Cost | None:
    if tokens is None or not isinstance(outcome, Plan):
        return None
    return cost(outcome.seconds_per_token, tokens, request.world_size, price)


def _variations(request: PlanRequest, tokens: int | None, price: float | None) -> Iterator[Variation]:
    """Other GPUs, ranks and sequence lengths, each by itself."""
    spec = request.spec
    cases: list[tuple[str, str, bool, PlanRequest]] = [
        ("gpu", gpu.name, gpu == request.gpu, replace(request, gpu=gpu))
        for gpu in GPUS.values()
        if _suits(gpu, spec.quantization)
    ]
    cases += [
        ("rank", str(rank), rank == spec.lora.rank, _with(request, "lora", rank=rank))
        for rank in sorted({*RANKS, spec.lora.rank})
    ]
    most = request.shape.max_positions or max(LENGTHS)
    cases += [
        ("maxLength", str(length), length == spec.dataset.max_length, _with(request, "dataset", max_length=length))
        for length in sorted({*LENGTHS, spec.dataset.max_length})
        if length <= most
    ]
    for kind, value, chosen, asked in cases:
        outcome = plan(asked)
        yield Variation(kind, value, chosen, outcome, _cost(outcome, asked, tokens, price))


def _suits(gpu: Gpu, quantization: QuantizationSpec) -> bool:
    try:
        check_gpu(gpu, quantization)
    except FieldError:
        return False
    return True


def _with(request: PlanRequest, group: str, **values: Any) -> PlanRequest:
    return replace(request, spec=changed(request.spec, group, **values))


# ------------------------------------------------------------------------------------------------------------- as JSON


def as_dict(answered: PlanResult) -> dict[str, Any]:
    """For programs."""
    request, outcome = answered.request, answered.outcome
    chosen = outcome if isinstance(outcome, Plan) else outcome.smallest
    shape = request.shape
    covered = planned_coverage(shape, request.spec.lora, request.spec.quantization)
    count, added = skipped_bytes(shape, request.spec.quantization)
    shown: dict[str, Any] = {
        "job": answered.job,
        "fits": answered.fits,
        "model": {
            "read": answered.place,
            "type": shape.model_type,
            "parameters": shape.parameters,
            "linearLayers": len(shape.linears),
            "activationsModelled": shape.modelled,
            "quantizedShare": round(covered.quantized / covered.weights, 6),
            "skippedLayers": count,
            "skippedBytes": added,
            "adaptedLayers": covered.adapted_layers,
            "expertLayers": covered.groups,
            "adaptedExpertLayers": covered.adapted_groups,
        },
        "gpu": {"name": request.gpu.name, "memoryBytes": request.gpu.memory_bytes, "count": request.world_size},
        **_plan_dict(chosen),
        "tokens": answered.tokens,
        "cost": _cost_dict(answered.cost),
        "notes": list(chosen.notes),
    }
    if isinstance(outcome, NoFit):
        shown["message"] = str(does_not_fit(request, outcome))
        shown["remedies"] = [
            {"field": r.field, "value": r.value, "neededBytes": r.plan.memory.needed_bytes} for r in remedies(request)
        ]
    if answered.variations:
        shown["whatIf"] = [_variation_dict(v) for v in answered.variations]
    return shown


def _plan_dict(chosen: Plan) -> dict[str, Any]:
    memory = chosen.memory
    return {
        "batch": chosen.batch.to_json_dict(),
        "computeType": chosen.compute_type,
        "gradientCheckpointing": chosen.gradient_checkpointing,
        "memory": {
            "components": {str(component): size for component, size in memory.components.items()},
            "highestMoment": memory.highest,
            "moments": {
                str(moment): {str(component): size for component, size in sizes.items() if size}
                for moment, sizes in memory.moments.items()
            },
            "peakBytes": memory.allocated_bytes,
            "neededBytes": memory.needed_bytes,
            "hostBytes": memory.host_bytes,
        },
        "tokensPerSecondPerGpu": _span_dict(_speed(chosen)),
    }


def _speed(chosen: Plan) -> Span:
    seconds = chosen.seconds_per_token
    return Span(1 / seconds.high, 1 / seconds.expected, 1 / seconds.low)


def _span_dict(span: Span) -> dict[str, float]:
    return {"low": round(span.low, 4), "expected": round(span.expected, 4), "high": round(span.high, 4)}


def _cost_dict(found: Cost | None) -> dict[str, Any] | None:
    if found is None:
        return None
    money = {} if found.money is None else {"money": _span_dict(found.money)}
    return {"hours": _span_dict(found.hours), "gpuHours": _span_dict(found.gpu_hours), **money}


def _variation_dict(variation: Variation) -> dict[str, Any]:
    outcome = variation.outcome
    chosen = outcome if isinstance(outcome, Plan) else outcome.smallest
    return {
        "kind": variation.kind,
        "value": variation.value,
        "chosen": variation.chosen,
        "fits": isinstance(outcome, Plan),
        "microBatchSize": chosen.batch.micro_batch_size,
        "gradientCheckpointing": chosen.gradient_checkpointing,
        "neededBytes": chosen.memory.needed_bytes,
        "tokensPerSecondPerGpu": round(1 / chosen.seconds_per_token.expected, 1),
        "cost": _cost_dict(variation.cost),
    }
