"""Minor page faults with glibc's defaults and with freed memory kept: ``python benchmarks/bench_page_faults.py``

Runs Prepare, ranks and the training of the quickstart's base, each twice in one call. A fault is the first touch of a
page; on a virtual machine it can cost 20 µs. Counts do not depend on other work on the machine.
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
from resource import RUSAGE_SELF, getrusage
from typing import Any

from qlora_trainer.worker.launch import CACHED_PRIMITIVES

HERE = Path(__file__).parent
QUICKSTART = HERE.parent / "examples/quickstart"
DEFAULTS = {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}
"""Changes nothing, but leaves the allocator as the environment has it (``qlora_trainer.allocator``)."""
KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(CACHED_PRIMITIVES)}
"""As the launcher has it."""
ALLOCATORS = {"glibc's defaults": DEFAULTS, "freed memory kept": KEPT}
BASE = {"OMP_WAIT_POLICY": "passive"}
RANKS = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}
BASE_STEPS = 12
STEADY = 0.5
"""Share of the steps that counts, the last ones: the first ones allocate."""


@dataclass(frozen=True)
class PageFaults:
    """One process: of the steps after the warm-up, or as a whole where there are none."""

    faults: float
    """Mean of a step: some steps have many, others none."""
    cpu_seconds: float
    """Median of a step."""
    peak_bytes: int


def of_steps(report: dict[str, Any]) -> PageFaults:
    steady = int(len(report["page_faults"]) * (1 - STEADY))
    faults, seconds = report["page_faults"][steady:], report["cpu_seconds"][steady:]
    return PageFaults(statistics.mean(faults), statistics.median(seconds), report["peak_bytes"])


def train_base(report: Path) -> None:
    """Train the quickstart's base for some steps on random tokens, and write what each took."""
    sys.path.insert(0, str(QUICKSTART))
    import small_base  # noqa: PLC0415
    import torch  # noqa: PLC0415

    from qlora_trainer.allocator import keep_freed_memory  # noqa: PLC0415
    from qlora_trainer.model.device.hardware import fast_dtype  # noqa: PLC0415

    keep_freed_memory()
    recipe, dtype = small_base.Recipe(), fast_dtype(torch.device("cpu"))
    tokenizer = small_base.train_tokenizer(["x"], recipe.vocabulary)
    tokenizer.add_tokens([f"<{i}>" for i in range(recipe.vocabulary - len(tokenizer))])
    model = small_base.make_model(tokenizer, recipe)
    optimizers = small_base.make_optimizers(model, recipe, dtype)
    rows = torch.randint(0, recipe.vocabulary, (recipe.batch, recipe.length))
    faults, seconds = [], []
    for _ in range(BASE_STEPS):
        before = getrusage(RUSAGE_SELF)
        small_base.train_step(model, rows, optimizers, dtype)
        after = getrusage(RUSAGE_SELF)
        faults.append(after.ru_minflt - before.ru_minflt)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    peak = getrusage(RUSAGE_SELF).ru_maxrss * 1024
    report.write_text(json.dumps({"page_faults": faults, "cpu_seconds": seconds, "peak_bytes": peak}))


