"""``qlora events``: what was posted about a job, its child Jobs and its pods, in one list."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.text import Text

from qlora_cli.jobs.job_view import time
from qlora_cli.kube.names import core_path
from qlora_cli.text import figures
from qlora_cli.text.output import Cell

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from datetime import datetime

    from qlora_cli.kube.api_client import Object
    from qlora_cli.kube.target import Cluster


@dataclass(frozen=True, slots=True)
class EventView:
    """One event, of core/v1 or written through events.k8s.io."""

    at: datetime | None
    count: int
    kind: str
    reason: str
    about: str
    message: str
    uid: str
    resource_version: int


def see(event: Object) -> EventView:
    """Cut out of an Event what is shown."""
    about, series = event.get("involvedObject") or {}, event.get("series") or {}
    at = series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime")
    meta = event["metadata"]
    return EventView(
        at=time(at or event.get("firstTimestamp") or meta.get("creationTimestamp")),
        count=series.get("count") or event.get("count") or 1,
        kind=event.get("type") or "",
        reason=event.get("reason") or "",
        about=f"{about.get('kind', '')}/{about.get('name', '')}",
        message=" ".join((event.get("message") or "").split()),
        uid=meta.get("uid", ""),
        resource_version=int(meta.get("resourceVersion") or 0),
    )


class JobObjects:
    """Objects whose events are about a job: itself, its child Jobs and their pods, those that are gone included.

    Children are known by the form of their names (``tune-1``, ``tune-1-0-x7k2p``, ``tune-prepare-x7k2p``), since an
    event outlives what it is about. The form keeps a job ``tune-1`` apart from the first attempt of ``tune``.
    """

    def __init__(self, name: str) -> None:
        attempt = rf"{re.escape(name)}-(\d+|prepare)"
        self._forms = {
            "QLoRAJob": re.compile(re.escape(name)),
            "Job": re.compile(attempt),
            "Pod": re.compile(rf"{re.escape(name)}-(\d+-\d+|prepare)-[a-z0-9]{{5}}"),
            "Workload": re.compile(rf"(job-)?{attempt}(-[a-z0-9]+)?"),
            "PodGroup": re.compile(rf"{attempt}(-[-a-z0-9]+)?"),
        }

    def has(self, event: Object) -> bool:
        about = event.get("involvedObject") or {}
        form = self._forms.get(about.get("kind", ""))
        return form is not None and form.fullmatch(about.get("name", "")) is not None


def events_of(cluster: Cluster, family: JobObjects) -> list[Object]:
    """Return all Events, oldest first."""
    items, _ = cluster.api.list(core_path(cluster.namespace, "events"))
    pairs = [(see(item), item) for item in items if family.has(item)]
    return [item for _, item in sorted(pairs, key=lambda pair: _when(pair[0]))]


def follow(cluster: Cluster, family: JobObjects) -> Iterator[EventView]:
    """Those there are and those to come; what is posted again comes again."""
    for event in cluster.api.follow(core_path(cluster.namespace, "events")):
        if event.kind in ("LISTED", "ADDED", "MODIFIED"):
            yield from in_order(see(item) for item in event.items if family.has(item))


def in_order(events: Iterable[EventView]) -> list[EventView]:
    return sorted(events, key=_when)


def _when(event: EventView) -> tuple[float, int]:
    return event.at.timestamp() if event.at else 0, event.resource_version


def rows(events: Sequence[EventView], now: datetime) -> list[list[str | Cell]]:
    """For a table under ``HEAD``."""
    return [
        [
            figures.age(e.at, now),
            Cell(e.kind, "yellow" if e.kind == "Warning" else "dim"),
            e.reason,
            e.about,
            e.message + (f" (×{e.count})" if e.count > 1 else ""),
        ]
        for e in events
    ]


HEAD = ("AGE", "TYPE", "REASON", "OBJECT", "MESSAGE")


def line(event: EventView) -> Text:
    """For --follow: the time of day in place of an age."""
    at = event.at.astimezone().strftime("%H:%M:%S") if event.at else ""
    again = f" (×{event.count})" if event.count > 1 else ""
    style = "yellow" if event.kind == "Warning" else ""
    return Text.assemble((f"{at}  ", "dim"), (event.reason, style), f"  {event.about}  {event.message}{again}")
