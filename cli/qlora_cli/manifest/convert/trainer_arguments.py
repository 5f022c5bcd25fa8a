"""Settings that every tool around ``transformers.Trainer`` has, under these names or its own."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_cli.manifest.convert.conversion import Conversion

_SCHEDULES = {
    "cosine": "Cosine",
    "linear": "Linear",
    "constant": "Constant",
    "constant_with_warmup": "Constant",
}
_OPTIMIZERS = {
    "paged_adamw_8bit": "PagedAdamW8Bit",
    "paged_adamw_32bit": "PagedAdamW32Bit",
    "paged_adamw": "PagedAdamW32Bit",
    "adamw_bnb_8bit": "AdamW8Bit",
    "adamw_8bit": "AdamW8Bit",
    "adamw": "AdamW",
    "adamw_torch": "AdamW",
    "adamw_torch_fused": "AdamW",
    "adamw_hf": "AdamW",
}
NOT_NEEDED = (
    *("logging_steps", "logging_strategy", "logging_dir", "logging_first_step", "plot_loss", "disable_tqdm"),
    *("overwrite_output_dir", "overwrite_cache", "save_safetensors", "save_only_model", "do_train", "do_eval"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "dataset_num_proc"),
    *("preprocessing_num_workers", "dataset_processes", "ddp_timeout", "local_rank", "tf32", "resume_from_checkpoint"),
    *("flash_attention", "flash_attn", "attn_implementation", "xformers_attention", "sdp_attention", "use_cache"),
    *("group_by_length", "pad_to_sequence_len", "per_device_eval_batch_size", "eval_batch_size", "debug", "strict"),
    *("gradient_checkpointing_kwargs", "ddp_find_unused_parameters", "load_best_model_at_end", "low_cpu_mem_usage"),
    *("metric_for_best_model", "greater_is_better", "torch_dtype", "dtype", "remove_unused_columns"),
)
"""Have no part in what is learned, or are as they should be without being asked for."""


@dataclass(frozen=True)
class Names:
    """Names of a tool, and its defaults."""

    micro_batch: str = "per_device_train_batch_size"
    micro_batch_default: int = 8
    epochs: str = "num_train_epochs"
    epochs_default: float = 3.0
    learning_rate_default: float = 5e-5
    schedule: str = "lr_scheduler_type"
    schedule_default: str = "linear"
    optimizer: str = "optim"
    fraction: str = ""
    """Argument for the fraction of rows held out for evaluation; empty if the tool has none."""


@dataclass(frozen=True)
class LoraNames:
    """Names of a tool for LoRA, and its defaults."""

    rank: str
    rank_default: int
    alpha_default: int | None
    """None: twice the rank."""
    dropout_default: float
    rank_stabilized: str = "use_rslora"
    dora: str = "use_dora"


def convert_lora(into: Conversion, names: LoraNames) -> None:
    """Convert rank, alpha, dropout and the variants of LoRA."""
    rank = int(into.number(names.rank, names.rank_default))
    into.put("lora.rank", rank)
    into.put("lora.alpha", int(into.number("lora_alpha", names.alpha_default or 2 * rank)))
    into.put_decimal("lora.dropout", "lora_dropout", names.dropout_default)
    into.put("lora.rankStabilized", into.flag(names.rank_stabilized))
    into.put("lora.dora", into.flag(names.dora))


def put_quantization(into: Conversion, bits: int, kind: str, *, double: bool) -> None:
    """Set the quantization of 4, 8 or no bits.

    Args:
        into: gets the fields.
        bits: of a weight; 0: the base stays in 16 bits.
        kind: type of 4 bits, such as ``nf4``.
        double: quantize the constants of 4 bits, too.

    """
    into.put("quantization.type", {4: kind.upper(), 8: "INT8"}.get(bits, "None"))
    if bits == 4:
        into.put("quantization.doubleQuantization", double)


def convert(into: Conversion, names: Names) -> None:
    """Convert batch, length of the training, learning rate, optimizer, evaluation, checkpoints and ZeRO."""
    into.not_needed(*NOT_NEEDED)
    _batch(into, names)
    _length(into, names)
    into.put_decimal("training.learningRate", "learning_rate", names.learning_rate_default)
    into.put_decimal("training.weightDecay", "weight_decay", 0.0)
    into.put_decimal("training.maxGradNorm", "max_grad_norm", 1.0)
    into.put("training.seed", int(into.number("seed", 42)))
    _schedule(into, names)
    _optimizer(into, names)
    _compute_type(into)
    _evaluation(into, names)
    _checkpoints(into)
    _zero(into)
    _reports(into)


def _batch(into: Conversion, names: Names) -> None:
    micro = int(into.number(names.micro_batch, names.micro_batch_default))
    accumulated = int(into.number("gradient_accumulation_steps", 1))
    into.put("training.microBatchSize", micro)
    into.put("training.globalBatchSize", micro * accumulated * into.gpus)
    into.put("parallelism.gpusPerWorker", into.gpus)
    if into.gpus == 1:
        into.note(
            f"globalBatchSize {micro * accumulated} is {micro} × {accumulated} on one GPU: give --gpus if it was "
            "trained on more"
        )


def _length(into: Conversion, names: Names) -> None:
    steps, epochs = int(into.number("max_steps", -1)), into.number(names.epochs, names.epochs_default)
    if steps > 0:
        into.put("training.maxSteps", steps)
        return
    into.put("training.epochs", max(1, math.ceil(epochs)))
    if epochs != int(epochs) or epochs < 1:
        into.note(f"{names.epochs}: {epochs:g}: epochs are whole here, {max(1, math.ceil(epochs))} is set")


def _schedule(into: Conversion, names: Names) -> None:
    given = into.text(names.schedule, names.schedule_default).lower()
    chosen = _SCHEDULES.get(given)
    if chosen is None:
        into.note(f"{names.schedule}: {given}: has no counterpart, Cosine is set")
    into.put("training.schedule", chosen or "Cosine")
    warmup, ratio = into.number("warmup_steps", 0), into.number("warmup_ratio", 0)
    if 0 < warmup < 1:  # transformers 5 takes it for a share of the steps
        warmup, ratio = 0, warmup
    steps = into.fields.get("training.maxSteps")
    if not warmup and ratio and isinstance(steps, int):
        warmup = math.ceil(ratio * steps)
    if warmup:
        into.put("training.warmupSteps", int(warmup))
    elif ratio:
        into.note(
            f"warmup of {ratio:g} of the steps: set training.warmupSteps, which counts steps; 'qlora plan' tells how "
            "many steps there are"
        )


def _optimizer(into: Conversion, names: Names) -> None:
    given = into.text(names.optimizer, "adamw_torch_fused").lower()
    chosen = _OPTIMIZERS.get(given)
    if chosen is None:
        into.note(f"{names.optimizer}: {given}: has no counterpart, PagedAdamW8Bit is set")
    into.put("training.optimizer", chosen or "PagedAdamW8Bit")


def _compute_type(into: Conversion) -> None:
    half, brain = into.get("fp16", False), into.get("bf16", "auto")
    if str(half).lower() == "true":
        into.put("quantization.computeType", "Float16")
    elif str(brain).lower() in ("true", "full"):
        into.put("quantization.computeType", "BFloat16")
    checkpointing = into.get("gradient_checkpointing")
    if checkpointing is not None:
        into.put("training.gradientCheckpointing", "None" if str(checkpointing).lower() == "false" else "Full")


def _evaluation(into: Conversion, names: Names) -> None:
    share = into.number(names.fraction, 0) if names.fraction else 0
    if share >= 1:
        into.note(f"{names.fraction}: {share:g} rows: dataset.eval takes a share, or rows of their own; 0.05 is set")
        share = 0.05
    if share > 0.5:
        into.note(f"{names.fraction}: {share:g}: at most half of the rows can be held out, 0.5 is set")
        share = 0.5
    if share:
        into.put("dataset.eval.fraction", f"{share:g}")
    strategy = into.text("eval_strategy", into.text("evaluation_strategy", "no")).lower()
    held_out = any(path.startswith("dataset.eval.") for path in into.fields)
    every, times = into.number("eval_steps", 0), into.number("evals_per_epoch", 0)
    if held_out and strategy != "epoch":
        _every(into, "training.evaluation.everySteps", "eval_steps", every)
        if times > 1:
            into.note(f"evals_per_epoch: {times:g}: set training.evaluation.everySteps, which counts steps")
    patience = into.number("early_stopping_patience", 0)
    if held_out and patience:
        into.put("training.evaluation.patience", int(patience))
    if not held_out and (patience or every or strategy != "no"):
        into.note("evaluation: there are no evaluation rows: set dataset.eval")


def _checkpoints(into: Conversion) -> None:
    if into.text("save_strategy", "steps").lower() == "steps":
        _every(into, "checkpoint.everySteps", "save_steps", into.number("save_steps", 0))
    if (times := into.number("saves_per_epoch", 1)) > 1:
        into.note(f"saves_per_epoch: {times:g}: set checkpoint.everySteps, which counts steps")
    if kept := int(into.number("save_total_limit", 0)):
        into.put("checkpoint.keep", kept)


def _every(into: Conversion, path: str, name: str, steps: float) -> None:
    total = into.fields.get("training.maxSteps")
    if 0 < steps < 1 and isinstance(total, int):
        steps = max(1, math.ceil(steps * total))
    if steps >= 1:
        into.put(path, int(steps))
    elif steps:
        into.note(f"{name}: {steps:g} of the steps: set {path}, which counts steps")


def _zero(into: Conversion) -> None:
    given = into.get("deepspeed")
    if not given:
        return
    settings = given if isinstance(given, dict) else _json(str(given))
    zero = settings.get("zero_optimization") or {}
    stage = zero.get("stage") if settings else next((s for s in (1, 2, 3) if f"z{s}" in _brief(str(given))), None)
    if stage not in (0, 1, 2, 3):
        into.note(f"deepspeed: {given}: its ZeRO stage is not known, parallelism.zeroStage is 0")
        return
    into.put("parallelism.zeroStage", stage)
    if stage and (zero.get("offload_optimizer") or {}).get("device") == "cpu":
        into.put("parallelism.offload", "Optimizer")


def _brief(name: str) -> str:
    """Return a file's name in which ``zero2`` and ``z2`` read the same."""
    return Path(name).stem.lower().replace("zero", "z").replace("_", "").replace("-", "")


def _json(name: str) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _reports(into: Conversion) -> None:
    given = [name for name in into.names("report_to") if name not in ("none", "all")]
    given += [tool for tool in ("wandb", "mlflow", "comet", "swanlab") if into.get(f"{tool}_project")]
    into.not_needed(
        "run_name", *(f"wandb_{part}" for part in ("entity", "watch", "name", "log_model", "run_id", "mode"))
    )
    into.not_needed("mlflow_tracking_uri", "mlflow_experiment_name", "use_wandb", "use_mlflow", "use_tensorboard")
    if given:
        into.note(f"reports to {', '.join(dict.fromkeys(given))}: metrics are served to Prometheus; see 'qlora report'")
