"""The end of a run: the best adapter, exported in PEFT's layout, gated and published by rank 0."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from qlora_api.spec import Merge
from qlora_api.status import Adapter, TaskResult
from qlora_trainer.checkpoint import engine_state
from qlora_trainer.checkpoint.checkpoint_store import unpack_tensors
from qlora_trainer.errors import CheckpointError
from qlora_trainer.model.base_model import meta_model
from qlora_trainer.model.coverage import coverage_of
from qlora_trainer.model.experts.targets import name_text_alone
from qlora_trainer.model.loading.read_weights import notes_of
from qlora_trainer.model.tokenizer import load_tokenizer
from qlora_trainer.publish.merge_adapter import merge
from qlora_trainer.publish.publisher import PublishFacts, publish
from qlora_trainer.reporting.training_history import PUBLISHED_FILE
from qlora_trainer.storage.authentication import Authenticator
from qlora_trainer.training.context import RunState, TrainingContext
from qlora_trainer.training.merged_loss import sample_loss


def publish_run(context: TrainingContext, run: RunState, tasks: Sequence[TaskResult]) -> Adapter:
    """Publish the best checkpoint by eval loss, or the last one where nothing was evaluated. Rank 0 alone calls it."""
    config, prepared = context.config, context.prepared
    chosen = context.checkpoints.chosen()
    if chosen is None:
        raise CheckpointError(f"no checkpoint to publish in {config.checkpoint_uri}")
    if context.data.eval is None and chosen.step != run.step:
        raise CheckpointError(
            f"the checkpoint at step {run.step}, the last one, is broken; step {chosen.step} is whole"
        )
    # Beside the base, for a merged model is as large; a pod's /tmp is small.
    with tempfile.TemporaryDirectory(prefix="qlora-publish-", dir=config.cache_dir) as name:
        folder = Path(name)
        tensors = unpack_tensors(chosen.read(engine_state.ADAPTER_FILE))
        export_adapter(context.model, tensors, folder / "adapter", prepared.model_source, prepared.model_revision)
        tokenizer = load_tokenizer(prepared.model_path, config.spec.dataset.chat_template)
        tokenizer.save_pretrained(folder / "adapter")
        covered = coverage_of(context.model)
        receipt = context.data.receipt.model_dump(mode="json", by_alias=True)
        receipt["notes"] = [*receipt["notes"], *notes_of(prepared.model_path), *covered.notes]
        memory = context.recorder.report.memory
        context.history.end(receipt, memory.predicted, memory.measured)
        (folder / "adapter" / PUBLISHED_FILE).write_bytes(context.history.to_bytes())
        if config.spec.output.merge is Merge.BFLOAT16:
            rows, beat = context.data.eval or context.data.train, context.ranks.heartbeat.beat
            loss_of = partial(sample_loss, rows=rows, beat=beat)
            merge(prepared.model_path, folder / "adapter", folder / "merged", loss_of)
            tokenizer.save_pretrained(folder / "merged")
        facts = PublishFacts(
            spec=config.spec,
            base_revision=prepared.model_revision,
            step=chosen.step,
            total_steps=context.total_steps,
            tokens=run.tokens,
            base_eval_loss=run.base_eval_loss,
            eval_loss=chosen.eval_loss,
            quantized=covered.held,
            adapted=covered.adapted,
            adapts_experts=covered.adapted_groups > 0,
            tasks=tuple(tasks),
        )
        prepared.check_unchanged()
        skeleton = meta_model(prepared.model_path, whole=True)
        layers = [name for names in (skeleton.named_modules(), skeleton.named_parameters()) for name, _ in names]
        place, beat = config.spec.output.destination, context.ranks.heartbeat.beat
        beat()
        return publish(
            place,
            config.job,
            config.attempt,
            folder,
            facts,
            base_names=layers,
            skeleton=skeleton,
            beat=beat,
            authenticator=Authenticator.of(config),
        )


def export_adapter(model: Any, tensors: dict[str, Tensor], folder: Path, base: str, revision: str) -> None:
    """Write adapter_model.safetensors and adapter_config.json as PEFT itself does, from weights taken elsewhere.

    Args:
        model: the PEFT model; only its configuration is used.
        tensors: the adapter's weights by PEFT's names.
        folder: made if missing.
        base: what the adapter was trained on, for ``base_model_name_or_path``.
        revision: of that.

    """
    peft_config = model.peft_config[model.active_adapter]
    peft_config.base_model_name_or_path = base.removeprefix("hf://").partition("@")[0]
    peft_config.revision = revision if base.startswith("hf://") else None
    if peft_config.target_parameters:
        peft_config.lora_dropout = 0.0  # of use in training alone, and PEFT does not load parameters with it
    name_text_alone(peft_config, model.get_base_model())
    model.save_pretrained(folder, state_dict=tensors, save_embedding_layers=False)
