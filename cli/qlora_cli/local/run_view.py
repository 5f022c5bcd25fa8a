"""Tables and paragraphs that 'qlora run' prints. No decisions, no I/O but the console."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from qlora_api.spec import ComputeType, LossOn, QLoRAJobSpec, QuantizationSpec, QuantizationType
from qlora_api.status import Memory, MemoryComponent
from qlora_cli.local import local_spec
from qlora_cli.text import figures, units
from qlora_cli.text.memory_rows import memory_rows
from qlora_cli.text.paragraphs import LabelledLines, Paragraph

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from rich.console import RenderableType

    from qlora_api.batch import BatchSplit
    from qlora_api.contract import PrepareReceipt
    from qlora_api.lifecycle import Retry
    from qlora_api.status import Attempt, PrepareResult, Reason
    from qlora_cli.local.machine import World
    from qlora_cli.local.run_folder import RunRecord

SAMPLE_CHARACTERS = 800
MOST_COMPONENTS = 4


# ----------------------------------------------------------------------------------------------------------- before it


def plan(record: RunRecord, spec: QLoRAJobSpec, world: World, batch: BatchSplit, folder: Path) -> LabelledLines:
    """Print what will happen."""
    number = len(record.attempts) + 1
    name = f"{record.name} (run {record.uid[:8]}" + (f", attempt {number}: resumes)" if number > 1 else ")")
    rows = [
        ("Job", name),
        ("Model", spec.model.source),
        ("Data", _data(spec)),
        ("Quantization", _quantization(spec)),
        ("Adapter", _adapter(spec)),
        ("Batch", batch_equation(batch)),
        ("Schedule", _schedule(spec)),
        ("Machine", _machine(spec, world)),
        ("Checkpoints", f"{_cadence(spec)}, in {folder / 'checkpoints'}"),
        ("Output", spec.output.destination + (", with the merged model" if spec.output.merge != "None" else "")),
    ]
    ignored = local_spec.unused(spec)
    if ignored:
        rows.append(("Not used here", "; ".join(ignored)))
    return LabelledLines(rows)


def batch_equation(batch: BatchSplit) -> str:
    return (
        f"{batch.global_batch_size} sequences = {batch.micro_batch_size} micro-batch"
        f" × {batch.gradient_accumulation_steps} accumulation × {batch.world_size} ranks"
    )


def _data(spec: QLoRAJobSpec) -> str:
    data = spec.dataset
    held_out = "no evaluation rows"
    if data.eval is not None:
        held_out = f"evaluation {data.eval.source}" if data.eval.source else f"{data.eval.fraction} held out"
    targets = {
        LossOn.ALL: "all tokens count",
        LossOn.COMPLETION: "completions count",
        LossOn.ASSISTANT: "the assistant's tokens count",
    }
    packing = "packed" if data.packing else "not packed"
    return (
        f"{data.train.source}, {data.format}, {held_out}; {targets[data.effective_loss_on]};"
        f" {packing}, up to {data.max_length} tokens"
    )


def _quantization(spec: QLoRAJobSpec) -> str:
    q = spec.quantization
    if q.type is QuantizationType.NONE:
        return f"none, {_computes_in(q)}"
    double = " with double quantization" if q.type.is_four_bit and q.double_quantization else ""
    skipped = f" but for {', '.join(q.skip_modules)}" if q.skip_modules else ""
    return f"{q.type}{double}{skipped}, {_computes_in(q)}"


def _computes_in(quantization: QuantizationSpec) -> str:
    if quantization.compute_type is ComputeType.AUTO:
        return "compute type chosen for the device"
    return f"computes in {quantization.compute_type}"


def _adapter(spec: QLoRAJobSpec) -> str:
    lora = spec.lora
    kind = "DoRA" if lora.dora else "LoRA"
    layers = ", ".join(lora.target_modules) if lora.target_modules else "all linear layers but the head, and experts"
    stabilized = ", rank-stabilized" if lora.rank_stabilized else ""
    count = len(lora.train_tokens)
    tokens = (
        f", and the embedding{'s' if count > 1 else ''} of {count} token{'s' if count > 1 else ''}" if count else ""
    )
    return f"{kind} of rank {lora.rank}, alpha {lora.alpha}, dropout {lora.dropout}{stabilized}, on {layers}{tokens}"


def _schedule(spec: QLoRAJobSpec) -> str:
    t = spec.training
    length = f"{t.max_steps} steps" if t.max_steps else f"{t.epochs} epoch{'s' if t.epochs != 1 else ''}"
    warmup = f" after {t.warmup_steps} steps of warmup" if t.warmup_steps else ""
    return f"{length}, learning rate {t.learning_rate} {t.schedule}{warmup}, {t.optimizer}"


def _machine(spec: QLoRAJobSpec, world: World) -> str:
    zero = f"ZeRO stage {spec.parallelism.zero_stage}"
    recompute = "activations recomputed" if local_spec.checkpoints_gradients(spec, world) else "activations kept"
    return f"{world.description}; {zero}, {recompute}"


def _cadence(spec: QLoRAJobSpec) -> str:
    c = spec.checkpoint
    steps = f"every {c.every_steps} steps" if c.every_steps else "once an epoch"
    return f"{steps} and every {c.every_minutes} min, the newest {c.keep} kept"


def receipt(found: PrepareReceipt, prepared: PrepareResult | None) -> RenderableType:
    """Print what Prepare found in the rows, with one of them, and where the training begins."""
    lost = [
        f"{units.number(count)} {what}"
        for count, what in (
            (found.truncated, "truncated"),
            (found.dropped, "dropped as too long"),
            (found.fully_masked, "left out as no token counts"),
        )
        if count
    ]
    share = found.train_target_tokens / found.train_tokens if found.train_tokens else 0
    rows = [
        ("Training rows", f"{units.number(found.train_rows)} in {units.number(found.train_sequences)} sequences"),
        (
            "Tokens",
            f"{units.number(found.train_tokens)}, {share:.0%} of them count; longest row {units.number(found.longest)}",
        ),
        ("Rows by tokens", units.lengths(found.lengths)),
        ("Slots filled", f"{found.packing_efficiency:.1%}"),
        ("Rows cut or lost", ", ".join(lost) or "none"),
    ]
    if found.rows_with_tools:
        rows.append(("Tools", f"{units.number(found.rows_with_tools)} rows give the chat template tools"))
    if found.split_rows:
        rows.append(("Split", f"{units.number(found.split_rows)} rows give several: the chat template rewrites turns"))
    if found.left_out:
        empty = f"; {units.number(found.empty_turns)} empty answers are not learned" if found.empty_turns else ""
        rows.append(
            (
                "Left out",
                f"{units.number(found.left_out)} rows say what the chat template or tokenizer leaves out{empty}",
            )
        )
    rows += [("Note", note) for note in found.notes]
    if found.duplicates:
        rows.append(("Repeated", f"{units.number(found.duplicates)} training rows repeat an earlier one"))
    if found.eval_rows:
        known = f"; {units.number(found.eval_in_train)} of them are training rows too" if found.eval_in_train else ""
        if found.eval_prompts_in_train > found.eval_in_train:
            known += f"; of {units.number(found.eval_prompts_in_train)} the prompt is in the training rows"
        rows.append(
            ("Evaluation", f"{units.number(found.eval_rows)} rows, {units.number(found.eval_tokens)} tokens{known}")
        )
    rows += _planned(prepared) if prepared else ()
    parts: list[RenderableType] = [LabelledLines(rows)]
    for sample in found.samples[:1]:
        text = sample if len(sample) <= SAMPLE_CHARACTERS else f"{sample[:SAMPLE_CHARACTERS]} …"
        parts.append(
            Panel(Text(text), title=Text("A row; tokens between ⟦ and ⟧ count"), title_align="left", border_style="dim")
        )
    return Group(*parts)


def _planned(prepared: PrepareResult) -> Iterator[tuple[str, str]]:
    """Return how training begins, and what it should need."""
    again = "activations are computed again" if prepared.gradient_checkpointing else "activations are kept"
    yield "Begins with", f"{batch_equation(prepared.batch)}; {again}"
    parts = {component: size for component, size in prepared.memory.items() if component != MemoryComponent.PEAK}
    if parts:
        largest = sorted(parts.items(), key=lambda part: -part[1])[:MOST_COMPONENTS]
        mostly = ", ".join(f"{units.spaced(component)} {units.size(size)}" for component, size in largest)
        peak = prepared.memory.get(MemoryComponent.PEAK)
        whole = f"peak {units.size(peak)}" if peak else f"{units.size(sum(parts.values()))} of tensors (CPU)"
        yield "Memory of a rank", f"{whole}, predicted; mostly {mostly}"
    if prepared.expected_gpu_hours:
        yield "Should take", f"{prepared.expected_gpu_hours} GPU-hours, give or take half"


# ---------------------------------------------------------------------------------------------------------- between


def retry(ended: Attempt, decision: Retry) -> str:
    """Print why there is another attempt, and what differs."""
    what = [f"Attempt {ended.number} ended: {ended.reason}. {ended.message}".rstrip()]
    if decision.batch.micro_batch_size != ended.micro_batch_size:
        what.append(f"The next attempt takes smaller portions: {batch_equation(decision.batch)}.")
    when = f"in {units.duration(decision.wait_seconds)}" if decision.wait_seconds else "now"
    what.append(f"Resuming from the last checkpoint {when}.")
    return "\n".join(what)


# --------------------------------------------------------------------------------------------------------- after it


def attempts(ended: Sequence[Attempt]) -> Table:
    """One row for each attempt."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for head in ("Attempt", "Ended", "Exit code", "Steps", "Batch", "Took"):
        table.add_column(head)
    for a in ended:
        took = units.duration((a.end_time - a.start_time).total_seconds()) if a.end_time else ""
        steps = f"{a.first_step or 0} → {a.last_step}" if a.last_step is not None else ""
        code = "" if a.exit_code is None else str(a.exit_code)
        batch = f"{a.micro_batch_size} × {a.gradient_accumulation_steps} × {a.world_size}"
        table.add_row(str(a.number), str(a.reason or "running"), code, steps, batch, took)
    return table


