"""Compare this trainer with the published method, number by number: ``python benchmarks/fidelity/fidelity.py``

Trains the quickstart's model several times, each time through the trainer's own launcher, and writes docs/fidelity.md.
Exit code 1 when a bound is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import experts_base
import fidelity_models as models
from experts_base import make_experts_base
from fidelity_jobs import AttemptLog, SizedData, TrainerRun, checkpoint_files, head, job, tensor_names
from qlora_trainer.prepare.local_copy import PreparedInputs
from qlora_trainer.prepare.tokenize_rows import PreparedData, load_prepared_data

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "fidelity.md"


@dataclass(frozen=True)
class Check:
    """A number and what it must not exceed."""

    what: str
    measured: float
    bound: float
    unit: str = ""

    @property
    def passed(self) -> bool:
        return self.measured <= self.bound

    @property
    def row(self) -> str:
        verdict = "pass" if self.passed else "**FAIL**"
        return f"| {self.what} | {number(self.measured)}{self.unit} | ≤ {number(self.bound)}{self.unit} | {verdict} |"


@dataclass(frozen=True)
class Part:
    """A section of the page."""

    title: str
    text: str
    checks: list[Check]


def number(value: float) -> str:
    return "0" if value == 0 else f"{value:.3g}"


def table(head_row: list[str], rows: list[list[str]]) -> str:
    lines = [head_row, ["---"] * len(head_row), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def worst(one: AttemptLog, other: AttemptLog) -> float:
    """The largest relative difference of a step's loss; infinite when a step is missing."""
    if one.losses.keys() != other.losses.keys() or not one.losses:
        return float("inf")
    return max(abs(loss / other.losses[step] - 1) for step, loss in one.losses.items())


def rows_of(done: TrainerRun) -> PreparedData:
    """The tokenized rows of a run."""
    prepared = PreparedInputs.read(done.config)
    assert prepared is not None
    return load_prepared_data(prepared.data_dir)


# ----------------------------------------------------------------------------------------------------------- the parts


EXACT, DEFAULT = "16-bit LoRA", "NF4 + DQ"


def quantized_runs(work: Path, rows: SizedData, name: str, ways: dict[str, dict[str, Any]]) -> dict[str, TrainerRun]:
    """Describe a run for each way to hold the base, all with one seed and data."""
    return {way: job(f"{name}-{i}", work, rows, quantization=fields) for i, (way, fields) in enumerate(ways.items())}


def final_losses(runs: dict[str, TrainerRun]) -> tuple[str, dict[str, float]]:
    """Train each run to its end; return a table and the final evaluation loss of each."""
    ended = {way: run.run() for way, run in runs.items()}
    final = {way: e.eval_losses[e.total_steps] for way, e in ended.items()}
    lines = [
        [way, f"{e.eval_losses[0]:.4f}", f"{final[way]:.4f}", f"{100 * (final[way] / final[EXACT] - 1):+.2f} %"]
        for way, e in ended.items()
    ]
    return table(["base held as", "eval loss before", "after", "against 16-bit LoRA"], lines), final


def loss_above_exact(final: dict[str, float]) -> Check:
    above = 100 * (final[DEFAULT] / final[EXACT] - 1)
    return Check(f"{DEFAULT}: final eval loss above that of {EXACT}", above, 1.0, " %")


def quantization(work: Path, rows: SizedData) -> Part:
    """Four ways to hold the base, the same seed and data; NF4 with double quantization is the default."""
    ways: dict[str, dict[str, Any]] = {
        EXACT: {"type": "None"},
        DEFAULT: {},
        "NF4": {"doubleQuantization": False},
        "FP4 + DQ": {"type": "FP4"},
    }
    text, final = final_losses(quantized_runs(work, rows, "quality", ways))
    return Part("Quantized against 16-bit training", text, [loss_above_exact(final)])


EXPERTS = "Experts in 4 bits"


