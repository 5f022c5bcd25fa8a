"""Training speed of an 8B-shaped model on one GPU, and the stock stack's: ``python benchmarks/gpu/bench_gpu.py``.

Llama-3-8B's shape with random weights, made on the GPU layer by layer and quantized at once: no hub and no disk. NF4
with double quantization, LoRA of rank 16 on all linear layers, paged 8-bit AdamW, 8,192 real tokens a step. Ours: the
trainer's own steps, fused loss, DeepSpeed, packs of 4,096 tokens. Stock: ``stock_gpu.py``. Two kinds of rows: of 4,096
tokens all, where nobody pads, and of 512 to 2,048, which are packed here and padded there. One process for ours, then
one for the stock stack.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from qlora_api.spec import LoRASpec, ParallelismSpec, QuantizationSpec, TrainingSpec
from qlora_memory import AdapterShape, Gpu, flop_per_token, gpu_of_device, model_shape

LENGTH = 4096
TOKENS = 8192
"""Tokens of a step: enough that the time of the dequantization does not show."""
WARM_UP, STEPS = 2, 5
SEED = 42
LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
ROWS = {"4,096 each": (LENGTH, LENGTH), "512 to 2,048": (2048, 1024, 512, 512) * 2}
"""Tokens of the rows of a step."""
VARIANTS = tuple((rows, again) for rows in ROWS for again in (True, False))


def measure_ours(lengths: tuple[int, ...], *, recompute: bool, profile: Path | None) -> dict[str, Any]:
    """Seconds of each step, and the peak of allocated bytes."""
    import torch  # noqa: PLC0415 the process that only asks others needs none

    from qlora_api.batch import BatchSplit  # noqa: PLC0415
    from qlora_trainer.engine.deepspeed_engine import accumulate, apply_update, wrap_deepspeed  # noqa: PLC0415
    from qlora_trainer.model.base_model import add_lora, enable_gradient_checkpointing  # noqa: PLC0415
    from qlora_trainer.model.loss import NextTokenLoss  # noqa: PLC0415
    from qlora_trainer.ranks import Ranks  # noqa: PLC0415
    from random_base import random_base  # noqa: PLC0415

    ranks = Ranks(0, 0, 1, torch.device("cuda", 0))
    model = add_lora(random_base(LLAMA_8B, QuantizationSpec(), ranks.device), LoRASpec(), SEED)
    if recompute:
        enable_gradient_checkpointing(model)
    model.train()
    micro_batch = TOKENS // LENGTH
    split = BatchSplit(world_size=1, micro_batch_size=micro_batch, gradient_accumulation_steps=1)
    training = TrainingSpec(max_steps=WARM_UP + STEPS, global_batch_size=micro_batch)
    engine = wrap_deepspeed(NextTokenLoss(model, fused=True), training, ParallelismSpec(), split, ranks.device)
    batches = random_batches(LLAMA_8B["vocab_size"], lengths, split)

    def step(number: int) -> float:
        batch = batches.step(number)
        start = time.monotonic()
        accumulate(engine, batch, ranks)  # reads the loss, and so waits for the GPU
        apply_update(engine, 0.3, 2e-4)
        torch.cuda.synchronize()
        return time.monotonic() - start

    torch.cuda.reset_peak_memory_stats()
    seconds = [step(number) for number in range(WARM_UP + STEPS)]
    free, total = torch.cuda.mem_get_info()
    found = {
        "seconds": seconds,
        "peak": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "beside": total - free - torch.cuda.memory_reserved(),
    }
    if profile:
        write_profile(step, profile)
    engine.destroy()
    return found


def write_profile(step: Any, path: Path) -> None:
    """Write where two steps spent their time, by kernel and by operation."""
    from torch.profiler import ProfilerActivity, profile  # noqa: PLC0415

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True) as seen:
        for number in range(2):
            step(number)
    by_kernel = seen.key_averages().table(sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=110)
    by_shape = seen.key_averages(group_by_input_shape=True).table(
        sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=60, max_shapes_column_width=90
    )
    path.write_text(f"{by_kernel}\n\n{by_shape}\n")


def one_process() -> None:
    """Be torchrun's only rank, with the allocator as the trainer sets it."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29571"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)


def random_batches(vocabulary: int, lengths: tuple[int, ...], split: Any) -> Any:
    """Packs that are full."""
    import torch  # noqa: PLC0415

    from qlora_trainer.data.batches import Batches  # noqa: PLC0415
    from qlora_trainer.data.packing import pack  # noqa: PLC0415
    from qlora_trainer.data.tokenized_rows import TokenizedRows  # noqa: PLC0415

    generator = torch.Generator().manual_seed(SEED)
    rows = [(torch.randint(vocabulary, (n,), generator=generator).tolist(), [True] * n) for n in lengths * 4]
    tokenized = TokenizedRows.of(rows)
    return Batches(tokenized, pack(tokenized.lengths, LENGTH), split, rank=0, seed=SEED)


