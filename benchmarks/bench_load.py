"""Measure the host memory for loading a mixture of experts, by its format on disk: ``python benchmarks/bench_load.py``

Writes one of random weights in FP8, MXFP4 and 16 bits each, loads it in NF4 as a rank does, and compares the most
anonymous memory that the process takes for it with what it holds afterwards. The first base that a process loads takes
memory for imports, thread pools and kernels, whatever its size: a tiny base of the same kind is loaded first and shows
this part.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_api.spec import ComputeType, QuantizationSpec
from qlora_trainer.model.base_model import load_base, meta_model, weight_bytes
from qlora_trainer.model.dry_run import find_layer_use

HIDDEN, INNER, EXPERTS, LAYERS = 2048, 6144, 8, 2
TINY = 8
"""Divisor of both widths of the tiny base."""
BLOCK = 128
"""Block size of FP8 weights in both directions, as DeepSeek and Qwen publish them."""
SAMPLE_SECONDS = 0.005
SIZES = {
    "vocab_size": 1024,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_experts_per_tok": 2,
}
BASES = {
    "fp8": ("qwen3_moe", {"num_experts": EXPERTS, "moe_intermediate_size": INNER}),
    "bf16": ("qwen3_moe", {"num_experts": EXPERTS, "moe_intermediate_size": INNER}),
    "mxfp4": ("gpt_oss", {"num_local_experts": EXPERTS, "intermediate_size": INNER}),
}
QUANTIZATION = {
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]},
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
}
TWO_EXPERTS = 2 * 2 * 3 * HIDDEN * INNER
"""Bytes of two experts in 16 bits, each of three matrices."""
COLUMNS = (
    *("on disk", "read, MB", "in 4 bits, MB", "two experts in 16 bits, MB", "peak, MB", "peak over 4 bits, MB"),
    "peak of the tiny base, loaded before, MB",
)


def write_base(folder: Path, kind: str, divisor: int = 1) -> None:
    """Write a base of random weights, of widths divided by a number."""
    model_type, sizes = BASES[kind]
    torch.manual_seed(0)
    narrow = {name: size // divisor for name, size in (SIZES | sizes).items() if size in (HIDDEN, INNER)}
    config = AutoConfig.for_model(model_type, **(SIZES | sizes | narrow))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="100GB")
    if kind not in QUANTIZATION:
        return
    path, convert = folder / "model.safetensors", {"fp8": _to_fp8, "mxfp4": _to_mxfp4}[kind]
    made = {n: t for name, tensor in load_file(path).items() for n, t in convert(name, tensor).items()}
    save_file(made, path, metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps({**values, "quantization_config": QUANTIZATION[kind]}))


def _to_fp8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    if "_proj.weight" not in name:
        return {name: weight}
    scales = torch.full((-(-weight.shape[0] // BLOCK), -(-weight.shape[1] // BLOCK)), 1e-3)
    return {name: (weight.float() * 1e3).clamp(-448, 448).to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}


def _to_mxfp4(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return {name: weight}
    experts, inputs, outputs = weight.shape
    shape = experts, outputs, inputs // 32
    blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
    return {f"{name}_blocks": blocks, f"{name}_scales": torch.full(shape, 120, dtype=torch.uint8)}


def anonymous() -> int:
    """Return the bytes of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def load(folder: Path) -> tuple[int, int]:
    """Load a base; return the bytes that it holds, and the most that loading took."""
    torch.set_num_threads(1)
    find_layer_use(meta_model(folder))  # imports the class, which is not measured
    before, peak, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLE_SECONDS):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_base(folder, QuantizationSpec(compute_type=ComputeType.BFLOAT16), torch.device("cpu"))
    done.set()
    watcher.join()
    return sum(weight_bytes(model).values()), peak[0] - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", choices=BASES, default=list(BASES), help="of bases")
    parser.add_argument("--write", nargs=2, metavar=("FOLDER", "KIND"), help=argparse.SUPPRESS)
    parser.add_argument("--load", nargs=2, type=Path, metavar=("TINY", "BASE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        folder, kind = arguments.write
        write_base(Path(folder) / "tiny", kind, TINY)
        write_base(Path(folder) / "base", kind)
        return
    if arguments.load:
        for folder in arguments.load:
            print(*load(folder))
        return
    print(f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}", sep="\n")
    for kind in arguments.kinds:
        with tempfile.TemporaryDirectory() as name:
            tiny, base = Path(name) / "tiny", Path(name) / "base"
            subprocess.run([sys.executable, __file__, "--write", name, kind], check=True)
            disk = sum(path.stat().st_size for path in base.glob("*.safetensors"))
            command = [sys.executable, __file__, "--load", str(tiny), str(base)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        fixed, held, peak = map(int, done.stdout.split()[-3:])
        figures = " | ".join(f"{size / 1e6:,.0f}" for size in (disk, held, TWO_EXPERTS, peak, peak - held, fixed))
        print(f"| {kind} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
