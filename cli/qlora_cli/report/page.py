"""The page of a report. HTML with its style inside, no script, nothing fetched."""

from __future__ import annotations

import re
from html import escape
from statistics import median
from typing import TYPE_CHECKING

from qlora_api.status import MemoryComponent, Reason
from qlora_cli.report.charts import Curve, Mark, columns, lines, shares, smoothed
from qlora_cli.report.html import document, section, table
from qlora_cli.text import kubernetes_yaml, units

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import Any

    from qlora_api.contract import PrepareReceipt
    from qlora_api.status import Attempt
    from qlora_cli.report.answers import AnswerLine
    from qlora_cli.report.facts import Facts
    from qlora_cli.report.training_history import MergedHistory, StepFacts

SMOOTHED_FROM = 30
"""Steps from which the loss is smoothed over a twentieth of them."""
MOST_SAMPLES = 5
MOST_ANSWERS = 8
BATCH = '<p class="keys">Batch: micro-batch × accumulation × ranks</p>'
MACHINE = (("driver", "Driver"), ("cuda", "CUDA"), ("system", "System"), ("python", "Python"))
"""Entries of an environment that are not packages, with their labels."""
HELD = "&nbsp;"
"""A space at which no line ends."""
MARKED = re.compile("⟦(.*?)⟧", re.DOTALL)


def page(facts: Facts) -> str:
    """Return the whole page."""
    parts = [
        section("Curves", "".join(_curves(facts.history)), "charts"),
        section("Time", _time_of(facts)),
        section("Memory of a rank", _memory(facts.predicted, facts.measured)),
        section("Attempts", _attempts(facts)),
        section("Data", _data(facts.receipt) if facts.receipt else ""),
        section("Samples", _samples(facts.receipt.samples) if facts.receipt else ""),
        section("Tasks", _tasks(facts.history.tasks)),
        section("Base and adapter", _answers(facts)),
        section("What was published", _published(facts)),
        section("Configuration", f'<pre class="config">{escape(kubernetes_yaml.dump(facts.spec))}</pre>'),
        section("Environment", _environment(facts)),
    ]
    title = f"{facts.name}: report"
    return document(title, _head(facts), parts)


# -------------------------------------------------------------------------------------------------------------- pieces


def _pairs(rows: Iterable[tuple[str, str]]) -> str:
    """Names and values; values are text."""
    cells = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows)
    return f"<dl>{cells}</dl>" if cells else ""


# ---------------------------------------------------------------------------------------------------------------- head


def _head(facts: Facts) -> str:
    kind, text = _end(facts)
    source = str(facts.spec.get("model", {}).get("source", ""))
    figures = "".join(
        f"<div><span>{escape(name)}</span><b>{escape(value)}</b><i>{escape(more)}</i></div>"
        for name, value, more in _figures(facts)
    )
    said = facts.termination_message.message if facts.termination_message and kind != "good" else ""
    return (
        f'<header><h1>{escape(facts.name)} <span class="badge {kind}">{escape(text)}</span></h1>'
        f"<p>{escape(source)} · run {escape(facts.uid[:8])} · {facts.created:%Y-%m-%d %H:%M} UTC</p>"
        + (f"<p class=why>{escape(said)}</p>" if said else "")
        + f'<div class="figures">{figures}</div></header>'
    )


def _end(facts: Facts) -> tuple[str, str]:
    """Return how the run stands: (class of the badge, text)."""
    if facts.published:
        return "good", "Succeeded"
    reason = facts.attempts[-1].reason if facts.attempts else None
    if reason is None:
        return "", "Runs" if facts.attempts else "Not started"
    if reason in (Reason.PREEMPTED, Reason.SUSPENDED, Reason.PAUSED, Reason.NODE_LOST):
        return "waits", f"Stopped: {reason}"
    return "bad", f"Failed: {reason}"