def experts(work: Path, rows: SizedData) -> Part:
    """A small mixture of experts, trained here, whose experts are quantized or not."""
    base = make_experts_base(rows.base, work / "experts")
    runs = quantized_runs(work, replace(rows, base=base), "experts", {EXACT: {"type": "None"}, DEFAULT: {}})
    shown, final = final_losses(runs)
    share = models.quantized_share(runs[DEFAULT].config)
    text = (
        f"A base with {experts_base.EXPERTS} experts a layer, of which each token visits {experts_base.CHOSEN}, trained"
        f" from scratch by this benchmark. With {DEFAULT} {100 * share:.0f} % of its weights are in 4 bits, experts "
        f"included; experts and attention are adapted.\n\n{shown}"
    )
    return Part(EXPERTS, text, [loss_above_exact(final)])


SKIPPED = "Layers left in 16 bits"
WORST = 3


def skipped(work: Path, rows: SizedData) -> Part:
    """``quantization.skipModules`` with the layers that lose most, as ``qlora inspect`` measures them."""
    worst = models.worst_layers(rows.base, WORST)
    some = f"{DEFAULT}, {WORST} layers in 16 bits"
    ways: dict[str, dict[str, Any]] = {EXACT: {"type": "None"}, some: {"skipModules": worst}, DEFAULT: {}}
    runs = quantized_runs(work, rows, "skipped", ways)
    shown, final = final_losses(runs)
    eval_rows = rows_of(runs[EXACT]).eval
    assert eval_rows is not None
    apart = models.divergences([run.config for run in runs.values()], eval_rows)
    lines, unplanned = [], 0
    for (way, run), found in zip(runs.items(), apart, strict=True):
        planned, loaded = models.weight_bytes_planned_and_loaded(run.config)
        unplanned = max(unplanned, abs(planned - loaded))
        lines.append([way, f"{planned:,}", f"{loaded:,}", f"{found:.2e}"])
    text = (
        f"In 16 bits: {', '.join(f'`{name}`' for name in worst)}. The divergence is that of the next token's "
        "distribution from the 16-bit base's, before training (Kullback-Leibler, mean over the targets of the held-out "
        f"rows, nats): the losses after training differ too little to rank the three.\n\n{shown}\n\n"
    )
    text += table(["base held as", "bytes planned", "bytes loaded", "divergence"], lines)
    checks = [
        Check(f"divergence with {WORST} layers in 16 bits, by that of {DEFAULT}", apart[1] / apart[2], 1.0),
        Check(f"{some}: final eval loss from {EXACT}'s", 100 * abs(final[some] / final[EXACT] - 1), 0.2, " %"),
        Check("bytes planned and loaded, largest difference", unplanned, 0),
    ]
    return Part(SKIPPED, text, checks)


COMPUTE_TYPES = "Float16 and BFloat16 against Float32"


def compute_types(work: Path, rows: SizedData) -> Part:
    """The same seed and data in each type that a base can compute in; Float16 as a CPU emulates it."""
    ended = {}
    for compute in ("Float32", "BFloat16", "Float16"):
        described = job(f"compute-{compute}", work, rows, quantization={"computeType": compute})
        ended[compute] = replace(described, emulates_float16=compute == "Float16").run()
    history = [json.loads(line) for line in (described.last_checkpoint / "history.jsonl").read_text().splitlines()]
    scales = [line for line in history if "lossScale" in line]
    final = {name: e.eval_losses[e.total_steps] for name, e in ended.items()}
    exact = ended["Float32"]
    lines = [
        [name, f"{e.eval_losses[0]:.4f}", f"{final[name]:.4f}", f"{100 * (final[name] / final['Float32'] - 1):+.3f} %"]
        for name, e in ended.items()
    ]
    text = (
        f"{exact.total_steps} steps of 8 packs on the NF4 base. Float16 has dynamic loss scaling: at the end the "
        f"scale was {scales[-1]['lossScale']:g}, and {scales[-1]['skippedSteps']:g} updates had been left out.\n\n"
    )
    text += table(["computeType", "eval loss before", "after", "against Float32"], lines)
    checks = [
        Check(f"largest relative difference of a step's loss, {name} and Float32", worst(ended[name], exact), 5e-3)
        for name in ("BFloat16", "Float16")
    ]
    return Part(COMPUTE_TYPES, text, checks)