def count_process(command: Sequence[str], environment: dict[str, str]) -> PageFaults:
    """Run a process to its end and ask the kernel what it took."""
    process = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return PageFaults(used.ru_minflt, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def count_ranks(config: Any, work: Path, environment: dict[str, str]) -> PageFaults:
    """Train with ``our_trainer.py``; of rank 0."""
    job, report = work / "job.json", work / "report.json"
    job.write_text(config.model_dump_json(by_alias=True))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={config.ranks_per_worker}"]
    subprocess.run(
        [sys.executable, *launcher, str(HERE / "our_trainer.py"), str(job), str(report)],
        env=os.environ | RANKS | environment,
        check=True,
        capture_output=True,
    )
    return of_steps(json.loads(report.read_text()))


def prepare(config: Any, work: Path, environment: dict[str, str]) -> PageFaults:
    """Prepare with nothing cached."""
    job = work / "prepare.json"
    job.write_text(config.model_dump_json(by_alias=True))
    return count_process([sys.executable, "-m", "qlora_trainer.prepare", str(job)], environment)


def quickstart_config(data: Path, work: Path, steps: int) -> Any:
    """The quickstart's job on two ranks, with fewer steps."""
    import yaml  # noqa: PLC0415

    from qlora_api.batch import split_batch  # noqa: PLC0415
    from qlora_api.contract import JobRef, TrainerConfig  # noqa: PLC0415
    from qlora_api.job import QLoRAJob  # noqa: PLC0415

    job = QLoRAJob.model_validate(yaml.safe_load((QUICKSTART.parent / "quickstart.yaml").read_text()))
    dataset = {"train": {"source": str(data / "train.jsonl")}, "eval": {"source": str(data / "eval.jsonl")}}
    spec = job.spec.model_dump(by_alias=True, exclude_none=True)
    spec["model"] |= {"source": str(data / "base")}
    spec["dataset"] |= dataset
    spec["output"] |= {"destination": str(work / "out")}
    spec["training"] = {k: v for k, v in spec["training"].items() if k != "epochs"} | {"maxSteps": steps}
    spec = type(job.spec).model_validate(spec)
    return TrainerConfig(
        job=JobRef(name="quickstart", uid="bench-page-faults"),
        spec=spec,
        batch=split_batch(spec, 2),
        device="CPU",
        ranks_per_worker=2,
        gradient_checkpointing=False,
        checkpoint_uri=str(work / "checkpoints"),
        cache_dir=str(work / "cache"),
        termination_message_path=str(work / "message.json"),
        metrics_port=0,
    )


def bench_config(work: Path, rows: int) -> Any:
    """The packed job of bench_trainer.py."""
    import bench_trainer  # noqa: PLC0415
    import corpus  # noqa: PLC0415

    model, data = corpus.prepare(work / "corpus", rows)
    return bench_trainer.trainer_config(model, data, work, packing=True)


def measure(data: Path, steps: int, rows: int) -> dict[str, dict[str, PageFaults]]:
    """By what was run, and by allocator."""
    found: dict[str, dict[str, PageFaults]] = {}
    with tempfile.TemporaryDirectory(prefix="qlora-bench-") as name:
        for allocator, environment in ALLOCATORS.items():
            work = Path(name) / allocator.replace(" ", "-")
            work.mkdir(parents=True)
            report = work / "base.json"
            command = [sys.executable, __file__, "--base", str(report)]
            count_process(command, BASE | environment)
            jobs = {"quickstart": quickstart_config(data, work, steps), "bench_trainer": bench_config(work, rows)}
            one = {"a step of the quickstart's base": of_steps(json.loads(report.read_text()))}
            for job, config in jobs.items():
                one[f"Prepare of {job}, whole"] = prepare(config, work, environment)
                one[f"a step of a rank of {job}"] = count_ranks(config, work, environment)
            for what, counted in one.items():
                found.setdefault(what, {})[allocator] = counted
    return found


def table(found: dict[str, dict[str, PageFaults]]) -> str:
    lines = ["| | allocator | page faults | CPU seconds | peak MiB |", "|---|---|---|---|---|"]
    for what, by_allocator in found.items():
        for allocator, c in by_allocator.items():
            peak = c.peak_bytes / 2**20
            lines.append(f"| {what} | {allocator} | {c.faults:,.0f} | {c.cpu_seconds:.2f} | {peak:,.0f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--data", type=Path, default=Path("runs/quickstart-data"), help="made where it is not there")
    parser.add_argument("--steps", type=int, default=48, help="of the quickstart's ranks")
    parser.add_argument("--rows", type=int, default=1500, help="of bench_trainer's job")
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.base:
        train_base(arguments.base)
        return 0
    if not arguments.data.exists():
        subprocess.run([sys.executable, QUICKSTART / "prepare.py", "--out", arguments.data], check=True)
    print(table(measure(arguments.data.absolute(), arguments.steps, arguments.rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