def _figures(facts: Facts) -> Iterator[tuple[str, str, str]]:
    history = facts.history
    evaluations = list(history.evaluations.values())
    losses = [s.loss for s in history.steps.values() if s.loss is not None]
    if evaluations:
        # The first one is of the base where it was taken before the first step.
        before = evaluations[0] if 0 in history.evaluations and len(evaluations) > 1 else None
        more = f"base {before:.4f}, {1 - min(evaluations) / before:.1%} lower" if before else "best of the evaluations"
        yield "Eval loss", f"{min(evaluations):.4f}", more
    if losses:
        yield "Training loss", f"{losses[-1]:.4f}", f"first step {losses[0]:.4f}"
    if history.steps:
        yield "Steps", units.number(max(history.steps)), f"{units.number(facts.tokens)} tokens" if facts.tokens else ""
    speeds = [s.tokens_per_second for s in history.steps.values() if s.tokens_per_second]
    if speeds:
        yield "Tokens per second", units.number(round(median(speeds))), "median, all ranks"
    seconds, ranks = _held(facts.attempts)
    if seconds:
        unit = "CPU-rank-hours" if facts.device == "CPU" else "GPU-hours"
        yield "Time", units.duration(seconds), f"{ranks / 3600:.3g} {unit}"
    if peak := facts.measured.get(MemoryComponent.PEAK.value):
        planned = facts.predicted.get(MemoryComponent.PEAK.value)
        yield "Peak memory", units.size(peak), f"predicted {units.size(planned)}" if planned else "of a rank"


def _held(attempts: Sequence[Attempt]) -> tuple[float, float]:
    """Seconds of all attempts, and times their ranks."""
    ended = [(a, (a.end_time - a.start_time).total_seconds()) for a in attempts if a.end_time]
    return sum(s for _, s in ended), sum(s * a.world_size for a, s in ended)


# -------------------------------------------------------------------------------------------------------------- curves


