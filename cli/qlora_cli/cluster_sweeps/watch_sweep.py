"""``qlora watch`` of a sweep: its trials as jobs, below a line about the sweep, by two watches of the API server's."""

from __future__ import annotations

import queue
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from rich.text import Text

from qlora_cli.cluster_sweeps.cluster_sweep import ClusterSweep, cluster_sweep
from qlora_cli.cluster_sweeps.sweep_reader import is_controlled_by
from qlora_cli.jobs.job_list import first_sentence
from qlora_cli.jobs.watch import WatchedJobs, follow_to
from qlora_cli.kube.api_client import Event
from qlora_cli.kube.names import SWEEP_LABEL, jobs_path, sweeps_path
from qlora_cli.text.output import STATE_STYLES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from qlora_cli.jobs.job_view import JobView
    from qlora_cli.kube.target import Cluster


@dataclass(frozen=True)
class SweepEvent(Event):
    """Event of the watch of the sweep itself."""


@dataclass
class WatchedSweep(WatchedJobs):
    """State of a sweep and its trials. Changed by events alone."""

    sweep: ClusterSweep = field(kw_only=True)
    is_gone: bool = False

    def take(self, event: Event) -> list[JobView]:
        """Take an event in; the trials that it changed."""
        if not isinstance(event, SweepEvent):
            trials = tuple(body for body in event.items if is_controlled_by(body, self.sweep.uid))
            return super().take(replace(event, items=trials))
        if event.kind == "LOST":
            self.lost = event.text
            return []
        self.lost = ""
        same = [body for body in event.items if body["metadata"].get("uid") == self.sweep.uid]
        if event.kind == "DELETED" or not same:
            self.is_gone = True
            self.news.append(f"sweep {self.sweep.name}  deleted")
        for body in same:
            self._see(cluster_sweep(body))
        return []

    def _see(self, sweep: ClusterSweep) -> None:
        before, self.sweep = line(self.sweep), sweep
        if line(sweep) != before:
            self.news.append(line(sweep))

    @property
    def is_over(self) -> bool:
        """Return whether the sweep is finished, or deleted."""
        return self.listed and (self.is_gone or self.sweep.is_finished)

    @property
    def any_failed(self) -> bool:
        return self.sweep.state == "Failed"

    def heading(self) -> list[Text]:
        """Return a line about the sweep, and why it waits or has failed."""
        sweep = self.sweep
        state = Text.assemble(("sweep ", "dim"), sweep.name, "  ", (sweep.state, STATE_STYLES.get(sweep.state, "")))
        state.append("".join(f"  {part}" for part in _parts(sweep)))
        message = [Text(first_sentence(sweep.message))] if sweep.state not in ("Running", "Succeeded") else []
        return [state, *message]


def start(cluster: Cluster, sweep: ClusterSweep) -> queue.SimpleQueue[Event | Exception]:
    """Watch a sweep and its trials, in threads; events, or the error that ended one, come through the queue."""
    events: queue.SimpleQueue[Event | Exception] = queue.SimpleQueue()
    sweeps = cluster.api.follow(sweeps_path(sweep.namespace), fieldSelector=f"metadata.name={sweep.name}")
    follow_to(events, _of_sweep(sweeps))
    follow_to(events, cluster.api.follow(jobs_path(sweep.namespace), labelSelector=f"{SWEEP_LABEL}={sweep.name}"))
    return events


def _of_sweep(events: Iterable[Event]) -> Iterator[SweepEvent]:
    for event in events:
        yield SweepEvent(event.kind, event.items, event.text)


def _parts(sweep: ClusterSweep) -> Iterator[str]:
    if sweep.trials:
        yield f"trials {sweep.trials}"
    if sweep.best:
        yield f"best {sweep.best} {sweep.metric} {sweep.best_figure}"
    yield f"GPU-hours {sweep.used}"


def line(sweep: ClusterSweep) -> str:
    """Return one line for a log."""
    reason = f" ({sweep.reason})" if sweep.reason != sweep.state else ""
    parts = [f"sweep {sweep.name}  {sweep.state}{reason}", *_parts(sweep)]
    if sweep.state != "Running" and sweep.message:
        parts.append(first_sentence(sweep.message))
    return "  ".join(parts)
