"""``qlora show``: all that is known of one job or local run, on a page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from qlora_cli.jobs.job_list import stage_in_words
from qlora_cli.text import figures, units
from qlora_cli.text.memory_rows import is_of_process, memory_rows
from qlora_cli.text.output import STATE_STYLES, Cell, aligned
from qlora_cli.text.paragraphs import LEAST_ROOM, LabelledLines, folded, held

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from datetime import datetime
    from typing import Any

    from qlora_cli.jobs.job_view import AttemptView, JobView
    from qlora_cli.kube.api_client import Object

BAR = 30
LABEL = 14


def page(job: JobView, body: Object, now: datetime, width: int) -> list[Text]:
    """The page's lines: what it is, where it stands, its attempts, its memory."""
    spec = body.get("spec") or {}
    lines = [
        _title(job),
        *LabelledLines(
            [*_standing(job, now), *_asked(spec), *_ranks(job, body), *_found(body), *_result(job)], LABEL
        ).lines(width),
    ]
    if job.attempts:
        lines += [Text(), *_attempts(job, width)]
    status = body.get("status") or {}
    memory = status.get("memory") or (body.get("result") or {}).get("memory") or {}
    if any(memory.values()):
        lines += [Text(), *_memory(memory, body.get("device"), width)]
    return lines


def _title(job: JobView) -> Text:
    where = f"{job.namespace}/{job.name}" if job.namespace else job.place
    state = "Deleting" if job.deleting else job.state
    reason = f" ({job.reason})" if job.reason and job.reason != job.state else ""
    return Text.assemble((where, "bold"), "  ", (state, STATE_STYLES.get(job.state, "")), reason)


def _standing(job: JobView, now: datetime) -> Iterator[tuple[str, str]]:
    yield "Message", job.message
    yield "Stage", stage_in_words(job, now)
    if job.step is not None:
        bar = figures.bar(job.step, job.total_steps, BAR)
        share = f"  {job.step / job.total_steps:.0%}" if job.total_steps else ""
        yield "Step", f"{bar}  {figures.steps(job.step, job.total_steps)}{share}".strip()
    told = (
        ("loss", figures.loss(job.loss)),
        ("eval loss", figures.loss(job.eval_loss)),
        ("best", figures.loss(job.best_eval_loss)),
        ("epoch", job.epoch if job.step else ""),
        ("tokens/s", figures.rate(job.tokens_per_second)),
        ("left", figures.short_time(job.eta_seconds) if job.state == "Running" else ""),
    )
    yield "Figures", "   ".join(held(f"{label} {value}") for label, value in told if value)
    when = f"created {figures.age(job.created, now)} ago" if job.created else ""
    if job.ended and job.started:
        took = (job.ended - job.started).total_seconds()
        when = f"{when}, took {figures.short_time(took)}, ended {figures.age(job.ended, now)} ago"
    yield "Time", when.lstrip(", ")


