"""Predicted beside measured peaks on one GPU: ``python benchmarks/gpu/bench_memory_gpu.py [OUT.json]``.

Configurations of random weights (Llama, Qwen, Gemma, Phi, Mistral, OPT and Mixtral shapes of 1 to 8 billion weights;
ranks, lengths, recomputation, quantizations, optimizers, ZeRO) in one process: the trainer's adapter, loss and
DeepSpeed, an update that makes the optimizer's state, then two micro-batches and one more. Measured are PyTorch's
allocated peak at each moment, what it reserved, and what is held beside it; and the peak while a base is loaded.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "PYTORCH_ALLOC_CONF", "expandable_segments:True"
)  # as qlora_trainer.worker.launch does; read once

from memory_gpu_cases import BASES, cases, change_of, quantization_of, run_of
from qlora_api.spec import LoRASpec, Optimizer, ParallelismSpec, QuantizationSpec
from qlora_memory import EstimateInput, Gpu, Moment, estimate, gpu_of_device, model_shape

LOADED = (("llama-1b", "NF4"), ("llama-1b", "INT8"), ("llama-1b", "None"), ("qwen3-2b", "NF4"))


def main() -> int:
    import torch  # noqa: PLC0415 to say that there is no GPU even where torch's own libraries are missing

    if not torch.cuda.is_available():
        print("no GPU: this measures one")
        return 1
    from memory_gpu_measure import Bases, join, measure, measure_loading  # noqa: PLC0415
    from qlora_trainer.reporting.rank_exit import quiet_libraries  # noqa: PLC0415

    quiet_libraries()
    ranks = join()
    properties = torch.cuda.get_device_properties(0)
    gpu = gpu_of_device(properties.name, properties.total_memory)
    print(f"{properties.name}, {properties.total_memory:,} bytes, torch {torch.__version__}\n\n{HEAD}", flush=True)
    report: dict[str, Any] = {
        "gpu": {"name": properties.name, "memory": properties.total_memory, "torch": torch.__version__},
        "cases": [],
        "loading": [],
    }
    bases, leaked = Bases(ranks.device), 0
    for case in cases():
        if estimate(run_of(case), gpu).needed_bytes > properties.total_memory:
            continue
        start = time.monotonic()
        try:
            found = measure(case, bases, ranks)
        except Exception as error:  # noqa: BLE001 the others are measured all the same
            found = {"error": "".join(traceback.format_exception(error)[-3:])}
            del error
            bases.forget()
        row = {"case": case, **found, "leaked": leaked, "seconds": round(time.monotonic() - start, 2)}
        leaked += estimate(run_of(case), gpu).paged_bytes
        report["cases"].append(row)
        print(line(row, gpu), flush=True)
        _write(report)
    bases.forget()
    with tempfile.TemporaryDirectory() as folder:
        for name, kind in LOADED:
            quantization = QuantizationSpec.model_validate({"type": kind})
            found = measure_loading(name, quantization, Path(folder), ranks.device)
            report["loading"].append({"base": name, "type": kind, **found})
            _write(report)
    print(f"\n{loading_table(report['loading'])}\n\n{summary(report['cases'], gpu)}", flush=True)
    os._exit(0)  # as qlora_trainer.rank does


def _write(report: dict[str, Any]) -> None:
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(report))


# ------------------------------------------------------------------------------------------------------------ reporting

HEAD = (
    "| base | rows | recomputes | change | predicted, GB | measured, GB | error | needed, GB | in use, GB |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def in_use(row: dict[str, Any]) -> int:
    """Return what the GPU had given; bitsandbytes never gives back the paged state of the cases before."""
    return int(row["reserved"] + row["beside"] - row["leaked"])


def error_of(row: dict[str, Any], gpu: Gpu) -> float:
    return estimate(run_of(row["case"]), gpu).allocated_bytes / row["allocated"] - 1


def line(row: dict[str, Any], gpu: Gpu) -> str:
    """One configuration as a row of the table."""
    case = row["case"]
    start = f"| {case['base']} | {' + '.join(map(str, case['rows']))} | {case['recomputes']} | {change_of(case)} |"
    if "error" in row:
        return f"{start} failed: {row['error'].strip().splitlines()[-1]} |"
    predicted = estimate(run_of(case), gpu)
    return (
        f"{start} {predicted.allocated_bytes / 1e9:.3f} | {row['allocated'] / 1e9:.3f} | {error_of(row, gpu):+.2%} | "
        f"{predicted.needed_bytes / 1e9:.3f} | {in_use(row) / 1e9:.3f} |"
    )


def summary(rows: list[dict[str, Any]], gpu: Gpu) -> str:
    """Summarize how far the formulas are right."""
    rows = [row for row in rows if "error" not in row]
    if not rows:
        return "nothing was measured"
    errors = sorted(abs(error_of(row, gpu)) for row in rows)
    short = [row for row in rows if estimate(run_of(row["case"]), gpu).needed_bytes < in_use(row)]
    return (
        f"{len(rows)} configurations: median error {errors[len(errors) // 2]:.2%}, "
        f"95 of 100 within {errors[math.ceil(0.95 * len(errors)) - 1]:.2%}, largest {errors[-1]:.2%}; "
        f"more than was said to be needed: {len(short)}"
    )


def loading_table(rows: list[dict[str, Any]]) -> str:
    """Compare what loading took at most beside what is left with what the formula says."""
    lines = ["| base | type | predicted peak, GB | measured | left |", "|---|---|---|---|---|"]
    for row in rows:
        run = EstimateInput(
            shape=model_shape(BASES[row["base"]]),
            lora=LoRASpec(target_modules=["q_proj"], rank=1),
            quantization=quantization_of({"quantization": {"type": row["type"]}}),
            optimizer=Optimizer.ADAMW,
            parallelism=ParallelismSpec(),
            world_size=1,
            rows=(1,),
            checkpointing=True,
        )
        predicted = sum(estimate(run).moments[Moment.LOADING].values())
        lines.append(
            f"| {row['base']} | {row['type']} | {predicted / 1e9:.3f} | {row['allocated'] / 1e9:.3f} | "
            f"{row['left'] / 1e9:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