def _curves(history: MergedHistory) -> Iterator[str]:
    steps = list(history.steps.values())
    marks = [Mark(a.from_step, f"attempt {a.number}") for a in history.attempts.values() if a.from_step]
    raw = _points(steps, "loss")
    window = max(3, len(raw) // 20)
    training = (
        [Curve("training", smoothed(raw, window)), Curve("each step", raw, faint=True)]
        if len(raw) >= SMOOTHED_FROM
        else [Curve("training", raw), Curve("", ())]
    )
    evaluation = Curve("evaluation", [(float(x), y) for x, y in sorted(history.evaluations.items())], dots=True)
    # The evaluation takes the second colour in every report, the faint raw curve the first's.
    yield lines("Loss, nats a token", [training[0], evaluation, training[1]], y_text=_short, marks=marks)
    yield lines(
        "Learning rate", [Curve("rate", _points(steps, "learning_rate"))], y_text=_power, from_zero=True, marks=marks
    )
    yield lines(
        "Gradient norm before clipping",
        [Curve("norm", _points(steps, "gradient_norm"))],
        y_text=_short,
        from_zero=True,
        marks=marks,
    )
    yield lines(
        "Tokens per second, all ranks",
        [Curve("speed", _points(steps, "tokens_per_second"))],
        y_text=units.number,
        from_zero=True,
        marks=marks,
    )


def _points(steps: Iterable[StepFacts], name: str) -> list[tuple[float, float]]:
    return [(float(s.step), float(getattr(s, name))) for s in steps if getattr(s, name) is not None]


def _short(value: float) -> str:
    return f"{value:.4g}"


def _power(value: float) -> str:
    return f"{value:.1e}".replace("e-0", "e-") if value else "0"


def _time_of(facts: Facts) -> str:
    """Return where rank 0's time went, by section."""
    found = sorted(facts.history.section_seconds.items(), key=lambda item: -item[1])
    bar = shares(
        "Rank 0, by section, up to the last checkpoint", [(n, s, units.duration(s)) for n, s in found if s >= 0.05]
    )
    steps = [s for s in facts.history.steps.values() if s.seconds]
    if not steps:
        return bar
    seconds = [s.seconds for s in steps if s.seconds]
    waits = [s.data_seconds for s in steps if s.data_seconds is not None]
    rows = [("A step", f"{units.duration(median(seconds))} in the median, {units.duration(max(seconds))} at most")]
    if waits:
        rows.append(("Waiting for rows", f"{sum(waits) / sum(seconds):.2%} of the steps' time"))
    return bar + _pairs(rows)


# -------------------------------------------------------------------------------------------------------------- tables


def _memory(predicted: dict[str, int], measured: dict[str, int]) -> str:
    """Return the chart of bytes by component, with one scale; the peak is last, without a bar, as it exceeds them."""
    peak = MemoryComponent.PEAK.value
    names = sorted(predicted | measured, key=lambda name: name == peak)
    if not names:
        return ""
    most = max((size for by in (predicted, measured) for name, size in by.items() if name != peak), default=1)
    head = ["Component", *(["Predicted"] if predicted else []), "Measured", ""]
    rows = []
    for name in names:
        row = [escape(units.spaced(name))]
        if predicted:
            row.append(units.size(predicted[name]) if name in predicted else "")
        row.append(units.size(measured[name]) if name in measured else "")
        bars = "".join(
            f'<span class="bar f{index}" style="width:{max(by[name] / most * 100, 0.4):.1f}%"></span>'
            for index, by in enumerate((predicted, measured))
            if name in by and name != peak
        )
        rows.append([*row, f'<div class="bars">{bars}</div>'])
    keys = (
        '<p class="keys"><span class="key k0">predicted</span><span class="key k1">measured</span></p>'
        if predicted
        else ""
    )
    return keys + table(head, rows, frozenset({1, 2} if predicted else {1}))


def _attempts(facts: Facts) -> str:
    if facts.attempts:
        head = ["Attempt", "Ended", "Code", "Steps", "Batch", "Computes in", "Took", "Node", "Message"]
        return table(head, [_attempt(a) for a in facts.attempts], frozenset({0, 2})) + BATCH
    known = facts.history.attempts.values()
    rows = [
        [
            str(a.number),
            str(a.from_step),
            f"{a.micro_batch_size} × {a.accumulation} × {a.world_size}",
            escape(a.compute_type or ""),
            escape(a.device or ""),
        ]
        for a in known
    ]
    return table(["Attempt", "From step", "Batch", "Computes in", "Device"], rows) + BATCH if rows else ""


def _attempt(attempt: Attempt) -> list[str]:
    a = attempt
    took = units.duration((a.end_time - a.start_time).total_seconds()) if a.end_time else ""
    steps = f"{a.first_step or 0} → {a.last_step}" if a.last_step is not None else ""
    code = "" if a.exit_code is None else str(a.exit_code)
    batch = f"{a.micro_batch_size} × {a.gradient_accumulation_steps} × {a.world_size}"
    whole = [text.replace(" ", HELD) for text in (steps, batch, str(a.compute_type or ""), took)]
    return [str(a.number), str(a.reason or "running"), code, *whole, escape(a.node), escape(a.message)]


def _data(found: PrepareReceipt) -> str:
    share = found.train_target_tokens / found.train_tokens if found.train_tokens else 0
    lost = [("cut at maxLength", found.truncated), ("too long, left out", found.dropped)]
    lost.append(("no token counts, left out", found.fully_masked))
    rows = [
        ("Training rows", f"{units.number(found.train_rows)}, in {units.number(found.train_sequences)} sequences"),
        ("Tokens", f"{units.number(found.train_tokens)}, of which {share:.0%} count"),
        ("Longest row", f"{units.number(found.longest)} tokens"),
        ("Slots filled", f"{found.packing_efficiency:.1%}"),
        ("Rows cut or lost", ", ".join(f"{units.number(n)} {what}" for what, n in lost if n) or "none"),
        ("Rows that repeat another", units.number(found.duplicates)),
    ]
    if found.eval_rows:
        known = f"; {units.number(found.eval_in_train)} are training rows too" if found.eval_in_train else ""
        rows.append(
            ("Evaluation", f"{units.number(found.eval_rows)} rows, {units.number(found.eval_tokens)} tokens{known}")
        )
    rows += [("Note", note) for note in found.notes]
    by_length = [(f"≤ {units.number(most)}", float(rows)) for most, rows in sorted(found.lengths.items())]
    drawn = columns("Rows by tokens", by_length, x_title="tokens of a row", y_text=units.number)
    return f'<div class="facts">{_pairs([*rows, ("Hash", found.data_hash)])}{drawn}</div>'


def _samples(samples: Sequence[str]) -> str:
    if not samples:
        return ""
    shown = "".join(f"<pre class=sample>{MARKED.sub(_mark, escape(sample))}</pre>" for sample in samples[:MOST_SAMPLES])
    return f"<p>Rows as the model reads them. Loss is taken over <mark>these</mark> tokens.</p>{shown}"


def _tasks(results: Sequence[Mapping[str, Any]]) -> str:
    """Return what base and adapter reached in the tasks of spec.evaluate."""
    names = ("name", "metric", "base", "adapter", "standardError", "examples")
    rows = [[escape(str(result.get(name, ""))) for name in names] for result in results]
    head = ["Task", "Metric", "Base", "Adapter", "Standard error", "Examples"]
    return table(head, rows, frozenset({2, 3, 4, 5})) if rows else ""


def _answers(facts: Facts) -> str:
    """Return prompts with the answers of base and adapter: in training, and since."""
    parts = []
    if facts.trainer_answers:
        parts.append("<p>To the prompts of the manifest, before the first step and after the last:</p>")
        parts.append(_answers_table(facts.trainer_answers))
    if facts.answers:
        parts.append("<p>To <code>qlora generate</code>:</p>")
        parts.append(_answers_table(facts.answers[-MOST_ANSWERS:]))
    if not parts and facts.published and facts.attempts:
        ask = f"<code>qlora generate --run {escape(facts.name)} --prompt …</code>"
        parts.append(f"<p>Not asked yet: {ask} keeps their answers for this page.</p>")
    return "".join(parts)


def _answers_table(answers: Sequence[AnswerLine]) -> str:
    names = ["base", "adapter", *(["merged"] if any(answer.merged for answer in answers) else [])]
    rows = [
        [f"<div class=said>{escape((text or '').strip() or '(nothing)')}</div>" for text in texts]
        for texts in ([a.prompt, *(getattr(a, name) for name in names)] for a in answers)
    ]
    return table(["Prompt", *(name.capitalize() for name in names)], rows, kind="answers")


def _mark(found: re.Match[str]) -> str:
    return f"<mark>{found[1]}</mark>"


def _published(facts: Facts) -> str:
    adapter = facts.termination_message.adapter if facts.termination_message else None
    rows = []
    if adapter:
        rows = [("Adapter", adapter.uri), ("Manifest", adapter.manifest_uri), ("SHA-256", adapter.manifest_sha256)]
    manifest = facts.manifest
    if manifest is None:
        return _pairs(rows)
    step = manifest.get("metrics", {}).get("step")
    if step is not None:
        rows.append(("Weights of step", str(step)))
    files = [
        [escape(f["path"]), units.size(f["size"]), f"<code>{escape(f['sha256'][:16])}…</code>"]
        for f in manifest.get("files", [])
    ]
    return _pairs(rows) + table(["File", "Size", "SHA-256"], files, frozenset({1}))


def _environment(facts: Facts) -> str:
    attempts = list(facts.history.attempts.values())
    known = next((a.environment for a in reversed(attempts) if a.environment), None)
    found: dict[str, Any] = dict(known or (facts.manifest or {}).get("packages", {}))
    memory = str(found.pop("gpuMemory", ""))
    device = f"{facts.device}, {units.size(int(memory))}" if memory.isdecimal() else facts.device
    revision = (facts.manifest or {}).get("base", {}).get("revision")
    machine = [("Device", device), *((title, found.pop(name, None)) for name, title in MACHINE)]
    rows = [(title, str(value)) for title, value in (*machine, ("Base revision", revision)) if value]
    return f'<div class="facts">{_pairs(rows)}{_pairs((name, str(found[name])) for name in sorted(found))}</div>'