def errors(rows: SizedData) -> Part:
    """Measure what quantization does to each kind of layer."""
    found = models.quantization_errors(rows.base)
    layers = list(next(iter(found.values())))

    def ratio(one: str, other: str) -> float:
        return max(found[one][layer] / found[other][layer] for layer in layers)

    text = "‖W - Q(W)‖ / ‖W‖ over all layers of a kind.\n\n"
    text += table(["layer", *found], [[layer, *(f"{found[kind][layer]:.4f}" for kind in found)] for layer in layers])
    checks = [
        Check("largest error of a kind of layer, NF4 + DQ", max(found["NF4 + DQ"].values()), 0.11),
        Check("largest ratio of the errors of NF4 + DQ and FP4 + DQ", ratio("NF4 + DQ", "FP4 + DQ"), 0.9),
        Check("what double quantization adds to the error of NF4", ratio("NF4 + DQ", "NF4") - 1, 0.01),
    ]
    return Part("Quantization error", text, checks)


def ranks(work: Path, rows: SizedData) -> Part:
    """The batch equation: two ranks × accumulation 2 = one rank × accumulation 4."""
    checks = []
    for compute in ("BFloat16", "Float32"):
        way = {"computeType": compute}
        two = job(f"two-ranks-{compute}", work, rows, ranks=2, quantization=way).run()
        one = job(f"one-rank-{compute}", work, rows, ranks=1, quantization=way).run()
        checks.append(Check(f"largest relative difference of a step's loss, {compute}", worst(two, one), 1e-3))
    text = f"{two.total_steps} steps of 8 packs, dealt to other micro-batches on other ranks."
    return Part("Two ranks × accumulation 2 against one rank × accumulation 4", text, checks)


def packing(done: TrainerRun) -> Part:
    """Rows in packs must not see each other, with a trained adapter on the NF4 base."""
    data = rows_of(done)
    base, checks = Path(done.config.spec.model.source), []
    for compute in ("Float32", "BFloat16"):
        found = models.packing_difference(base, compute, done.last_checkpoint, data)
        # In bf16 a product may round otherwise when other rows stand beside it.
        bound = 1e-3 if compute == "Float32" else 5e-2
        checks.append(Check(f"mean difference of a token's loss, {compute}", found.mean, 1e-3))
        checks.append(Check(f"largest difference of a token's loss, {compute}", found.largest, bound))
    assert data.eval is not None
    assert data.eval_packs is not None
    text = (
        f"{len(data.eval)} held-out rows in {len(data.eval_packs)} packs, and each on its own; relative to the mean"
        f" loss. If rows saw each other, the mean difference would be {number(found.mean_with_leak)}."
    )
    checks.append(Check("bound of the mean by what a leak would make", 1e-3 / found.mean_with_leak, 0.1))
    return Part("Packed against unpacked", text, checks)


