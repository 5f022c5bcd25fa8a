"""Predicted beside measured peaks on one GPU: ``python benchmarks/bench_memory_gpu.py [OUT.json]``.

Thirty configurations of random weights (Llama, Qwen 3, Gemma and Phi shapes of 1 to 8 billion weights; ranks, lengths,
recomputation, quantizations, optimizers), each in a process of its own: the trainer's adapter, loss and DeepSpeed,
two steps of two micro-batches. Measured are PyTorch's allocated peak, what it reserved, and what is held beside it.
Not yet run: no GPU was at hand.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from qlora_api.memory import Run, estimate, gpu_of_device, model_shape
from qlora_api.spec import LoRASpec, Optimizer, ParallelismSpec, QuantizationSpec

SEED = 42
ACCUMULATION = 2
VOCABULARY = 128256
LLAMA: dict[str, Any] = {"model_type": "llama", "vocab_size": VOCABULARY, "max_position_embeddings": 131072}


def bases() -> dict[str, dict[str, Any]]:
    """Configurations as ``config.json`` has them."""
    small = {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 16}
    large = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32}
    return {
        "llama-1b": {**LLAMA, **small, "intermediate_size": 8192},
        "llama-8b": {**LLAMA, **large, "intermediate_size": 14336},
        "qwen3-2b": {**LLAMA, **small, "model_type": "qwen3", "head_dim": 128, "intermediate_size": 6144},
        "gemma-2b": {**LLAMA, **small, "model_type": "gemma", "head_dim": 256, "intermediate_size": 16384},
        "phi-1b": {
            **small,
            "model_type": "phi",
            "vocab_size": 51200,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "intermediate_size": 8192,
        },
    }


def cases() -> Iterator[dict[str, Any]]:
    """Thirty, from small to large."""
    for base, length, again in product(("llama-1b", "qwen3-2b", "gemma-2b", "phi-1b"), (2048, 8192), (True, False)):
        yield {"base": base, "rows": [length], "recomputes": again}
    for rows, again in product(([2048] * 4, [4096], [8192], [16384]), (True, False)):
        yield {"base": "llama-8b", "rows": rows, "recomputes": again}
    for change in (
        {"lora": {"rank": 64}},
        {"lora": {"dropout": "0.1"}},
        {"lora": {"targetModules": ["q_proj", "v_proj"]}},
        {"quantization": {"doubleQuantization": False}},
        {"quantization": {"type": "None"}},
        {"optimizer": "AdamW"},
    ):
        yield {"base": "llama-8b", "rows": [4096], "recomputes": True, **change}


def run_of(case: dict[str, Any]) -> Run:
    """The case as inputs of the formulas."""
    return Run(
        shape=model_shape(bases()[case["base"]]),
        lora=LoRASpec.model_validate(case.get("lora", {})),
        quantization=QuantizationSpec.model_validate(case.get("quantization", {})),
        optimizer=Optimizer(case.get("optimizer", "PagedAdamW8Bit")),
        parallelism=ParallelismSpec(),
        world_size=1,
        rows=tuple(case["rows"]),
        checkpointing=case["recomputes"],
        targets=sum(case["rows"]) - len(case["rows"]),
    )


# ----------------------------------------------------------------------------------------------------------- measuring


def measure(case: dict[str, Any]) -> dict[str, int]:
    """Train two steps on this process's GPU."""
    import torch  # noqa: PLC0415 the process that asks needs none

    from qlora_api.batch import BatchSplit  # noqa: PLC0415
    from qlora_api.spec import TrainingSpec  # noqa: PLC0415
    from qlora_trainer.engine import apply_update, join_ranks, wrap_deepspeed  # noqa: PLC0415
    from qlora_trainer.loss import NextTokenLoss, call_arguments  # noqa: PLC0415
    from qlora_trainer.model import add_lora, enable_gradient_checkpointing  # noqa: PLC0415

    run = run_of(case)
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577"}
    os.environ.update(alone)
    ranks = join_ranks("CUDA", timeout_seconds=600)
    model = add_lora(random_base(case, ranks.device), run.lora, SEED)
    if run.checkpointing:
        enable_gradient_checkpointing(model)
    model.train()
    split = BatchSplit(world_size=1, micro_batch_size=len(run.rows), gradient_accumulation_steps=ACCUMULATION)
    training = TrainingSpec(max_steps=2, global_batch_size=split.global_batch_size, optimizer=run.optimizer)
    engine = wrap_deepspeed(NextTokenLoss(model, fused=True), training, run.parallelism, split, ranks.device)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        for index in range(ACCUMULATION):
            engine.set_gradient_accumulation_boundary(index == ACCUMULATION - 1)
            losses = engine(*call_arguments(_rows(run, bases()[case["base"]]["vocab_size"]), ranks.device))
            engine.backward(losses.mean(), scale_wrt_gas=False)
        apply_update(engine, 0.3, 1e-4)
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return {
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "beside": total - free - torch.cuda.memory_reserved(),
        "total": torch.cuda.get_device_properties(0).total_memory,
    }


