"""Print the result of 'qlora plan'. No decisions, no I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from qlora_api.spec import ComputeType
from qlora_cli.local import run_view
from qlora_cli.text import units
from qlora_cli.text.paragraphs import LabelledLines, Paragraph
from qlora_memory import NoFit, Plan, does_not_fit, planned_coverage, skipped_bytes
from qlora_memory.gpus import GIB

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from qlora_api.spec import QLoRAJobSpec
    from qlora_cli.memory_plan.plan_job import PlanResult, Variation
    from qlora_memory import Cost, ModelShape, Span

BAR = 36
"""Characters of a bar as long as the GPU's memory."""
_EIGHTHS = " ▏▎▍▌▋▊▉"
_HEADS = {"gpu": "GPU", "rank": "lora.rank", "maxLength": "dataset.maxLength"}


def show(answered: PlanResult) -> Group:
    """The whole answer."""
    outcome, chosen = answered.outcome, _chosen(answered)
    parts: list[RenderableType] = [LabelledLines(facts_of(answered)), "", memory(chosen)]
    if chosen.notes:
        parts += ["", *(Text(f"Note: {note}.", style="dim") for note in chosen.notes)]
    if isinstance(outcome, NoFit):
        parts += ["", Text("Does not fit.", style="bold red"), Paragraph(why_not(answered))]
    for kind in _HEADS:
        rows = [v for v in answered.variations if v.kind == kind]
        if rows:
            parts += ["", what_if(kind, rows)]
    return Group(*parts)


def _chosen(answered: PlanResult) -> Plan:
    """Return the plan; of what does not fit, the one that needs least."""
    return answered.outcome if isinstance(answered.outcome, Plan) else answered.outcome.smallest


def why_not(answered: PlanResult) -> str:
    """Return why it does not fit and what would; empty where it fits."""
    outcome = answered.outcome
    return str(does_not_fit(answered.request, outcome)) if isinstance(outcome, NoFit) else ""


def facts_of(answered: PlanResult) -> list[tuple[str, str]]:
    """Return all but the memory's components, as labels and values."""
    chosen = _chosen(answered)
    request, shape = answered.request, answered.request.shape
    gpu, count = request.gpu, request.world_size
    recompute = "activations recomputed" if chosen.gradient_checkpointing else "activations kept"
    covered = planned_coverage(shape, request.spec.lora, request.spec.quantization)
    rows = [
        ("Job", answered.job),
        ("Model", f"{shape.model_type}, {units.large_number(shape.parameters)} weights ({answered.place})"),
        ("GPU", f"{count} × {gpu.name}, {units.size(gpu.memory_bytes)} each"),
        ("Quantized", covered.held),
        *_skipped(request.spec, shape),
        ("Adapted", covered.adapted),
        ("Computes in", _compute_type(request.spec, chosen)),
        ("Batch", run_view.batch_equation(chosen.batch)),
        ("Sequences", f"up to {chosen.row} tokens, {recompute}"),
        ("Memory", _headroom(chosen)),
    ]
    speed = chosen.seconds_per_token
    most, expected, least = 1 / speed.low, 1 / speed.expected, 1 / speed.high
    rows.append(("Speed", f"{units.number(round(expected))} tokens/s per GPU ({_range(least, most)})"))
    if answered.cost is not None:
        rows.append(("Time", _time(answered.cost, answered.tokens or 0)))
        if answered.cost.money is not None:
            money = answered.cost.money
            rows.append(("Cost", f"{money.expected:.2f} ({money.low:.2f} to {money.high:.2f})"))
    elif answered.tokens is None:
        rows.append(
            ("Time", f"{_per_million(chosen, count)} for a million tokens; --tokens says how many an epoch has")
        )
    return rows