def resuming(work: Path, rows: SizedData) -> Part:
    """Stop at some step of epoch 2 by SIGTERM to the launcher, go on, and compare with a run that was left alone."""
    checks, lines = [], []
    for stage in (0, 2):
        way = {"zeroStage": stage}
        whole_job = job(f"whole-zero{stage}", work, rows, parallelism=way)
        stopped = job(f"stopped-zero{stage}", work, rows, parallelism=way)
        whole = whole_job.run()
        per_epoch = whole.total_steps // rows.epochs
        first = stopped.run_until(per_epoch + per_epoch // 2)
        second = stopped.again().run()
        last = max(first.losses)
        both = AttemptLog(second.code, first.losses | second.losses, {}, second.total_steps)
        weights = [(j.last_checkpoint / "adapter.safetensors").read_bytes() for j in (whole_job, stopped)]
        lines.append(
            [
                str(stage),
                f"{last} of {whole.total_steps}",
                str(min(second.losses)),
                "yes" if weights[0] == weights[1] else "no",
            ]
        )
        checks.append(Check(f"ZeRO {stage}: largest relative difference of a step's loss", worst(both, whole), 1e-4))
        checks.append(Check(f"ZeRO {stage}: steps lost or done twice", abs(min(second.losses) - last - 1), 0))
    text = "Two ranks, PagedAdamW8Bit. Samples in another order would show in the losses: each step's rows differ.\n\n"
    text += table(["ZeRO", "stopped after step", "went on with step", "final adapter equal bit for bit"], lines)
    return Part("Stopped and resumed against uninterrupted", text, checks)


def merged(work: Path, done: TrainerRun) -> Part:
    """Compare what is served with what was trained."""
    data = rows_of(done)
    published_adapter = done.message.adapter
    assert data.eval is not None
    assert published_adapter is not None
    base, adapter = Path(done.config.spec.model.source), Path(published_adapter.uri)
    found = models.merging(base, adapter, done.last_checkpoint, data.eval, work)
    trained, unmerged, published, _ = found

    def above(variant: models.Variant, other: models.Variant) -> float:
        return 100 * (variant.eval_loss / other.eval_loss - 1)

    lines = [
        [
            v.name,
            f"{v.eval_loss:.4f}",
            f"{round(above(v, trained), 2) + 0.0:+.2f} %",
            f"{v.mean:.3f}",
            f"{v.largest:.2f}",
        ]
        for v in found
    ]
    text = table(["", "eval loss", "against as trained", "mean logit difference", "largest"], lines)
    checks = [
        Check("merged against unmerged on the 16-bit base: eval loss", abs(above(published, unmerged)), 0.2, " %"),
        Check("merged against as trained: eval loss above", above(published, trained), 1.0, " %"),
    ]
    return Part("Merged against unmerged", text, checks)


def checkpoint(done: TrainerRun) -> Part:
    """A checkpoint holds what learns and no frozen weight."""
    folder = done.last_checkpoint
    tensors = tensor_names(folder / "adapter.safetensors")
    frozen = {n: size for n, size in tensors.items() if ".lora_" not in n}
    files = table(["file", "bytes"], [[f"`{name}`", f"{size:,}"] for name, size in checkpoint_files(folder).items()])
    text = f"{files}\n\n{len(tensors)} tensors in the adapter, {sum(tensors.values()):,} bytes; the first ones:\n\n"
    text += table(["tensor", "bytes"], [[f"`{n}`", f"{size:,}"] for n, size in list(tensors.items())[:14]])
    base = sum(p.stat().st_size for p in Path(done.config.spec.model.source).glob("*.safetensors"))
    rest = sum(checkpoint_files(folder).values()) - sum(tensors.values())
    # fp32 master weights once more and two moments, 8-bit or (under 4,096 elements) fp32: at most three times.
    checks = [
        Check("tensors in the adapter that are not LoRA's", len(frozen), 0),
        Check("bytes besides the adapter, by its size", rest / sum(tensors.values()), 3.5),
    ]
    return Part("A checkpoint holds no frozen weight", f"{text}\n\nThe base has {base:,} bytes on disk.", checks)


# ------------------------------------------------------------------------------------------------------------ the page


def quickstart(work: Path) -> Path:
    """The quickstart's base and rows; made once, and kept where ``qlora run`` keeps them."""
    out = work / "quickstart"
    script = ROOT / "examples" / "quickstart" / "prepare.py"
    subprocess.run([sys.executable, str(script), "--out", str(out)], check=True)
    return out


def page(parts: list[Part], seconds: float) -> str:
    """The whole of docs/fidelity.md."""
    libraries = ", ".join(f"{n} {version(n)}" for n in ("torch", "transformers", "peft", "bitsandbytes", "deepspeed"))
    checks = [c for p in parts for c in p.checks]
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}, {libraries}"
    question = (
        "Does this trainer do what the method (QLoRA, Dettmers et al. 2023) and its own promises say?\n"
        "`make fidelity` trains the quickstart's model with the real trainer and writes this page."
    )
    text = [
        "# Fidelity",
        "<!-- Generated by benchmarks/fidelity/fidelity.py: do not edit. -->",
        question,
        f"{sum(c.passed for c in checks)} of {len(checks)} bounds are met, in {seconds / 60:.0f} minutes on {machine}.",
    ]
    text += [section(part) for part in parts]
    return "\n\n".join(text) + "\n"


