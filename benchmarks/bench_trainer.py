"""Tokens per second of this trainer against the stock script, on this machine: ``python benchmarks/bench_trainer.py``

Two ranks of one thread each over gloo, for everybody: what is measured are jobs of several ranks, where uneven rows
make ranks wait for each other. Same model, rows, adapter, micro-batch, accumulation and optimizer; real tokens count,
padding does not; the first steps do not count; variants take turns, since a shared machine drifts. With packing a
sequence holds several rows, so an epoch has fewer and larger steps: the tokens are the same.

``gpu/bench_gpu.py`` measures an 8B-shaped model on one GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import corpus

HERE = Path(__file__).parent
RANKS = 2
MICRO_BATCH = 4
ACCUMULATION = 2
WARM_UP = 2
"""Steps that do not count: the first ones allocate, and start the gloo connections."""
RANK, ALPHA, LEARNING_RATE, SEED = 16, 32, "2e-4", 42
BARS = {"ours, unpacked": 1.1, "ours, packed": 2.0}
"""Least ratio to the stock script."""
STOCK, STOCK_PLAIN, UNPACKED, PACKED = "stock", "stock, no checkpointing", "ours, unpacked", "ours, packed"
VARIANTS = (STOCK, STOCK_PLAIN, UNPACKED, PACKED)
COMPUTE_TYPES = ("Auto", "BFloat16", "Float32")
SHARE_FOR_COMPUTE_TYPES = 5
"""One row of so many is trained in each compute type: one of them is ten times slower on some CPUs."""
AUTO_BAR = 0.95
"""Least speed of Auto, by that of the faster of the two types named explicitly."""


@dataclass(frozen=True)
class VariantRun:
    """One run of one variant."""

    tokens: int
    """Real tokens of the whole epoch."""
    tokens_per_second: float
    """Over all ranks, warm-up left out."""
    tokens_per_cpu_second: float
    """Tokens per second of rank 0's processor time: neither other processes on the machine nor the wait for other ranks
    counts."""


Runs = dict[str, list[VariantRun]]


def trainer_config(model: Path, data: Path, work: Path, *, packing: bool, compute_type: str = "Auto") -> Any:
    """The same job for this trainer."""
    from qlora_api.batch import BatchSplit  # noqa: PLC0415
    from qlora_api.contract import JobRef, TrainerConfig  # noqa: PLC0415
    from qlora_api.spec import QLoRAJobSpec  # noqa: PLC0415

    name = f"bench-{'packed' if packing else 'unpacked'}"
    spec = {
        "model": {"source": str(model)},
        "dataset": {
            "train": {"source": str(data)},
            "format": "PromptCompletion",
            "maxLength": corpus.MAX_LENGTH,
            "packing": packing,
        },
        "quantization": {"computeType": compute_type},
        "lora": {"rank": RANK, "alpha": ALPHA},
        "training": {
            "epochs": 1,
            "learningRate": LEARNING_RATE,
            "globalBatchSize": RANKS * MICRO_BATCH * ACCUMULATION,
            "microBatchSize": MICRO_BATCH,
            "seed": SEED,
        },
        "output": {"destination": str(work / "out" / name)},
    }
    return TrainerConfig(
        job=JobRef(name=name, uid=name),
        spec=QLoRAJobSpec.model_validate(spec),
        batch=BatchSplit(world_size=RANKS, micro_batch_size=MICRO_BATCH, gradient_accumulation_steps=ACCUMULATION),
        device="CPU",
        ranks_per_worker=RANKS,
        gradient_checkpointing=False,
        checkpoint_uri=str(work / "checkpoints"),
        cache_dir=str(work / "cache"),
        termination_message_path=str(work / "message.json"),
        metrics_port=0,
    )


def stock_settings(model: Path, data: Path, work: Path, *, checkpointing: bool) -> dict[str, Any]:
    return {
        "model": str(model),
        "data": str(data),
        "cache": str(work / "stock"),
        "gradient_checkpointing": checkpointing,
        "rank": RANK,
        "alpha": ALPHA,
        "learning_rate": float(LEARNING_RATE),
        "micro_batch_size": MICRO_BATCH,
        "accumulation": ACCUMULATION,
        "seed": SEED,
        "report": str(work / "report.json"),
    }


def measure(variant: str, model: Path, data: Path, work: Path, profile: Path | None) -> VariantRun:
    """Run one variant for an epoch."""
    report, job = work / "report.json", work / "job.json"
    if variant in (STOCK, STOCK_PLAIN):
        job.write_text(json.dumps(stock_settings(model, data, work, checkpointing=variant == STOCK)))
        command = [str(HERE / "stock_trainer.py"), str(job)]
    else:
        compute_type = variant if variant in COMPUTE_TYPES else "Auto"
        config = trainer_config(model, data, work, packing=variant == PACKED, compute_type=compute_type)
        job.write_text(config.model_dump_json(by_alias=True))
        subprocess.run([sys.executable, "-m", "qlora_trainer.prepare", job], check=True, capture_output=True)
        command = [str(HERE / "our_trainer.py"), str(job), str(report)]
        command += [str(profile.with_suffix(f".{variant.rsplit(maxsplit=1)[-1]}.txt"))] if profile else []
    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    with (work / "log.txt").open("w") as log:
        done = subprocess.run(
            [sys.executable, *launcher, *command], env=os.environ | environment, stdout=log, stderr=log, check=False
        )
    if done.returncode:
        raise SystemExit(f"{variant} failed:\n{(work / 'log.txt').read_text()[-4000:]}")
    found = json.loads(report.read_text())
    tokens = sum(found["tokens"][WARM_UP:])
    seconds, cpu_seconds = (sum(found[name][WARM_UP:]) for name in ("seconds", "cpu_seconds"))
    return VariantRun(sum(found["tokens"]), tokens / seconds, tokens / RANKS / cpu_seconds)


def verdict(speeds: dict[str, float], cpu_speeds: dict[str, float]) -> tuple[str, bool]:
    """The table, and whether the bars are met against the faster stock variant."""
    faster = max(speeds[STOCK], speeds[STOCK_PLAIN])
    lines = ["| | tokens/s | × stock | × faster stock | tokens/CPU s | bar |", "|---|---|---|---|---|---|"]
    met = True
    for name, speed in speeds.items():
        bar = BARS.get(name)
        ok = bar is None or speed >= bar * faster
        met = met and ok
        word = "" if bar is None else f"≥ {bar} × faster stock: {'met' if ok else 'MISSED'}"
        ratios = f"{speed / speeds[STOCK]:.2f} | {speed / faster:.2f}"
        lines.append(f"| {name} | {speed:,.0f} | {ratios} | {cpu_speeds[name]:,.0f} | {word} |")
    return "\n".join(lines), met


def rounds(variants: Sequence[str], repeats: int, model: Path, data: Path, work: Path, profile: Path | None) -> Runs:
    """Run the variants in turns.

    Raises:
        SystemExit: they did not train on the same number of tokens.

    """
    runs: Runs = {v: [] for v in variants}
    for number in range(repeats):
        for variant in variants:
            measured = measure(variant, model, data, work, profile)
            runs[variant].append(measured)
            print(
                f"run {number + 1}: {variant}: {measured.tokens_per_second:,.0f} tokens/s of {measured.tokens:,}",
                flush=True,
            )
    if len({m.tokens for ms in runs.values() for m in ms}) > 1:
        raise SystemExit("the variants did not train on the same number of tokens")
    return runs


def compute_types_verdict(runs: Runs) -> tuple[str, bool]:
    """Return the table of compute types, and whether Auto is as fast as the faster of the others."""
    speeds = {v: statistics.median(m.tokens_per_second for m in ms) for v, ms in runs.items()}
    faster = max(speed for name, speed in speeds.items() if name != "Auto")
    met = speeds["Auto"] >= AUTO_BAR * faster
    lines = ["| computeType | tokens/s | × faster explicit type |", "|---|---|---|"]
    lines += [f"| {name} | {speed:,.0f} | {speed / faster:.2f} |" for name, speed in speeds.items()]
    return "\n".join([*lines, f"\nAuto ≥ {AUTO_BAR} × the faster one: {'met' if met else 'MISSED'}"]), met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--only", choices=VARIANTS, action="append", help="leave the other variants out")
    parser.add_argument("--compute-types", action="store_true", help="only this trainer in each compute type")
    parser.add_argument("--profile", type=Path, help="write where this trainer's time goes to files of this name")
    arguments = parser.parse_args()
    variants = arguments.only or VARIANTS
    with tempfile.TemporaryDirectory(prefix="qlora-bench-") as name:
        work = Path(name)
        few = corpus.prepare(work / "few", arguments.rows // SHARE_FOR_COMPUTE_TYPES)
        types, fast = compute_types_verdict(
            rounds(COMPUTE_TYPES, arguments.repeats, *few, work / "few", arguments.profile)
        )
        print(f"\n{types}\n", flush=True)
        if arguments.compute_types:
            return 0 if fast else 1
        runs = rounds(variants, arguments.repeats, *corpus.prepare(work, arguments.rows), work, arguments.profile)
    speeds = {v: statistics.median(m.tokens_per_second for m in ms) for v, ms in runs.items()}
    cpu_speeds = {v: statistics.median(m.tokens_per_cpu_second for m in ms) for v, ms in runs.items()}
    if arguments.only:
        return 0
    table, met = verdict(speeds, cpu_speeds)
    print(f"\n{table}")
    return 0 if met and fast else 1


if __name__ == "__main__":
    sys.exit(main())
