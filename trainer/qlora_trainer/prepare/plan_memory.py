"""Plan what a job's ranks will need, and how its batch is cut so that it fits: ``qlora_memory`` asked about one base.

Light to import: Prepare asks again for each job, also where everything else was found before.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from math import isclose
from typing import TYPE_CHECKING

from qlora_api.errors import FieldError
from qlora_memory import (
    GPUS,
    AdapterShape,
    NoFit,
    PlanRequest,
    base_bytes,
    check_gpu,
    cost,
    counted_shape,
    does_not_fit,
    estimate,
    model_shape,
    plan,
    run_of,
)
from qlora_memory.shape.on_disk import dequantized, on_disk
from qlora_memory.shape.read_shape import is_known
from qlora_trainer.errors import UserError
from qlora_trainer.storage.model_files import CONFIG, weight_infos

if TYPE_CHECKING:
    from pathlib import Path

    from qlora_api.batch import BatchSplit
    from qlora_api.contract import PrepareReceipt, TrainerConfig
    from qlora_api.spec import QLoRAJobSpec
    from qlora_memory import Gpu, ModelShape, WeightCounts

log = logging.getLogger(__name__)
AGREED = 1e-3
"""Largest share by which the formulas of a model type may differ from what is counted on the model."""


@dataclass(frozen=True)
class Planned:
    """Start settings of a job."""

    batch: BatchSplit
    gradient_checkpointing: bool
    memory: dict[str, int]
    """Predicted bytes of one rank by component; empty for a base whose shape cannot be told."""
    gpu_hours: float | None
    """Expected, of all GPUs together; None where the GPU is not known."""


def shape_of(folder: Path, source: str | None = None) -> ModelShape | None:
    """The shape of the base in a folder; None for a kind of model that cannot be made out.

    Raises:
        UserError: its weights are not those that its configuration speaks of.

    """
    config = json.loads((folder / CONFIG).read_bytes())
    tensors = weight_infos(folder)
    try:
        dequantized(config, tensors)  # of any kind of model: what cannot be read ends here
    except FieldError as error:
        raise UserError(error.field, None, error.allowed) from None
    try:
        return model_shape(config, tensors, source)
    except FieldError as error:
        if is_known(config):
            raise UserError(error.field, None, error.allowed) from None
        log.warning("the memory of this base cannot be planned: %s", error.allowed)
        return None


def agreed_shape(folder: Path, shape: ModelShape | None, counts: WeightCounts, spec: QLoRAJobSpec) -> ModelShape | None:
    """Return a shape with the weights of the model itself; None where it cannot be planned.

    The known shape stays where its weights and adapter agree with what was counted, since it knows the activations too.

    Args:
        folder: of the base.
        shape: as the names of its tensors tell it.
        counts: of the weights on the model itself.
        spec: of the job.

    """
    config = json.loads((folder / CONFIG).read_bytes())
    if on_disk(config) is not None:  # its layers are quantized as it says, not as they were counted
        return shape
    try:
        counted = counted_shape(config, counts)
        found = _held_bytes(counted, spec)
    except FieldError as error:
        log.warning("the memory of this base cannot be counted: %s", error.allowed)
        return shape
    if shape is None or not shape.modelled:
        return counted
    try:
        formula = _held_bytes(shape, spec)
    except FieldError:  # it lacks a layer that the job names
        return counted
    if all(isclose(a, b, rel_tol=AGREED) for a, b in zip(formula, found, strict=True)):
        return shape
    log.warning(
        "the base takes %d bytes and its adapter %d, as counted on the model; its model type tells %d and %d",
        *found,
        *formula,
    )
    return counted


def _held_bytes(shape: ModelShape, spec: QLoRAJobSpec) -> tuple[int, int]:
    """Return the bytes of the base's weights and of the adapter."""
    adapter = AdapterShape(shape, spec.lora)
    return base_bytes(shape, spec.quantization, adapter), adapter.bytes


def plan_job(config: TrainerConfig, shape: ModelShape | None, receipt: PrepareReceipt) -> Planned:
    """Cut the batch for the GPU that the ranks will get.

    Where there is none, or it is not known which, everything is as the job and its starter have it.

    Raises:
        UserError: the trainer cannot use that GPU, or nothing that the job allows fits it; says what would.

    """
    gpu = GPUS.get(config.gpu or "")
    try:
        if gpu is not None:
            check_gpu(gpu, config.spec.quantization)
        return _planned(config, shape, gpu, receipt)
    except FieldError as error:
        raise UserError(error.field, error.value, error.allowed) from None


def _planned(config: TrainerConfig, shape: ModelShape | None, gpu: Gpu | None, receipt: PrepareReceipt) -> Planned:
    if shape is None or gpu is None:
        rows = (longest_of(config, receipt),) * config.batch.micro_batch_size
        memory = predicted(config, shape, rows) if shape else {}
        return Planned(config.batch, config.gradient_checkpointing, memory, None)
    request = PlanRequest(
        spec=config.spec,
        shape=shape,
        gpu=gpu,
        world_size=config.batch.world_size,
        longest=longest_of(config, receipt),
        correction=config.memory_correction,
    )
    outcome = plan(request)
    if isinstance(outcome, NoFit):
        raise does_not_fit(request, outcome)
    expected = cost(outcome.seconds_per_token, tokens_of(config, receipt), config.batch.world_size, None)
    return Planned(
        outcome.batch, outcome.gradient_checkpointing, outcome.memory.as_status(), expected.gpu_hours.expected
    )


def predicted(
    config: TrainerConfig, shape: ModelShape, rows: tuple[int, ...], targets: int | None = None
) -> dict[str, int]:
    """Bytes of one rank by component, with the batch as it is cut in ``config``.

    Args:
        config: of the attempt.
        shape: of its base.
        rows: tokens of each row of the largest micro-batch.
        targets: how many of them count; None: all.

    """
    gpu = GPUS.get(config.gpu or "")
    run = run_of(
        config.spec,
        shape,
        config.batch,
        checkpointing=config.gradient_checkpointing,
        row=max(rows),
        cuda=config.device == "CUDA",
        gpu=gpu,
    )
    return estimate(replace(run, rows=rows, targets=targets), gpu).as_status()


def longest_of(config: TrainerConfig, receipt: PrepareReceipt) -> int:
    """Tokens of the longest sequence that a micro-batch is made of: a full pack, or the longest row."""
    most = config.spec.dataset.max_length
    return min(most, receipt.train_tokens if config.spec.dataset.packing else receipt.longest)


def tokens_of(config: TrainerConfig, receipt: PrepareReceipt) -> int:
    """Real tokens of the whole training, over all epochs."""
    training = config.spec.training
    if training.max_steps is None:
        return (training.epochs or 0) * receipt.train_tokens
    sequence = receipt.train_tokens / max(1, receipt.train_sequences)
    return round(training.max_steps * training.global_batch_size * sequence)
