"""``qlora list``: jobs of a namespace, of the cluster, or local runs, a line each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_cli.jobs.job_view import JobView, local_runs, read_run, view, view_damaged_run, view_run
from qlora_cli.kube.errors import ClusterError
from qlora_cli.kube.names import jobs_path
from qlora_cli.text import figures
from qlora_cli.text.output import Cell, aligned, state_cell

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from pathlib import Path

    from rich.text import Text

    from qlora_cli.kube.api_client import Object
    from qlora_cli.kube.target import Cluster

NUMBERS = ("LOSS", "EVAL", "ETA", "RESTARTS", "MEMORY", "AGE")
SPARE = ("MEMORY", "RESTARTS", "EVAL")
"""Columns that give their room to a message, one after the other."""
NARROW_SPARE = (*SPARE, "ETA", "AGE", "REASON", "LOSS")
"""Columns that are given up where messages stand below their rows."""
MESSAGE = 160
MESSAGE_ROOM = 52
"""Least letters of a longer message beside its row; fewer are often a field and half of its value."""


def jobs_of(cluster: Cluster, *, everywhere: bool, selector: str | None) -> list[Object]:
    """Objects as the API server has them, oldest first."""
    path = jobs_path(None if everywhere else cluster.namespace)
    items, _ = cluster.api.list(path, labelSelector=selector)
    return sorted(items, key=lambda o: (o["metadata"].get("creationTimestamp") or "", o["metadata"]["name"]))


def runs_of(runs_dir: Path) -> list[tuple[Object, JobView]]:
    """Local runs, oldest first, each record with its folder."""
    found = []
    for folder in local_runs(runs_dir):
        try:
            record = read_run(folder)
            shown = view_run(folder, record)
        except ClusterError as error:  # one that is damaged hides none of the others
            record, shown = {}, view_damaged_run(folder, error)
        found.append(({"folder": str(folder), **record}, shown))
    return sorted(found, key=lambda pair: (pair[1].created is not None and pair[1].created.timestamp(), pair[1].name))


def table(
    views: Sequence[JobView], now: datetime, *, everywhere: bool = False, local: bool = False
) -> tuple[list[str], list[list[str | Cell]]]:
    """Return the header and the rows of a list of jobs: the columns of ``kubectl get``, and a message."""
    head = ["NAME", "STATE", "REASON", "STEP", "LOSS", "EVAL", "ETA", "RESTARTS", "MEMORY", "AGE", "MESSAGE"]
    rows = [_row(job, now, local=local) for job in views]
    if everywhere:
        head = ["NAMESPACE", *head]
        rows = [[job.namespace, *row] for job, row in zip(views, rows, strict=True)]
    return head, rows


def lines(head: Sequence[str], rows: Sequence[Sequence[str | Cell]], width: int) -> list[Text]:
    """Return a table for a screen; a message that has no room beside its row stands below it."""
    least = sum(
        max(len(cell.text if isinstance(cell, Cell) else cell) for cell in (name, *column)) + 2
        for name, *column in zip(head[:-1], *(row[:-1] for row in rows), strict=True)
        if name not in SPARE and any(column)
    )
    longest = max(len(cell.text if isinstance(cell, Cell) else cell) for *_, cell in rows)
    if width - least >= min(longest, MESSAGE_ROOM):
        return aligned(head, rows, width, right=NUMBERS, spare=SPARE)
    folded: list[Sequence[str | Cell]] = []
    for *row, message in rows:
        folded.append(row)
        if isinstance(message, Cell):
            folded.append([Cell(f"  {message.text}", message.style)])
    return aligned(head[:-1], folded, width, right=NUMBERS, spare=NARROW_SPARE)


def next_command(views: Sequence[JobView], call: str, flags: str, namespace: str = "") -> str:
    """Return the command to use next: on what needs a hand, what failed last, what runs, else the newest.

    ``namespace`` is the one that a command without ``-n`` uses.
    """
    job = next((v for v in views if v.needs_attention), None)
    if job is None and any(v.state == "Running" and v.namespace for v in views):
        return f"{call} watch{flags}"
    job = job or next((v for v in reversed(views) if v.state == "Failed"), views[-1])
    where = f" -n {job.namespace}" if job.namespace not in ("", namespace) and " -n " not in flags else ""
    return f"{call} show {job.place}{flags}{where}"


def _row(job: JobView, now: datetime, *, local: bool) -> list[str | Cell]:
    message = Cell(stage_in_words(job, now))
    if job.needs_attention or job.state == "Failed":
        message = Cell(first_sentence(job.message), "red" if job.state == "Failed" else "yellow")
    state = "Deleting" if job.deleting else job.state
    return [
        job.place if local else job.name,
        state_cell(state),
        job.reason,
        figures.steps(job.step, job.total_steps),
        figures.loss(job.loss),
        figures.loss(job.best_eval_loss or job.eval_loss),
        figures.short_time(job.eta_seconds) if job.state == "Running" else "",
        str(job.restarts),
        figures.memory(job.peak_bytes),
        figures.age(job.created, now),
        message if message.text else "",
    ]


def stage_in_words(job: JobView, now: datetime) -> str:
    """Return the stage and the time in it; empty: the job is in none."""
    spent = figures.age(job.stage_start, now)
    return f"{job.stage}, {spent}" if job.stage and spent else job.stage


def first_sentence(text: str, most: int = MESSAGE) -> str:
    """Return a message on one line."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def views_of(objects: Sequence[Object]) -> list[JobView]:
    return [view(o) for o in objects]
