"""Load the model of an attempt: the quantized base, its adapter, and the loss over both."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from qlora_api.spec import QuantizationType
from qlora_trainer.model.base_model import add_lora, enable_gradient_checkpointing, load_base, weight_bytes
from qlora_trainer.model.coverage import coverage_of
from qlora_trainer.model.loading.loading_progress import counted_weights
from qlora_trainer.model.loss import NextTokenLoss, check_rows_alone, head_is_plain, rows_are_apart
from qlora_trainer.model.trained_tokens import find_trained_tokens

if TYPE_CHECKING:
    from qlora_api.contract import TrainerConfig
    from qlora_trainer.prepare.local_copy import PreparedInputs
    from qlora_trainer.ranks import Ranks
    from qlora_trainer.reporting.metrics import MetricsRecorder

log = logging.getLogger(__name__)


def load_model(
    config: TrainerConfig, prepared: PreparedInputs, ranks: Ranks, recorder: MetricsRecorder
) -> NextTokenLoss:
    """Load the base, add the adapter, and find out whether the model keeps packed rows apart.

    Raises:
        UserError: it does not, and ZeRO 3 would need it to.

    """
    spec = config.spec
    quantizes = spec.quantization.type is not QuantizationType.NONE
    recorder.stage("loading and quantizing the weights" if quantizes else "loading the weights")
    with counted_weights(recorder.count):
        base = load_base(prepared.model_path, spec.quantization, ranks.device, spec.parallelism.zero_stage)
    prepared.check_unchanged()
    recorder.stage("adding the adapter")
    tokens = find_trained_tokens(prepared.model_path, spec.lora, prepared.model_source)
    model = add_lora(base, spec.lora, spec.training.seed, prepared.model_source, tokens)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    model.train()
    recorder.memory(weight_bytes(model))
    if ranks.is_first:
        covered = coverage_of(model)
        log.info("quantized: %s; adapted: %s", covered.held, covered.adapted)
    recorder.stage("checking that packed rows are kept apart")
    loss = NextTokenLoss(model, fused=head_is_plain(model))
    loss.row_by_row = not rows_are_apart(loss, ranks.device)
    if loss.row_by_row:
        check_rows_alone(spec.parallelism.zero_stage, base.config.model_type)
    if loss.row_by_row and ranks.is_first:
        recorder.warn(
            f'{prepared.model_source} is a "{base.config.model_type}" model, which mixes rows that lie end to end: '
            "each row is computed by itself, which is exact and slower"
        )
    return loss