# ------------------------------------------------------------------------------------------------------------ reporting


def share_of_peak(tokens_per_second: float, lengths: tuple[int, ...], gpu: Gpu, *, recompute: bool) -> float:
    """Return the share of the GPU's dense bf16 peak, with recomputation: a token sees those of its own row."""
    shape = model_shape(LLAMA_8B)
    row = sum(n * n for n in lengths) // sum(lengths)
    work = flop_per_token(shape, AdapterShape(shape, LoRASpec()), row, recomputes=recompute)
    return tokens_per_second * work / (gpu.tflops * 1e12)


def child(who: str, out: str, profile: str = "") -> int:
    """Measure the variants of one side, and write each to a file when it is done."""
    import torch  # noqa: PLC0415

    from qlora_trainer.reporting.rank_exit import quiet_libraries  # noqa: PLC0415

    quiet_libraries()
    if who == "ours":
        from qlora_trainer.engine.deepspeed_engine import join_ranks  # noqa: PLC0415

        one_process()
        join_ranks("CUDA", timeout_seconds=1800)
    report = []
    for rows, again in VARIANTS:
        profiled = Path(f"{profile}.{'recomputed' if again else 'kept'}.txt") if profile else None
        report.append({"rows": rows, "recomputes": again, **_one(who, rows, again, profiled)})
        Path(out).write_text(json.dumps(report))
        gc.collect()
        torch.cuda.empty_cache()
    os._exit(0)


def _one(who: str, rows: str, again: bool, profiled: Path | None) -> dict[str, Any]:
    import torch  # noqa: PLC0415

    properties = torch.cuda.get_device_properties(0)
    found: dict[str, Any] = {
        "gpu": properties.name,
        "memory": properties.total_memory,
        "before": torch.cuda.memory_allocated(),
    }
    try:
        if who == "ours":
            profile = profiled if rows == "4,096 each" else None
            return found | measure_ours(ROWS[rows], recompute=again, profile=profile)
        from stock_gpu import measure_stock  # noqa: PLC0415

        return found | measure_stock(ROWS[rows], checkpointing=again, steps=WARM_UP + STEPS)
    except Exception as error:  # noqa: BLE001 the others are measured all the same
        return found | {"error": "".join(traceback.format_exception(error)[-3:])}


def main() -> int:
    """Measure both sides, each in a process of its own."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, help="all that was measured, as JSON")
    parser.add_argument("--profile", type=Path, help="write where this trainer's time goes to files of this name")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(*arguments.child)
    out, profile = arguments.out, arguments.profile
    import torch  # noqa: PLC0415

    if not torch.cuda.is_available():
        print("no GPU: this measures one")
        return 1
    report: dict[str, list[dict[str, Any]]] = {}
    environment = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as folder:
        for who in ("ours", "stock"):
            answer = Path(folder) / f"{who}.json"
            command = [sys.executable, __file__, "--child", who, str(answer)]
            command += [str(profile)] if profile and who == "ours" else []
            done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
            if done.returncode:
                print(done.stderr[-3000:])
            report[who] = json.loads(answer.read_text()) if answer.exists() else []
            if out:
                out.write_text(json.dumps(report))
    print(table(report))
    return 0


def table(report: dict[str, list[dict[str, Any]]]) -> str:
    """All variants, each of ours beside the stock one."""
    lines = ["| rows | recomputation | | tokens/s | × stock | peak memory | share of bf16 peak |"]
    lines.append("|---|---|---|---|---|---|---|")
    speeds: dict[tuple[str, bool], float] = {}
    for who in ("stock", "ours"):
        for found in report[who]:
            rows, again = found["rows"], found["recomputes"]
            start = f"| {rows} | {'full' if again else 'none'} | {who} |"
            if "error" in found:
                lines.append(f"{start} {found['error'].strip().splitlines()[-1]} | | | |")
                continue
            speed = TOKENS / statistics.median(found["seconds"][WARM_UP:])
            stock = speeds.setdefault((rows, again), speed)
            share = share_of_peak(speed, ROWS[rows], gpu_of_device(found["gpu"], found["memory"]), recompute=again)
            lines.append(
                f"{start} {speed:,.0f} | {speed / stock:.2f} | {found['peak'] / 2**30:.1f} GiB | "
                f"{f'{share:.1%}' if who == 'ours' or rows == '4,096 each' else 'pads'} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
