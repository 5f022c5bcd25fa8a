"""The stock stack's steps on one GPU: transformers' Trainer, PEFT and bitsandbytes, on a base of random weights.

As ``stock_trainer.py``, without its tokenizer and files: rows of random tokens, padded to the longest of their batch.
"""

from __future__ import annotations

import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import Trainer, TrainingArguments

from bench_gpu import LLAMA_8B, SEED
from qlora_api.spec import QuantizationSpec
from random_base import random_base

sys.path.append(str(Path(__file__).parents[1]))
from stock_trainer import Clock

IGNORED = -100


def measure_stock(lengths: tuple[int, ...], *, checkpointing: bool, steps: int) -> dict[str, Any]:
    """Seconds of each step, and the peak of allocated bytes."""
    torch.manual_seed(SEED)
    model = random_base(LLAMA_8B, QuantizationSpec(), torch.device("cuda", 0), attention="sdpa")
    model = prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    rows = [torch.randint(LLAMA_8B["vocab_size"], (n,)).tolist() for n in lengths * steps]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=len(lengths),
                learning_rate=2e-4,
                lr_scheduler_type="cosine",
                max_grad_norm=0.3,
                optim="paged_adamw_8bit",
                bf16=True,
                seed=SEED,
                save_strategy="no",
                logging_steps=1,
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=[{"input_ids": row} for row in rows],
            data_collator=padded,
            callbacks=[clock],
        )
        torch.cuda.reset_peak_memory_stats()
        trainer.train()
    marks = [wall for wall, _ in clock.marks]
    return {
        "seconds": [b - a for a, b in pairwise(marks)],
        "peak": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
    }


def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Rows as a batch, as transformers' collators make it: padded to a multiple of 8."""
    longest = -(-max(len(row["input_ids"]) for row in rows) // 8) * 8
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        tokens = row["input_ids"]
        ids[place, : len(tokens)] = torch.tensor(tokens)
        mask[place, : len(tokens)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}
