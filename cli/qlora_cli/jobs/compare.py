"""``qlora compare``: what differs between the settings of jobs and runs, and how they ended."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.text import Text

from qlora_cli.text import figures
from qlora_cli.text.output import Cell, aligned, state_cell

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from qlora_cli.jobs.job_view import JobView
    from qlora_cli.kube.api_client import Object

_NO_MATTER = ("policy", "scheduling", "suspend")
"""Groups that change nothing in what is learned; shown with --all."""
LONGEST_VALUE = 48
"""Longest value, in characters, that is shown whole if it has several words. Paths are always shown whole."""


@dataclass(frozen=True)
class ComparedJob:
    """One job or run."""

    job: JobView
    spec: Mapping[str, Any]


def differing(columns: Sequence[ComparedJob], *, every: bool = False) -> list[tuple[str, list[object]]]:
    """Fields (below ``spec``) whose values are not all the same, each with its values; None: not set."""
    flats = [_flat({k: v for k, v in column.spec.items() if every or k not in _NO_MATTER}) for column in columns]
    paths = sorted(set().union(*flats), key=lambda path: _place(path, columns[0].spec))
    rows = [(path, [flat.get(path) for flat in flats]) for path in paths]
    return [(path, values) for path, values in rows if any(value != values[0] for value in values[1:])]


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    if isinstance(value, dict):
        flat: dict[str, object] = {}
        for name, inner in value.items():
            flat |= _flat(inner, f"{prefix}.{name}" if prefix else name)
        return flat
    return {prefix: value}


def _place(path: str, spec: Mapping[str, Any]) -> tuple[int, str]:
    """In the order of the manifest's groups."""
    groups = list(spec)
    group = path.partition(".")[0]
    return groups.index(group) if group in groups else len(groups), path


def figures_of(column: ComparedJob) -> dict[str, object]:
    """Return how a job ended, as plain values; None: not known."""
    job = column.job
    took = (job.ended - job.started).total_seconds() if job.ended and job.started else None
    return {
        "state": job.state,
        "reason": job.reason,
        "step": job.step,
        "totalSteps": job.total_steps,
        "loss": job.loss or None,
        "evalLoss": job.eval_loss or None,
        "bestEvalLoss": job.best_eval_loss or None,
        "tokensPerSecond": job.tokens_per_second or None,
        "peakBytes": job.peak_bytes,
        "seconds": took,
        "rankHours": job.rank_hours,
        "restarts": job.restarts,
        "adapter": job.adapter.get("uri"),
    }


def best(columns: Sequence[ComparedJob]) -> str:
    """Return the job with an adapter and the lowest eval loss; empty where there is none."""
    known = [
        (float(c.job.best_eval_loss or c.job.eval_loss), c.job.place)
        for c in columns
        if c.job.adapter and c.job.eval_loss
    ]
    return min(known)[1] if known else ""


def as_plain(columns: Sequence[ComparedJob], *, every: bool) -> Object:
    """For programs."""
    return {
        "compared": [column.job.place for column in columns],
        "differences": {f"spec.{path}": values for path, values in differing(columns, every=every)},
        "figures": [figures_of(column) for column in columns],
    }


# -------------------------------------------------------------------------------------------------------------- to show


def pages(columns: Sequence[ComparedJob], width: int | None, *, every: bool) -> Iterator[Text]:
    """Yield the settings that differ, then figures; the best of a row in bold, in tables that fit."""
    names = [column.job.place for column in columns]
    rows = [[f"spec.{path}", *(_shown(value) for value in values)] for path, values in differing(columns, every=every)]
    if rows:
        yield from _tables(["SETTING", *names], rows, width)
    else:
        yield Text("No setting differs." if every else "No setting differs that changes what is learned.", style="dim")
    yield Text()
    yield from _tables(["FIGURE", *names], [*_figure_rows(columns)], width)


def _tables(head: Sequence[str], rows: Sequence[Sequence[str | Cell]], width: int | None) -> Iterator[Text]:
    """Yield a table as several, one below the other, each with as many columns as a screen has room for."""
    widths = [
        max(len(c.text if isinstance(c, Cell) else c) for c in column) for column in zip(head, *rows, strict=True)
    ]
    groups: list[list[int]] = [[]]
    for column in range(1, len(head)):
        taken = [0, *groups[-1], column]
        if width is not None and groups[-1] and sum(widths[i] + 2 for i in taken) - 2 > width:
            groups.append([])
        groups[-1].append(column)
    for number, group in enumerate(groups):
        if number:
            yield Text()
        yield from aligned([head[i] for i in (0, *group)], [[row[i] for i in (0, *group)] for row in rows])


def _shown(value: object) -> str:
    text = "–" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_VALUE or " " not in text else f"{text[: LONGEST_VALUE - 1]}…"


def _figure_rows(columns: Sequence[ComparedJob]) -> Iterator[list[str | Cell]]:
    jobs = [column.job for column in columns]
    yield ["state", *(state_cell(job.state) for job in jobs)]
    yield ["reason", *(job.reason for job in jobs)]
    yield ["step", *(figures.steps(job.step, job.total_steps) for job in jobs)]
    yield from _best("loss", [job.loss for job in jobs], [figures.loss(job.loss) for job in jobs], lowest=True)
    yield from _best("eval loss", [j.eval_loss for j in jobs], [figures.loss(j.eval_loss) for j in jobs], lowest=True)
    best = [job.best_eval_loss for job in jobs]
    yield from _best("best eval loss", best, [figures.loss(value) for value in best], lowest=True)
    speeds = [job.tokens_per_second for job in jobs]
    yield from _best("tokens/s", speeds, [figures.rate(value) for value in speeds], lowest=False)
    peaks = ["" if job.peak_bytes is None else str(job.peak_bytes) for job in jobs]
    yield from _best("peak memory", peaks, [figures.memory(job.peak_bytes) for job in jobs], lowest=True)
    yield [
        "took",
        *(figures.short_time((j.ended - j.started).total_seconds()) if j.ended and j.started else "" for j in jobs),
    ]
    hours = ["" if job.rank_hours is None else f"{job.rank_hours:.3g}" for job in jobs]
    yield from _best("rank-hours", hours, hours, lowest=True)
    yield ["restarts", *(str(job.restarts) for job in jobs)]


def _best(label: str, values: Sequence[str], shown: Sequence[str], *, lowest: bool) -> Iterator[list[str | Cell]]:
    """Yield a row with the best value in bold; none where nothing is known."""
    known = [float(value) for value in values if value]
    if not known:
        return
    best = min(known) if lowest else max(known)
    alone = len(known) > 1 and len(set(known)) > 1
    yield [
        label,
        *(
            Cell(text or "–", "bold green" if alone and value and float(value) == best else "")
            for value, text in zip(values, shown, strict=True)
        ),
    ]
