"""List the sweeps of a namespace or of the cluster, a line each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_cli.jobs.job_list import MESSAGE_ROOM, first_sentence
from qlora_cli.kube.names import API_VERSION, SWEEP_KIND, sweeps_path
from qlora_cli.text import figures
from qlora_cli.text.output import Cell, aligned, state_cell

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from rich.text import Text

    from qlora_cli.cluster_sweeps.cluster_sweep import ClusterSweep
    from qlora_cli.kube.api_client import Object
    from qlora_cli.kube.target import Cluster

HEAD = ("SWEEP", "STATE", "REASON", "TRIALS", "RUN", "FAILED", "BEST", "GPU-HOURS", "AGE", "MESSAGE")
NUMBERS = ("TRIALS", "RUN", "FAILED", "BEST", "GPU-HOURS", "AGE")
SPARE = ("FAILED", "RUN", "AGE", "REASON", "GPU-HOURS")
"""Columns that are given up on a narrow screen, one after the other."""


def sweeps_of(cluster: Cluster, *, everywhere: bool, selector: str | None) -> list[Object]:
    """Return the objects as the API server has them, oldest first."""
    items, _ = cluster.api.list(sweeps_path(None if everywhere else cluster.namespace), labelSelector=selector)
    kinds = {"apiVersion": API_VERSION, "kind": SWEEP_KIND}  # lists leave both out
    whole = [{**kinds, **item} for item in items]
    return sorted(whole, key=lambda o: (o["metadata"].get("creationTimestamp") or "", o["metadata"]["name"]))


def table(
    sweeps: Sequence[ClusterSweep], now: datetime, *, everywhere: bool = False
) -> tuple[list[str], list[list[str | Cell]]]:
    """Return head and rows, as ``kubectl get`` has them, with the reason in words for what does not run."""
    head, rows = [*HEAD], [_row(sweep, now) for sweep in sweeps]
    if everywhere:
        head = ["NAMESPACE", *head]
        rows = [[sweep.namespace, *row] for sweep, row in zip(sweeps, rows, strict=True)]
    return head, rows


def lines(head: Sequence[str], rows: Sequence[Sequence[str | Cell]], width: int) -> list[Text]:
    """Return a table for a screen; a message that has no room beside its row stands below it."""
    beside = aligned(head, rows, None, right=NUMBERS)
    longest = max(len(_text(row[-1])) for row in rows)
    if max(map(len, beside)) - longest + min(longest, MESSAGE_ROOM) <= width:
        return aligned(head, rows, width, right=NUMBERS)
    folded: list[Sequence[str | Cell]] = []
    for *row, message in rows:
        folded += [row, [Cell(f"  {_text(message)}", message.style)]] if isinstance(message, Cell) else [row]
    return aligned(head[:-1], folded, width, right=NUMBERS, spare=SPARE)


def _text(cell: str | Cell) -> str:
    return cell.text if isinstance(cell, Cell) else cell


def _row(sweep: ClusterSweep, now: datetime) -> list[str | Cell]:
    failed = sweep.state == "Failed"
    running, lost = sweep.counts.get("running", 0), sweep.counts.get("failed", 0)
    return [
        sweep.name,
        state_cell("Deleting" if sweep.deleting else sweep.state),
        sweep.reason,
        sweep.trials,
        str(running or ""),
        str(lost or ""),
        sweep.best_figure,
        sweep.used,
        figures.age(sweep.created, now),
        Cell(first_sentence(sweep.message), "red" if failed else "yellow") if failed or sweep.needs_attention else "",
    ]
