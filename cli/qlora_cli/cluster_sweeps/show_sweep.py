"""``qlora show`` of a sweep: what it searches, where it stands, and its trials."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from qlora_cli.sweeps import sweep_view
from qlora_cli.text import figures
from qlora_cli.text.output import STATE_STYLES
from qlora_cli.text.paragraphs import LabelledLines

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

    from rich.console import RenderableType

    from qlora_cli.cluster_sweeps.cluster_sweep import ClusterSweep
    from qlora_cli.cluster_sweeps.sweep_reader import SweepTrials
    from qlora_cli.kube.target import Target

BAR = 30
LABEL = 14


def page(sweep: ClusterSweep, found: SweepTrials, now: datetime) -> list[RenderableType]:
    """Return the parts of the page, each to be printed with ``crop=False``."""
    rows = [*_standing(sweep, now), *sweep_view.settings(found.sweep.spec), *_limits(found)]
    parts: list[RenderableType] = [_title(sweep), LabelledLines(rows, LABEL)]
    if found.trials:
        best = next((trial.number for trial in found.trials if trial.name == sweep.best), None)
        parts += ["", sweep_view.trials(found.trials, found.sweep.spec, best)]
    return parts


def _title(sweep: ClusterSweep) -> Text:
    state = "Deleting" if sweep.deleting else sweep.state
    reason = f" ({sweep.reason})" if sweep.reason != sweep.state else ""
    name = f"{sweep.namespace}/{sweep.name}"
    return Text.assemble(("sweep ", "dim"), (name, "bold"), "  ", (state, STATE_STYLES.get(sweep.state, "")), reason)


def _standing(sweep: ClusterSweep, now: datetime) -> Iterator[tuple[str, str]]:
    yield "Message", sweep.message
    ended, total = (sweep.counts.get("succeeded", 0) + sweep.counts.get("failed", 0), sweep.counts.get("total", 0))
    states = ", ".join(
        f"{count} {s}" for s in ("running", "suspended", "succeeded", "failed") if (count := sweep.counts.get(s))
    )
    if total:
        yield (
            "Trials",
            f"{figures.bar(ended, total, BAR)}  {ended} of {total} have ended{f'; {states}' if states else ''}",
        )
    if sweep.best:
        settings = ", ".join(f"{path} {text}" for path, text in sweep.best_parameters.items())
        yield "Best", f"{sweep.best}: {sweep.metric} {sweep.best_figure}, {settings}"
        yield "Adapter", sweep.adapter.get("uri", "")
    share = f" of {sweep.budget}" if sweep.budget else ""
    yield "GPU-hours", f"{figures.rate(sweep.gpu_hours)}{share}"
    when = f"created {figures.age(sweep.created, now)} ago" if sweep.created else ""
    if sweep.ended and sweep.started:
        took = (sweep.ended - sweep.started).total_seconds()
        when = f"{when}, took {figures.short_time(took)}, ended {figures.age(sweep.ended, now)} ago"
    yield "Time", when


def _limits(found: SweepTrials) -> Iterator[tuple[str, str]]:
    spec = found.sweep.spec
    yield "Output", spec.template.spec.output.destination
    yield (
        "Limits",
        f"{figures.plural(spec.parallel_trials, 'trial')} at a time, at most {spec.max_failed_trials} may fail",
    )


def next_commands(sweep: ClusterSweep, program: str, target: Target) -> list[str]:
    """Return the commands to use next with a sweep in its state."""
    flags = target.flags()
    match sweep.state:
        case "Succeeded":
            return [f"{program} report {sweep.name}{flags}", f"{program} download {sweep.best}{flags}"]
        case "Failed":
            return [f"{program} report {sweep.name}{flags}", f"{program} list{flags} -l qlora.dev/sweep={sweep.name}"]
        case "Suspended" if sweep.suspend:
            return [f"{program} resume {sweep.name}{flags}"]
        case _ if sweep.needs_attention:
            return [f"{program} doctor{flags}"]
        case _:
            return [f"{program} watch {sweep.name}{flags}", f"{program} report {sweep.name}{flags}"]