def _asked(spec: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Return what the job asks for, in the words of its manifest."""
    dataset, training = spec.get("dataset") or {}, spec.get("training") or {}
    lora, quantization = spec.get("lora") or {}, spec.get("quantization") or {}
    yield "Model", str((spec.get("model") or {}).get("source", ""))
    rows, form = (dataset.get("train") or {}).get("source", ""), dataset.get("format")
    yield "Data", f"{rows} ({form})" if form else str(rows)
    length = f"{training['maxSteps']} steps" if training.get("maxSteps") else f"{training.get('epochs')} epochs"
    yield (
        "Training",
        f"{length}, global batch {training.get('globalBatchSize')}, learning rate {training.get('learningRate')}",
    )
    yield "LoRA", f"rank {lora.get('rank')}, alpha {lora.get('alpha')}; base in {quantization.get('type')}"
    yield "Output", str((spec.get("output") or {}).get("destination", ""))


def _ranks(job: JobView, body: Object) -> Iterator[tuple[str, str]]:
    if "device" in body:  # a local run
        yield "Ranks", f"{job.ranks}, on {'GPUs' if body['device'] == 'CUDA' else 'CPUs'} of this machine"
        return
    spec = body.get("spec") or {}
    parallelism, scheduling = spec.get("parallelism") or {}, spec.get("scheduling") or {}
    workers, gpus = parallelism.get("workers") or 1, parallelism.get("gpusPerWorker") or 1
    queue = f", queue {scheduling['queue']}" if scheduling.get("queue") else ""
    least = f" (at least {parallelism['minWorkers']})" if parallelism.get("minWorkers") else ""
    status = body.get("status") or {}
    predicted = (status.get("memory") or {}).get("predicted") or (status.get("prepared") or {}).get("memory") or {}
    each = f"{figures.plural(gpus, 'rank')} on CPUs" if is_of_process(predicted) else figures.plural(gpus, "GPU")
    pods = f"{figures.plural(workers, 'worker')}{least} of {each}"
    yield "Ranks", f"{workers * gpus}, in {pods}, ZeRO stage {parallelism.get('zeroStage')}{queue}"


def _found(body: Object) -> Iterator[tuple[str, str]]:
    """Return what Prepare found in the rows: the operator's words, or a local run's receipt."""
    found = (body.get("status") or {}).get("prepared") or body.get("receipt") or {}
    if not found:
        return
    lost = [
        (found.get(key) or 0, text)
        for key, text in (("truncated", "truncated"), ("dropped", "dropped"), ("fullyMasked", "without a label"))
    ]
    losses = "".join(f", {units.number(count)} {text}" for count, text in lost if count)
    rows, tokens = units.number(found.get("trainRows") or 0), units.number(found.get("trainTokens") or 0)
    held_out = f", {units.number(found['evalRows'])} for evaluation" if found.get("evalRows") else ""
    yield "Rows", f"{rows} rows, {tokens} tokens{held_out}{losses}"
    if revision := found.get("modelRevision"):
        yield "Revision", str(revision)


def _result(job: JobView) -> Iterator[tuple[str, str]]:
    if job.adapter:
        yield "Adapter", job.adapter.get("uri", "")
        yield "Manifest", job.adapter.get("manifestUri", "")
        yield "SHA-256", job.adapter.get("manifestSha256", "")
    for task in job.tasks:
        yield f"{task.get('name')}", figures.task_result(task)
    for run in job.tracking:
        problem = f" (without the newest steps: {run['message']})" if run.get("message") else ""
        yield run.get("type", ""), run.get("url", "") + problem
    if job.rank_hours is not None:
        hours = f"{job.rank_hours:.3g}"
        attempts = f"{figures.plural(len(job.attempts), 'attempt')}, {figures.plural(job.restarts, 'restart')}"
        yield "Used", f"{hours} rank-hour{'' if hours == '1' else 's'} in {attempts}"


def _attempts(job: JobView, width: int) -> list[Text]:
    """Return a line for each attempt, and its message below it; so are the nodes, where they have no room beside it."""
    head = ["ATTEMPT", "ENDED", "CODE", "STEPS", "MICRO × ACC × RANKS", "TOOK", "NODE"]
    rows = [_attempt(a) for a in job.attempts]
    below: list[list[str]] = [[a.message] if a.message and a.message != job.message else [] for a in job.attempts]
    if max(len(line) for line in aligned(head, rows)) > width:
        below = [[f"on {a.node}", *texts] if a.node else texts for a, texts in zip(job.attempts, below, strict=True)]
        head, rows = head[:-1], [row[:-1] for row in rows]
    room = max(width - len(head[0]) - 2, LEAST_ROOM)
    lines: list[Sequence[str | Cell]] = []
    for row, texts in zip(rows, below, strict=True):
        lines += [row, *(["", part] for text in texts for part in folded(text, room))]
    return aligned(head, lines)


def _attempt(a: AttemptView) -> list[str | Cell]:
    took = figures.short_time((a.ended - a.started).total_seconds()) if a.started and a.ended else ""
    steps = f"{a.first_step or 0} → {a.last_step}" if a.last_step is not None else ""
    ended = a.reason or ("running" if a.ended is None else "")
    return [
        str(a.number),
        Cell(ended, "" if a.reason in ("Completed", "") else "yellow"),
        "" if a.exit_code is None else str(a.exit_code),
        steps,
        a.batch,
        took,
        a.node,
    ]


def _memory(memory: Mapping[str, Any], device: str | None, width: int) -> list[Text]:
    """Bytes of one rank by component, the peak last."""
    head = ("MEMORY PER RANK", "PREDICTED", "MEASURED")
    found = memory_rows(memory.get("predicted") or {}, memory.get("measured") or {}, device)
    rows = [[label, *("" if size is None else units.size(size) for size in sizes)] for label, *sizes in found]
    return aligned(head, rows, width, right=("PREDICTED", "MEASURED"))
