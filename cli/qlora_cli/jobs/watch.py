"""``qlora watch``: jobs live, by one watch of the API server's; on a terminal a screen, elsewhere lines.

What costs is drawing, not watching: the screen is drawn at most once a second and only when something changed, and only
the rows that fit are made into text.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich.text import Text

from qlora_cli.jobs.job_list import first_sentence, stage_in_words
from qlora_cli.jobs.job_view import JobView, counted, in_order, view
from qlora_cli.kube.names import jobs_path
from qlora_cli.text import figures
from qlora_cli.text.output import ROOM, STATE_STYLES, Cell, aligned, state_cell

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from rich.console import Console

    from qlora_cli.kube.api_client import Event, Object
    from qlora_cli.kube.target import Cluster

DRAW_SECONDS = 1.0
CLOCK_SECONDS = 10.0
"""Until ages are drawn anew though nothing happened."""
LINE_SECONDS = 10.0
"""Between two plain lines of a job of which only the step changes."""
KEPT_LOSSES = 24
TREND = 10
"""Columns of a loss's course. Always all of them, so that nothing moves as it fills."""
WIDE = 112
"""Columns from which on there is room for it."""
SPARE = ("TREND", "EVAL", "RST", "", "TOK/S", "AGE", "MEM", "LEFT", "LOSS")
"""Columns that are given up on a narrow screen, one after the other; the bar has no head."""
NUMBERS = ("LOSS", "TREND", "EVAL", "TOK/S", "LEFT", "RST", "MEM", "AGE")


@dataclass
class WatchedJobs:
    """State of the watched jobs. Changed by events alone."""

    names: frozenset[str] = frozenset()
    """Empty: all."""
    jobs: dict[tuple[str, str], JobView] = field(default_factory=dict)
    losses: dict[tuple[str, str], deque[float]] = field(default_factory=dict)
    lost: str = ""
    """Reason why no updates arrive; empty while they do."""
    body: Object = field(default_factory=dict)
    """The newest job as it came; of use where one was named."""
    listed: bool = False
    """All jobs there are have come once."""
    news: list[str] = field(default_factory=list)
    """Lines about other than jobs that are not printed yet, where there is no terminal."""

    def take(self, event: Event) -> list[JobView]:
        """Take an event in; the jobs that it changed."""
        if event.kind == "LOST":
            self.lost = event.text
            return []
        self.lost = ""
        views = [view(body) for body in event.items if not self.names or body["metadata"]["name"] in self.names]
        if event.kind == "LISTED":
            self.listed = True
            there = {_key(job) for job in views}
            for key in self.jobs.keys() - there:
                del self.jobs[key]
        for job in views:
            if event.kind == "DELETED":
                self.jobs.pop(_key(job), None)
                self.losses.pop(_key(job), None)
                continue
            self.jobs[_key(job)] = job
            self._remember(job)
        if event.items:
            self.body = event.items[-1]
        return views

    def _remember(self, job: JobView) -> None:
        try:
            value = float(job.loss)
        except ValueError:
            return
        seen = self.losses.setdefault(_key(job), deque(maxlen=KEPT_LOSSES))
        if not seen or seen[-1] != value:
            seen.append(value)

    @property
    def is_over(self) -> bool:
        """Return whether every job asked for is finished, deleted ones too."""
        return self.listed and all(job.is_finished for job in self.jobs.values())

    @property
    def any_failed(self) -> bool:
        return any(job.state == "Failed" for job in self.jobs.values())

    def heading(self) -> list[Text]:
        """Return what is to be read above the jobs."""
        return []


def _key(job: JobView) -> tuple[str, str]:
    return job.namespace, job.name


@dataclass(frozen=True)
class WatchRequest:
    """Selection of jobs to watch."""

    names: tuple[str, ...] = ()
    selector: str | None = None
    everywhere: bool = False


