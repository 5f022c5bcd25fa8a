"""QLoRA as most scripts do it: transformers' Trainer, PEFT and bitsandbytes. What ours is measured against.

``torchrun --nproc-per-node 2 stock_trainer.py SETTINGS.json``. Rank 0 writes the seconds and the real tokens of each
optimizer step to the settings' ``report``.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from qlora_trainer.model.device.hardware import fast_dtype

DTYPE = fast_dtype(torch.device("cpu"))
"""The stock script is given the type that is fast on this machine, too."""


def load_model(settings: dict[str, Any]) -> Any:
    """NF4 with double quantization, and LoRA on all linear layers."""
    model = AutoModelForCausalLM.from_pretrained(
        settings["model"],
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPE,
        ),
        dtype=DTYPE,
        device_map={"": "cpu"},
    )
    model.config.use_cache = False
    model = prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=settings["gradient_checkpointing"],
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    rank, alpha = settings["rank"], settings["alpha"]
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def tokenize(row: dict[str, str], tokenizer: Any) -> dict[str, list[int]]:
    """Prompt and completion in one, the prompt's labels ignored."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    completion = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
    return {
        "input_ids": prompt + completion,
        "attention_mask": [1] * (len(prompt) + len(completion)),
        "labels": [-100] * len(prompt) + completion,
    }


class Clock(TrainerCallback):
    """(Wall-clock, CPU) seconds of each optimizer step, data loading and reduction over the ranks included."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.marks.append((time.monotonic(), time.process_time()))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.marks.append((time.monotonic(), time.process_time()))


class TokenCounter(DataCollatorForSeq2Seq):
    """Counts the real tokens that pass, padding left out."""

    tokens: list[int]

    def __call__(self, features: Any, return_tensors: str | None = None) -> Any:
        self.tokens.append(sum(len(f["input_ids"]) for f in features))
        return super().__call__(features, return_tensors)


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.manual_seed(settings["seed"])
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    data: Dataset = load_dataset("json", data_files=settings["data"], split="train", cache_dir=settings["cache"])
    data = data.map(tokenize, fn_kwargs={"tokenizer": tokenizer}, remove_columns=data.column_names)
    collator = TokenCounter(tokenizer, pad_to_multiple_of=8)
    collator.tokens = []
    clock = Clock()
    trainer = Trainer(
        model=load_model(settings),
        args=TrainingArguments(
            output_dir=settings["cache"],
            num_train_epochs=1,
            per_device_train_batch_size=settings["micro_batch_size"],
            gradient_accumulation_steps=settings["accumulation"],
            learning_rate=settings["learning_rate"],
            lr_scheduler_type="cosine",
            max_grad_norm=0.3,
            optim="paged_adamw_8bit",
            bf16=DTYPE is torch.bfloat16,
            use_cpu=True,
            seed=settings["seed"],
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            ddp_find_unused_parameters=False,
            dataloader_pin_memory=False,
        ),
        train_dataset=data,
        data_collator=collator,
        callbacks=[clock],
    )
    trainer.train()
    write_report(settings, trainer, clock, collator.tokens)


def write_report(settings: dict[str, Any], trainer: Any, clock: Clock, counted: list[int]) -> None:
    """Seconds and tokens by step, the tokens summed over the ranks."""
    per_step = settings["accumulation"]
    steps = len(clock.marks) - 1
    own = torch.tensor([sum(counted[i * per_step : (i + 1) * per_step]) for i in range(steps)])
    tokens = trainer.accelerator.reduce(own, "sum")
    if trainer.is_world_process_zero():
        pairs = list(zip(clock.marks, clock.marks[1:], strict=False))
        seconds, cpu_seconds = ([b[i] - a[i] for a, b in pairs] for i in range(2))
        losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
        report = {"seconds": seconds, "cpu_seconds": cpu_seconds, "tokens": tokens.tolist(), "losses": losses}
        Path(settings["report"]).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