def random_base(case: dict[str, Any], device: Any) -> Any:
    """A base with random weights, quantized layer by layer on the GPU: no hub and no disk."""
    import torch  # noqa: PLC0415
    from accelerate import init_empty_weights  # noqa: PLC0415
    from bitsandbytes.nn import Linear4bit, Params4bit  # noqa: PLC0415
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415

    from qlora_trainer.attention import choose_attention, register  # noqa: PLC0415
    from qlora_trainer.model import linear_layers  # noqa: PLC0415

    register()
    values = dict(bases()[case["base"]])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    kind = AutoModelForCausalLM._model_mapping[type(config)]  # noqa: SLF001 as the trainer does
    attention = choose_attention(kind, config, device)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    quantization = QuantizationSpec.model_validate(case.get("quantization", {}))
    for name, linear in linear_layers(model).items() if quantization.type == "NF4" else ():
        with torch.device("meta"):
            layer = Linear4bit(
                linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=torch.bfloat16
            )
        weight = torch.empty(linear.weight.shape, dtype=torch.bfloat16, device=device).normal_(std=0.02)
        packed = Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=quantization.double_quantization
        )
        layer.weight = packed.to(device)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            parent, _, child = name.rpartition(".")
            value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device).normal_(std=0.02)
            setattr(model.get_submodule(parent), child, torch.nn.Parameter(value, requires_grad=False))
    model.tie_weights()
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, buffer.to(device), persistent=False)
    model.is_loaded_in_4bit = quantization.type == "NF4"
    model.config.use_cache = False
    return model


def _rows(run: Run, vocabulary: int) -> Any:
    """Full rows of random tokens, every one of them a target but the first."""
    import torch  # noqa: PLC0415

    from qlora_trainer.data.batches import IGNORED, MicroBatch  # noqa: PLC0415

    rows = [torch.randint(vocabulary, (length,)) for length in run.rows]
    return MicroBatch(
        input_ids=torch.cat(rows)[None],
        labels=torch.cat([torch.cat([row[1:], torch.tensor([IGNORED])]) for row in rows])[None],
        position_ids=torch.cat([torch.arange(len(row)) for row in rows])[None],
        cu_seqlens=torch.tensor([0, *run.rows]).cumsum(0).to(torch.int32),
        max_seqlen=max(run.rows),
    )


# ------------------------------------------------------------------------------------------------------------ reporting


def main() -> int:
    if len(sys.argv) == 3 and sys.argv[1] == "--one":
        print(json.dumps(measure(json.loads(sys.argv[2]))))
        return 0
    import torch  # noqa: PLC0415

    if not torch.cuda.is_available():
        print("no GPU: this measures one")
        return 1
    properties = torch.cuda.get_device_properties(0)
    gpu = gpu_of_device(properties.name, properties.total_memory)
    print(f"{properties.name}, {properties.total_memory:,} bytes\n")
    print("| base | rows | recomputes | change | predicted | measured | error | reserved | beside |")
    print("|---|---|---|---|---|---|---|---|---|")
    seen = []
    for case in cases():
        predicted = estimate(run_of(case), gpu)
        if predicted.needed_bytes > properties.total_memory:
            print(f"| {case['base']} | {case['rows']} | {case['recomputes']} | | needs {predicted.needed_bytes:,} |")
            continue
        done = subprocess.run(
            [sys.executable, __file__, "--one", json.dumps(case)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(f"| {case['base']} | {case['rows']} | failed | {done.stderr.strip().splitlines()[-1:]} |")
            continue
        measured = json.loads(done.stdout.strip().splitlines()[-1])
        error = predicted.allocated_bytes / measured["allocated"] - 1
        seen.append({"case": case, "predicted": predicted.allocated_bytes, "error": error, **measured})
        change = {k: v for k, v in case.items() if k not in ("base", "rows", "recomputes")}
        print(
            f"| {case['base']} | {case['rows']} | {case['recomputes']} | {change or ''} | "
            f"{predicted.allocated_bytes / 1e9:.3f} | {measured['allocated'] / 1e9:.3f} | {error:+.2%} | "
            f"{measured['reserved'] / 1e9:.3f} | {measured['beside'] / 1e9:.3f} |",
            flush=True,
        )
    if seen:
        errors = sorted(abs(row["error"]) for row in seen)
        print(f"\n{len(seen)} configurations: median error {errors[len(errors) // 2]:.2%}, largest {errors[-1]:.2%}")
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(seen, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