def memory(found: Memory, device: str) -> Table:
    """Bytes per rank by component, predicted and measured as far as they are known; the peak last."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("Memory of a rank")
    shown = [column for column, by in ((1, found.predicted), (2, found.measured)) if by]
    for column in shown:
        table.add_column(("", "Predicted", "Measured")[column], justify="right")
    for label, *sizes in memory_rows(found.predicted, found.measured, device):
        table.add_row(label, *("" if (size := sizes[c - 1]) is None else units.size(size) for c in shown))
    return table


def result(record: RunRecord, next_commands: Sequence[str]) -> Group:
    """The end of a run that succeeded."""
    parts: list[RenderableType] = [
        Text(f"{record.name} is done.", style="bold green"),
        LabelledLines([*_results(record)]),
    ]
    if record.result and record.result.memory and (record.result.memory.measured or record.result.memory.predicted):
        parts += ["", memory(record.result.memory, record.device)]
    if len(record.attempts) > 1:
        parts += ["", attempts(record.attempts)]
    return Group(
        *parts,
        "",
        Text("Next:", style="dim"),
        *(Text(f"  {c}", no_wrap=True, overflow="ignore") for c in next_commands),
    )


def _results(record: RunRecord) -> Iterator[tuple[str, str]]:
    termination = record.result
    if termination and termination.adapter:
        yield "Adapter", termination.adapter.uri
        yield "Manifest", f"{termination.adapter.manifest_uri} (sha256 {termination.adapter.manifest_sha256[:12]}…)"
    for task in termination.tasks if termination else ():
        yield task.name, figures.task_result(task.to_json_dict())
    for run in termination.tracking if termination else ():
        yield run.type.value, run.url + (f" (without the last steps: {run.message})" if run.message else "")
    progress = termination.progress if termination else None
    if progress:
        yield "Steps", f"{progress.step} of {progress.total_steps}, {progress.epoch} epochs"
        if progress.eval_loss:
            before = f"{record.first_eval_loss} → " if record.first_eval_loss else ""
            published = progress.best_eval_loss or progress.eval_loss
            last = f" (last {progress.eval_loss})" if published != progress.eval_loss else ""
            yield "Eval loss", f"{before}{published}{last}"
        elif progress.loss:
            yield "Training loss", f"{progress.loss} (no evaluation rows)"
    if (
        termination and termination.message and not record.first_eval_loss
    ):  # too short a run to be asked; its termination message says more
        yield "In its words", termination.message
    ended = [(a, (a.end_time - a.start_time).total_seconds()) for a in record.attempts if a.end_time]
    wall = sum(seconds for _, seconds in ended)
    ranks = sum(seconds * a.world_size for a, seconds in ended) / 3600
    kind = "GPU-hours" if record.device == "CUDA" else "CPU-rank-hours"
    yield "Time", f"{units.duration(wall)}, {ranks:.3g} {kind}"
    if record.section_seconds:
        yield "Time by part", ", ".join(f"{part} {units.duration(s)}" for part, s in parts(record, wall).items())
    if record.tokens_trained:
        yield "Tokens trained on", units.number(record.tokens_trained)


def parts(record: RunRecord, attempts_seconds: float) -> dict[str, float]:
    """Return the seconds of Prepare and of each part of all attempts, of which ``Start`` came before any section."""
    sections: dict[str, float] = {}
    for found in record.section_seconds.values():
        for section, seconds in found.items():
            sections[section] = sections.get(section, 0.0) + seconds
    start = max(0.0, attempts_seconds - sum(sections.values()))
    before = {"Prepare": float(record.prepared.seconds)} if record.prepared and record.prepared.seconds else {}
    return {**before, "Start": start, **sections}


def failure(reason: Reason, message: str, tail: Sequence[str], log: Path) -> Group:
    """Print why it ended, in the trainer's own words; without them, with the end of its log."""
    parts: list[RenderableType] = [Text(f"Failed: {reason}", style="bold red"), Paragraph(message)]
    if tail:
        parts += [
            Text("The last lines of the log:", style="dim"),
            *(Text(f"  {line}", no_wrap=True, overflow="ignore") for line in tail),
        ]
    return Group(*parts, Text(f"Log: {log}", no_wrap=True, overflow="ignore"))