def start(cluster: Cluster, request: WatchRequest) -> queue.SimpleQueue[Event | Exception]:
    """Watch in a thread of its own; events, or the error that ended it, come through the queue."""
    path = jobs_path(None if request.everywhere else cluster.namespace)
    fields = f"metadata.name={request.names[0]}" if len(request.names) == 1 else None
    events: queue.SimpleQueue[Event | Exception] = queue.SimpleQueue()
    follow_to(events, cluster.api.follow(path, labelSelector=request.selector, fieldSelector=fields))
    return events


def follow_to(events: queue.SimpleQueue[Event | Exception], found: Iterable[Event]) -> None:
    """Put events into a queue as they come, in a thread of its own, and in the end the error that ended it."""

    def work() -> None:
        try:
            for event in found:
                events.put(event)
        except Exception as error:  # noqa: BLE001 whatever it is, it is raised where somebody sees it
            events.put(error)

    threading.Thread(target=work, daemon=True).start()


def watch(
    screen: Console, events: queue.SimpleQueue[Event | Exception], board: WatchedJobs, title: str, *, until_over: bool
) -> None:
    """Show until all is over, if that is asked for; else until Ctrl-C.

    Raises:
        ClusterError: the jobs may not be watched.

    """
    if screen.is_terminal:
        _live(screen, events, board, title, until_over=until_over)
    else:
        _plain(screen, events, board, until_over=until_over)


def _next(events: queue.SimpleQueue[Event | Exception], seconds: float) -> list[Event]:
    """Return all events that are there, waiting for the first one."""
    found: list[Event] = []
    try:
        event = events.get(timeout=seconds)
        while True:
            if isinstance(event, Exception):
                raise event
            found.append(event)
            event = events.get_nowait()
    except queue.Empty:
        return found


# ----------------------------------------------------------------------------------------------------------- a terminal


def _live(
    screen: Console, events: queue.SimpleQueue[Event | Exception], board: WatchedJobs, title: str, *, until_over: bool
) -> None:
    from rich.live import Live  # noqa: PLC0415

    drawn, changed = 0.0, True
    size = (0, 0)
    with (
        _last_page(screen, board, title),
        Live(Text("waiting for the API server …"), console=screen, screen=True, auto_refresh=False) as live,
    ):
        live.refresh()
        while not (until_over and board.is_over):
            for event in _next(events, DRAW_SECONDS):
                board.take(event)
                changed = True
            now = time.monotonic()
            stale = now - drawn > CLOCK_SECONDS or size != screen.size
            if (changed and now - drawn >= DRAW_SECONDS) or stale:
                size = (screen.size.width, screen.size.height)
                live.update(
                    Text("\n").join(_broken(page(board, title, datetime.now(UTC), *size), size[0])), refresh=True
                )
                drawn, changed = now, False


@contextmanager
def _last_page(screen: Console, board: WatchedJobs, title: str) -> Iterator[None]:
    """Leave on the terminal what was on the screen, however it ends."""
    try:
        yield
    finally:
        if board.jobs:
            for line in page(board, title, datetime.now(UTC), *screen.size):
                screen.print(line, soft_wrap=True)


def page(board: WatchedJobs, title: str, now: datetime, width: int, height: int | None) -> list[Text]:
    """Return the screen: a title, a line for each job that fits, what did not fit, and what is wrong.

    One job has the screen to itself, with lines that may be longer than it is wide: paths are not cut.
    """
    jobs = in_order(board.jobs.values())
    single = len(jobs) == 1 and len(board.names) == 1
    lines = [
        Text(title, style="bold") if single else Text.assemble((title, "bold"), f"   {counted(jobs) or 'no jobs'}")
    ]
    if board.lost:
        lines.append(Text(f"connection lost, trying again: {first_sentence(board.lost)}", style="bold red"))
    lines += [*board.heading(), Text()]
    if single:
        return lines + _single(jobs[0], board, now, width)
    below = width - _start_of_messages(jobs, now) < ROOM
    room = len(jobs) if height is None else max(height - len(lines) - 2, 1)
    shown = _fitting(jobs, room, lambda job: 1 + (below and _has_message(job)))
    lines += table(shown, board, now, width, below=below)
    if hidden := [job for job in jobs if job not in shown]:
        lines.append(Text(f"… and {len(hidden)} more: {counted(hidden)}", style="dim"))
    return _cut(lines, width)


