"""Training speed of an 8B-shaped model on one GPU: ``python benchmarks/bench_trainer.py --gpu``.

Llama-3-8B's shape with random weights, made on the GPU layer by layer and quantized at once: no hub and no disk. The
steps are the trainer's own: NF4 with double quantization, LoRA of rank 16 on all linear layers, fused loss, DeepSpeed,
paged 8-bit AdamW, packs of 4,096 tokens.
"""

from __future__ import annotations

import os
import statistics
import time
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qlora_api.batch import BatchSplit
from qlora_api.spec import LoRASpec, ParallelismSpec, TrainingSpec
from qlora_trainer.attention import choose_attention, register
from qlora_trainer.data.batches import Batches
from qlora_trainer.data.packing import pack
from qlora_trainer.data.tokenized import TokenizedRows
from qlora_trainer.engine import Ranks, apply_update, join_ranks, wrap_deepspeed
from qlora_trainer.loss import NextTokenLoss
from qlora_trainer.model import add_lora, enable_gradient_checkpointing, linear_layers
from qlora_trainer.train import accumulate

LENGTH = 4096
MICRO_BATCH = 2
"""8,192 tokens: enough to hide the dequantization."""
WARM_UP, STEPS = 3, 10
SEED = 42
PEAK_TFLOPS = {
    "H200": 989.5,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.5,
    "H100": 989.5,
    "A100": 312.0,
    "L40S": 362.0,
    "4090": 165.2,
}
"""Dense bf16 with fp32 accumulation, from NVIDIA's data sheets; the first name that a device's name holds."""


def llama_8b() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )


def flop_per_token(config: LlamaConfig, length: int, *, recompute: bool) -> float:
    """Arithmetic of a token on a frozen base: 33.8 GFLOP at 4k for 8B, 48.8 with recomputation.

    Each weight costs 2 FLOP forward and 2 for the input's gradient; frozen, it has no gradient of its own. Causal
    attention is 2·length·hidden a layer forward, and 2.5 times that backward (FlashAttention-2, section 4.1).
    Recomputation repeats the layers' forward. LoRA's own share is under 1% and left out.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    key_value = hidden // config.num_attention_heads * config.num_key_value_heads
    linear = 2.0 * layers * (2 * hidden**2 + 2 * hidden * key_value + 3 * hidden * config.intermediate_size)
    attention = 2.0 * length * hidden * layers
    head = 2.0 * hidden * config.vocab_size
    total = 2 * (linear + head) + 3.5 * attention
    return total + linear + attention if recompute else total


def random_nf4(config: LlamaConfig, device: torch.device) -> Any:
    """A quantized base with random weights; never more than one layer of it in 16 bits."""
    register()
    attention = choose_attention(LlamaForCausalLM, config, device)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    generator = torch.Generator(device).manual_seed(SEED)

    def weights(shape: torch.Size) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=0.02, generator=generator)

    for name, linear in linear_layers(model).items():
        with torch.device("meta"):
            layer = Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16)
        weight = Params4bit(
            weights(linear.weight.shape), requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        layer.weight = weight.to(device)
        layer.support_avx512bf16_for_cpu = False
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            parent, _, child = name.rpartition(".")
            value = (
                weights(parameter.shape) if parameter.ndim > 1 else torch.ones(parameter.shape, dtype=torch.bfloat16)
            )
            setattr(model.get_submodule(parent), child, torch.nn.Parameter(value.to(device), requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    model.is_loaded_in_4bit = True  # PEFT looks here for the kind of LoRA layer
    model.config.use_cache = False
    return model


def one_process() -> None:
    """Be torchrun's only rank."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29571"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)


def measure(config: LlamaConfig, ranks: Ranks, length: int, *, recompute: bool) -> tuple[float, int]:
    """Train a few steps.

    Returns:
        Tokens per second, and the peak of allocated bytes (0 on a CPU).

    """
    model = add_lora(random_nf4(config, ranks.device), LoRASpec(), SEED)
    if recompute:
        enable_gradient_checkpointing(model)
    model.train()
    split = BatchSplit(world_size=1, micro_batch_size=MICRO_BATCH, gradient_accumulation_steps=1)
    training = TrainingSpec(max_steps=WARM_UP + STEPS, global_batch_size=MICRO_BATCH)
    loss = NextTokenLoss(model, fused=True)
    engine = wrap_deepspeed(loss, training, ParallelismSpec(), split, ranks.device)
    batches = random_batches(config.vocab_size, length, split)
    seconds = []
    for number in range(WARM_UP + STEPS):
        step = batches.step(number)
        start = time.monotonic()
        accumulate(engine, step, ranks)  # reads the loss, and so waits for the GPU
        apply_update(engine, 0.3, 2e-4)
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - start)
    peak = torch.cuda.max_memory_allocated() if ranks.device.type == "cuda" else 0
    return MICRO_BATCH * length / statistics.median(seconds[WARM_UP:]), peak


def random_batches(vocabulary: int, length: int, split: BatchSplit) -> Batches:
    """Packs that are full: rows of a half, a quarter and an eighth of their length."""
    generator = torch.Generator().manual_seed(SEED)
    lengths = [length // 2, length // 4, length // 8, length // 8] * MICRO_BATCH * 4
    rows = [(torch.randint(vocabulary, (n,), generator=generator).tolist(), [True] * n) for n in lengths]
    tokenized = TokenizedRows.of(rows)
    return Batches(tokenized, pack(tokenized.lengths, length), split, rank=0, seed=SEED)


def main() -> int:
    if not torch.cuda.is_available():
        print("no GPU: --gpu needs one")
        return 1
    one_process()
    ranks = join_ranks("CUDA", timeout_seconds=1800)
    config, name = llama_8b(), torch.cuda.get_device_name()
    peak = next((tflops for card, tflops in PEAK_TFLOPS.items() if card in name), None)
    print(f"{name}: 8B shape, {MICRO_BATCH} packs of {LENGTH} tokens\n")
    print("| recomputation | tokens/s | peak memory | share of bf16 peak |\n|---|---|---|---|")
    for recompute in (True, False):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            speed, memory = measure(config, ranks, LENGTH, recompute=recompute)
        except torch.OutOfMemoryError:
            print(f"| {'full' if recompute else 'none'} | out of memory | | |")
            continue
        work = flop_per_token(config, LENGTH, recompute=recompute)
        share = f"{100 * speed * work / (peak * 1e12):.1f} %" if peak else "card not in the table"
        print(f"| {'full' if recompute else 'none'} | {speed:,.0f} | {memory / 2**30:.1f} GiB | {share} |")
    return 0