def section(part: Part) -> str:
    """One part of the page."""
    checks = table(["check", "measured", "bound", ""], []) + "\n" + "\n".join(c.row for c in part.checks)
    return "\n\n".join([f"## {part.title}", part.text, checks])


def write_part(part: Part) -> int:
    """Put one part in its place on the page, the rest of which stays as an earlier run wrote it."""
    opening, *sections = PAGE.read_text("utf-8").rstrip("\n").split("\n\n## ")
    own, place = section(part).removeprefix("## "), [s.startswith(part.title) for s in sections]
    if any(place):
        sections[place.index(True)] = own
    else:
        sections.insert(1, own)
    text = "\n\n## ".join([opening, *sections]) + "\n"
    met, bounds = text.count("| pass |"), text.count("| pass |") + text.count("| **FAIL** |")
    PAGE.write_text(re.sub(r"\d+ of \d+ bounds", f"{met} of {bounds} bounds", text), "utf-8")
    print("\n".join(c.row for c in part.checks))
    return 0 if all(c.passed for c in part.checks) else 1


def main() -> int:
    os.environ["DS_ACCELERATOR"] = "cpu"
    parser = argparse.ArgumentParser(description="Compare this trainer with the published method.")
    parser.add_argument("--data", type=Path, help="folder made by examples/quickstart/prepare.py; default: make it")
    parser.add_argument("--part", choices=["compute-types", "experts", "skipped"], help="write only this part anew")
    arguments = parser.parse_args()
    data = arguments.data
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="qlora-fidelity-") as name:
        work = Path(name)
        made = data or quickstart(work)
        held_out = head(made / "eval.jsonl", work / "eval.jsonl", 300)
        many = SizedData(made / "base", head(made / "train.jsonl", work / "many.jsonl", 2400), held_out, epochs=2)
        few = SizedData(made / "base", head(made / "train.jsonl", work / "few.jsonl", 320), held_out, epochs=2)
        fewest = SizedData(
            made / "base",
            head(made / "train.jsonl", work / "fewest.jsonl", 160),
            head(made / "eval.jsonl", work / "few-eval.jsonl", 40),
            epochs=2,
        )
        some = SizedData(made / "base", head(made / "train.jsonl", work / "some.jsonl", 800), held_out, epochs=2)
        single = {"compute-types": (compute_types, fewest), "experts": (experts, some), "skipped": (skipped, some)}
        if arguments.part:
            part, rows = single[arguments.part]
            return write_part(part(work, rows))
        parts = [
            quantization(work, many),
            *(part(work, rows) for part, rows in reversed(single.values())),
            errors(many),
        ]
        parts += [ranks(work, few), resuming(work, few)]
        done = job("quality-1", work, many)  # NF4 + DQ
        parts += [packing(done), merged(work, done), checkpoint(done)]
    PAGE.write_text(page(parts, time.monotonic() - start), "utf-8")
    missed = [c for p in parts for c in p.checks if not c.passed]
    print("\n".join(c.row for p in parts for c in p.checks))
    print(f"{PAGE.relative_to(ROOT)} is written; {len(missed)} bounds are missed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