def _fitting(jobs: Sequence[JobView], room: int, height: Callable[[JobView], int]) -> Sequence[JobView]:
    """Return the jobs that are shown in so many lines; all of them may take the line of what is left out, too."""
    if sum(map(height, jobs)) <= room + 1:
        return jobs
    count = room
    while count > 1 and sum(map(height, share(jobs, count))) > room:
        count -= 1
    return share(jobs, count)


def share(jobs: Sequence[JobView], room: int) -> list[JobView]:
    """The jobs that are shown where not all fit: some of every state, and what is left of the room for what runs."""
    groups: dict[str, list[JobView]] = {}
    for job in jobs:
        groups.setdefault("hand" if job.needs_attention else job.state, []).append(job)
    rows = {name: min(len(group), max(room // 6, 1)) for name, group in groups.items()}
    for name in sorted(groups, key=lambda name: name != "Running"):
        rows[name] += max(min(len(groups[name]) - rows[name], room - sum(rows.values())), 0)
    return [job for name, group in groups.items() for job in group[: rows[name]]][:room]


def _cut(lines: list[Text], width: int) -> list[Text]:
    for line in lines:
        line.no_wrap = True
        if len(line) > width:
            line.truncate(width, overflow="ellipsis")
    return lines


def _broken(lines: list[Text], width: int) -> list[Text]:
    """Break lines that are longer than the screen, as a terminal does."""
    return [part for line in lines for part in line.divide(range(width, len(line), width))]


def table(jobs: Sequence[JobView], board: WatchedJobs, now: datetime, width: int, *, below: bool = False) -> list[Text]:
    """Return a row for each job; what has no figures says in their place, or ``below``, why."""
    head = ["NAME", "STATE", "AGE", "", "STEP", "LOSS", "TREND", "EVAL", "TOK/S", "LEFT", "RST", "MEM"]
    rows: list[list[str | Cell]] = []
    for job, beginning in zip(jobs, _beginnings(jobs, now), strict=True):
        if not _has_message(job):
            rows.append([*beginning, *_figures(job, board, trend=width >= WIDE)])
            continue
        message = first_sentence(stage_in_words(job, now) or job.message)
        style = "red" if job.state == "Failed" else "yellow"
        rows += [[*beginning, ""], [Cell(f"  {message}", style)]] if below else [[*beginning, Cell(message, style)]]
    return aligned(head, rows, width, right=NUMBERS, spare=SPARE)


def _beginnings(jobs: Sequence[JobView], now: datetime) -> list[list[str | Cell]]:
    """Return the first cells of each row: name, state and age."""
    several = len({job.namespace for job in jobs}) > 1
    return [
        [f"{job.namespace}/{job.name}" if several else job.name, _state(job), figures.age(job.created, now)]
        for job in jobs
    ]


def _start_of_messages(jobs: Sequence[JobView], now: datetime) -> int:
    """Return the column at which messages begin, beside the first cells of their rows."""
    cells = [[len(c.text if isinstance(c, Cell) else c) + 2 for c in row] for row in _beginnings(jobs, now)]
    return sum(map(max, zip(*cells, strict=True)))


def _has_message(job: JobView) -> bool:
    return job.state not in ("Running", "Succeeded")


def _figures(job: JobView, board: WatchedJobs, *, trend: bool) -> list[str | Cell]:
    running = job.state == "Running"
    losses = list(board.losses.get(_key(job), ()))
    return [
        figures.bar(job.step, job.total_steps) if running else "",
        figures.steps(job.step, job.total_steps),
        figures.loss(job.loss),
        Cell(figures.sparkline(losses, TREND).rjust(TREND) if running and trend else "", "cyan"),
        figures.loss(job.best_eval_loss or job.eval_loss),
        figures.rate(job.tokens_per_second) if running else "",
        figures.short_time(job.eta_seconds) if running else "",
        str(job.restarts) if job.restarts else "",
        figures.memory(job.peak_bytes),
    ]


def _state(job: JobView) -> Cell:
    """State and, where it says more, reason in one word."""
    if job.deleting:
        return Cell("Deleting", "magenta")
    if job.state in ("Running", "Succeeded", "Suspended") or job.reason in ("", job.state):
        return state_cell(job.state)
    return Cell(job.reason, STATE_STYLES.get(job.state, ""))


def _single(job: JobView, board: WatchedJobs, now: datetime, width: int) -> list[Text]:
    """One job has the screen to itself."""
    from qlora_cli.jobs.show import page as show  # noqa: PLC0415

    lines = show(job, board.body, now, width)
    losses = list(board.losses.get(_key(job), ()))
    if line := figures.sparkline(losses, KEPT_LOSSES):
        ends = f"{figures.loss(str(losses[0]))} → {figures.loss(str(losses[-1]))}"
        lines.append(Text.assemble(("\nLoss, as seen ", "dim"), (line, "cyan"), f"  {ends}"))
    return lines


# ---------------------------------------------------------------------------------------------------------- no terminal


@dataclass
class _LastPrinted:
    state: tuple[str, str, str] = ("", "", "")
    at: float = 0.0
    step: int | None = None


def _plain(
    screen: Console, events: queue.SimpleQueue[Event | Exception], board: WatchedJobs, *, until_over: bool
) -> None:
    told: dict[tuple[str, str], _LastPrinted] = {}
    while not (until_over and board.is_over):
        for event in _next(events, DRAW_SECONDS):
            changed = board.take(event)
            if event.kind == "LOST":
                screen.print(Text(f"connection lost, trying again: {first_sentence(event.text)}"), soft_wrap=True)
            for job in changed:
                if event.kind == "DELETED":
                    screen.print(Text(f"{_label(job, board)}  deleted"), soft_wrap=True)
                elif _worth_a_line(told.setdefault(_key(job), _LastPrinted()), job):
                    screen.print(Text(plain_line(job, board)), soft_wrap=True)
            for line in board.news:
                screen.print(Text(line), soft_wrap=True)
            board.news.clear()


def _worth_a_line(told: _LastPrinted, job: JobView) -> bool:
    """A change of state, reason or eval loss at once; a step now and then."""
    state, now = (job.state, job.reason, job.eval_loss), time.monotonic()
    if state == told.state and (job.step == told.step or now - told.at < LINE_SECONDS):
        return False
    told.state, told.at, told.step = state, now, job.step
    return True


def _label(job: JobView, board: WatchedJobs) -> str:
    several = len({namespace for namespace, _ in board.jobs}) > 1
    return f"{job.namespace}/{job.name}" if several else job.name


def plain_line(job: JobView, board: WatchedJobs) -> str:
    """Return one line for a log."""
    known = (
        ("step", figures.steps(job.step, job.total_steps)),
        ("loss", figures.loss(job.loss)),
        ("eval", figures.loss(job.eval_loss)),
        ("tokens/s", figures.rate(job.tokens_per_second) if job.state == "Running" else ""),
        ("left", figures.short_time(job.eta_seconds) if job.state == "Running" else ""),
    )
    reason = f" ({job.reason})" if job.reason not in ("", job.state) else ""
    parts = [f"{_label(job, board)}  {job.state}{reason}", *(f"{k} {v}" for k, v in known if v)]
    if job.state != "Running" and job.message:
        parts.append(first_sentence(job.message))
    return "  ".join(parts)