def _skipped(spec: QLoRAJobSpec, shape: ModelShape) -> list[tuple[str, str]]:
    """Return which layers the job leaves in 16 bits, and what they cost."""
    if not spec.quantization.skip_modules:
        return []
    count, added = skipped_bytes(shape, spec.quantization)
    layers = f"{count} layer{'s' if count > 1 else ''}"
    return [("In 16 bits", f"{layers} by skipModules, {units.size(added)} more than quantized")]


def _compute_type(spec: QLoRAJobSpec, chosen: Plan) -> str:
    scaled = " with dynamic loss scaling" if chosen.compute_type is ComputeType.FLOAT16 else ""
    auto = f" (Auto on {chosen.gpu.name})" if spec.quantization.compute_type is ComputeType.AUTO else ""
    return f"{chosen.compute_type}{scaled}{auto}"


def _headroom(chosen: Plan) -> str:
    needed, left = chosen.memory.needed_bytes, chosen.headroom
    share = needed / chosen.gpu.memory_bytes
    rest = f"{units.size(left)} left" if left >= 0 else f"{units.size(-left)} missing"
    return f"{units.size(needed)} of {units.size(chosen.gpu.memory_bytes)} ({share:.0%}), {rest}"


def _range(low: float, high: float) -> str:
    return f"{units.number(round(low))} to {units.number(round(high))}"


def _time(found: Cost, tokens: int) -> str:
    hours = found.hours
    span = f"{_hours(hours.low)} to {_hours(hours.high)}"
    return (
        f"{_hours(hours.expected)} ({span}) for {units.number(tokens)} tokens, {found.gpu_hours.expected:.3g} GPU-hours"
    )


def _hours(hours: float) -> str:
    return units.duration(hours * 3600)


def _per_million(chosen: Plan, count: int) -> str:
    return units.duration(1e6 * chosen.seconds_per_token.expected / count)


def memory(chosen: Plan) -> Table:
    """Components at the highest moment, the largest first, with bars as long as their share of the GPU."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("Memory of one GPU")
    table.add_column("Predicted", justify="right")
    table.add_column(f"of {chosen.gpu.memory_bytes / GIB:.1f} GiB")
    total = chosen.gpu.memory_bytes
    for component, size in sorted(chosen.memory.components.items(), key=lambda item: -item[1]):
        table.add_row(units.spaced(component), units.size(size), bar(size / total))
    needed = chosen.memory.needed_bytes
    style = "bold" if chosen.fits else "bold red"
    table.add_row(Text("all", style=style), Text(units.size(needed), style=style), bar(needed / total))
    return table


def bar(share: float) -> str:
    """Return a bar in eighths of a character; what does not fit is cut with an arrow."""
    eighths = round(share * BAR * 8)
    full, rest = divmod(eighths, 8)
    if full >= BAR:
        return "█" * BAR + ("▶" if share > 1 else "")
    return ("█" * full + (_EIGHTHS[rest] if rest else "")) or "▏"


def what_if(kind: str, rows: Sequence[Variation]) -> Table:
    """Return the plans with one setting varied, the rest as in the job."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(f"If {_HEADS[kind]} were")
    for head in ("Needs", "Micro-batch", "Recomputes", "Tokens/s per GPU", "Hours", "Cost"):
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(*_cells(row), style="bold" if row.chosen else None)
    return table


def _cells(row: Variation) -> list[str]:
    outcome = row.outcome
    if isinstance(outcome, NoFit):
        return [row.value, f"{units.size(outcome.smallest.memory.needed_bytes)}, too much", "", "", "", "", ""]
    again = "yes" if outcome.gradient_checkpointing else "no"
    speed = units.number(round(1 / outcome.seconds_per_token.expected))
    hours, money = _spans(row.cost)
    return [
        row.value,
        units.size(outcome.memory.needed_bytes),
        str(outcome.batch.micro_batch_size),
        again,
        speed,
        f"{hours.expected:.3g}" if hours else "",
        f"{money.expected:.2f}" if money else "",
    ]


def _spans(found: Cost | None) -> tuple[Span | None, Span | None]:
    return (found.hours, found.money) if found else (None, None)
