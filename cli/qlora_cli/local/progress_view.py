"""Show the progress of a training: asked over HTTP, shown live on a terminal, in plain lines elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

import httpx
from pydantic import ValidationError
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qlora_api.contract import TRAINING, ProgressReport
from qlora_cli.text import units
from qlora_cli.text.memory_rows import memory_words
from qlora_cli.text.paragraphs import folded, held

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from rich.console import Console, RenderableType

    from qlora_api.status import TrackedRun

POLL_SECONDS = 0.5
ANSWER_SECONDS = 1.0
"""A rank that takes longer is busy; the next question comes soon."""
LINE_SECONDS = 10.0
"""Between plain lines when nothing but the step changes."""
STRAGGLER = 1.5
"""Times the median from which on a rank is worth a word."""
LONG_WAIT_SECONDS = 5.0
BAR = 40
LONG_RUN_SECONDS = 60
"""Shortest expected duration of a run that is announced before it starts."""
STARTING = "starting: the ranks import PyTorch and meet"


class Poller:
    """Asks rank 0 of a trainer on this machine."""

    def __init__(self, ports_dir: Path) -> None:
        self._port_file = ports_dir / "rank-0.port"
        # No proxy of the environment stands between this machine and itself.
        self._client = httpx.Client(timeout=ANSWER_SECONDS, trust_env=False)

    def ask(self) -> ProgressReport | None:
        """The newest report; None before the rank serves, while it is busy, and after it is gone."""
        try:
            port = int(self._port_file.read_text())
            answer = self._client.get(f"http://127.0.0.1:{port}/progress")
            return ProgressReport.model_validate_json(answer.raise_for_status().content)
        except (OSError, ValueError, httpx.HTTPError, ValidationError):
            return None  # the training is what counts; nothing about its display may end it

    def close(self) -> None:
        self._client.close()


class Display(Protocol):
    """Display of progress. A context manager."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def show(self, report: ProgressReport | None) -> None:
        """Show the newest report; None: the trainer does not answer yet."""

    def say(self, text: str) -> None:
        """Print a line that stays."""


def display_for(console: Console, attempt: int, device: str) -> Display:
    return LiveDisplay(console, attempt, device) if console.is_terminal else PlainDisplay(console, attempt)


class Watcher:
    """Polls now and then, shows what it hears, and remembers what outlives the trainer."""

    def __init__(
        self, poller: Poller, display: Display, every_steps: int | None, poll_seconds: float = POLL_SECONDS
    ) -> None:
        self.last: ProgressReport | None = None
        self.first_eval_loss: str | None = None
        self._poller = poller
        self._display = display
        self._every_steps = every_steps
        self._next = 0.0
        self._warnings = 0
        self._tracking: dict[str, TrackedRun] = {}
        self._expectation = ""
        self._poll_seconds = poll_seconds

    def tick(self) -> None:
        """Ask and show, if it is time."""
        if time.monotonic() < self._next:
            return
        report = self._poller.ask()
        self.last = report or self.last
        if report and self.first_eval_loss is None and before_second_evaluation(report, self._every_steps):
            self.first_eval_loss = report.eval_loss
        for warning in report.warnings[self._warnings :] if report else ():
            self._display.say(f"Warning: {warning}")
            self._warnings += 1
        for run in report.tracking if report else ():
            self._tell_of(run)
        if report and report.expected_seconds is not None and not self._expectation:
            self._expectation = expectation(report)
            if report.expected_seconds >= LONG_RUN_SECONDS:
                self._display.say(self._expectation)
        self._display.show(report or self.last)
        self._next = time.monotonic() + self._poll_seconds

    def _tell_of(self, run: TrackedRun) -> None:
        """Show where a tracking tool has the run, and that it does not have the newest steps, each once."""
        before = self._tracking.get(run.type)
        if run.url and (before is None or before.url != run.url):
            self._display.say(f"{run.type}: {run.url}")
        if run.message and (before is None or before.message != run.message):
            self._display.say(f"Warning: {run.type} does not have the newest steps: {run.message}")
        self._tracking[run.type] = run


def before_second_evaluation(report: ProgressReport, every_steps: int | None) -> bool:
    """Return whether the eval loss in a report can only be that from before the first step."""
    if report.first_step:
        return False
    return report.step < every_steps if every_steps else float(report.epoch) < 1


# ------------------------------------------------------------------------------------------------------------- in words


def expectation(report: ProgressReport) -> str:
    """Return what lies ahead, before the first step."""
    steps = units.number(report.total_steps - report.first_step)
    time_left = units.duration(report.expected_seconds or 0)
    return f"{steps} steps are to be done: about {time_left} on this machine, by one trial step, evaluations included"


class StageTimer:
    """Tells for how long the trainer has been at what it does."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._name = ""
        self._began = 0.0

    def describe(self, report: ProgressReport) -> str:
        """Return the stage, how far it is where that is known, and its time."""
        name = report.doing
        if name != self._name:
            self._name, self._began = name, self._clock()
        spent = self._clock() - self._began
        parts = [within_section(report), *([units.duration(spent)] if spent >= 1 and name != TRAINING else [])]
        return ", ".join(parts)


def within_section(report: ProgressReport) -> str:
    """Return the stage, and how far it is where that is known: ``evaluating: 12 of 86 micro-batches, 3.1/s``."""
    progress = report.section_progress
    if progress is None:
        return report.doing
    known = f"{report.doing}: {units.number(progress.done)} of {units.number(progress.total)} {progress.unit}"
    if not progress.done or not progress.seconds:
        return known
    return f"{known}, {units.number(progress.done / progress.seconds)}/s"


def figures(report: ProgressReport) -> list[tuple[str, str]]:
    """Return what is known, as label and value."""
    known = (
        ("epoch", report.epoch if report.step else None),
        ("loss", report.loss),
        ("eval", report.eval_loss),
        ("lr", report.learning_rate),
        ("tokens/s", units.number(float(report.tokens_per_second)) if report.tokens_per_second else None),
        ("left", units.duration(report.eta_seconds) if report.eta_seconds else None),
        ("slow", straggler(report)),
    )
    return [(label, value) for label, value in known if value is not None]


def straggler(report: ProgressReport) -> str | None:
    """The rank that holds up the others: one they wait for just now, or one that took far longer than most."""
    waits, slow = report.waiting_for, report.slowest
    if waits and waits.seconds > LONG_WAIT_SECONDS:
        return f"rank {waits.rank} on {waits.node}, {waits.seconds:.0f} s in {waits.section}"
    if slow and slow.median_seconds and slow.seconds > STRAGGLER * slow.median_seconds:
        usual = f"{slow.seconds:.2f} s a step, {slow.median_seconds:.2f} s usual"
        return f"rank {slow.rank} on {slow.node}, {usual}, most in {slow.section}"
    return None


def plain_line(report: ProgressReport, stage: str) -> str:
    """One line for a log."""
    steps = [f"step {report.step}/{report.total_steps}"] if report.total_steps else []
    return "  ".join([stage, *steps, *(f"{k} {v}" for k, v in figures(report))])


class PlainDisplay:
    """Lines without escape codes: every few seconds, and when an evaluation comes or a section is entered first."""

    def __init__(self, console: Console, attempt: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._attempt = attempt
        self._clock = clock
        self._stage = StageTimer(clock)
        self._stages: set[str] = set()
        self._eval_loss: str | None = None
        self._began = clock()
        self._next = self._began + LINE_SECONDS

    def __enter__(self) -> Self:
        self.say(f"Attempt {self._attempt}: {STARTING}")
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        pass

    def show(self, report: ProgressReport | None) -> None:
        now = self._clock()
        if report is None:
            if now >= self._next:
                self._next = now + LINE_SECONDS
                self.say(f"Attempt {self._attempt}: {STARTING}, {units.duration(now - self._began)}")
            return
        stage = self._stage.describe(report)
        new = report.doing not in self._stages or report.eval_loss != self._eval_loss
        if not new and now < self._next:
            return
        self._stages.add(report.doing)
        self._eval_loss = report.eval_loss
        self._next = now + LINE_SECONDS
        self.say(plain_line(report, stage))

    def say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)


class LiveDisplay:
    """A bar and the figures, redrawn in place; gone at the end, when the results are printed."""

    def __init__(self, console: Console, attempt: int, device: str) -> None:
        self._console = console
        self._attempt = attempt
        self._device = device
        self._began = time.monotonic()
        self._stage = StageTimer()
        self._live = Live(self._render(None), console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._live.stop()

    def show(self, report: ProgressReport | None) -> None:
        self._live.update(self._render(report))

    def say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    def _render(self, report: ProgressReport | None) -> RenderableType:
        head = f"Attempt {self._attempt} · {units.duration(time.monotonic() - self._began)} · "
        if report is None:
            return Text(f"{head}{STARTING}", style="dim")
        lines: list[RenderableType] = [Text(f"{head}{self._stage.describe(report)}", style="bold")]
        if report.total_steps:
            bar = Table.grid(padding=(0, 2))
            done = ProgressBar(total=report.total_steps, completed=report.step, width=BAR)
            bar.add_row(done, f"step {report.step}/{report.total_steps}")
            lines.append(bar)
        width = self._console.width
        known = "   ".join(held(f"{label} {value}") for label, value in figures(report))
        lines += [Text(line) for line in folded(known, width) if line]
        measured = memory_words(report.memory.predicted, report.memory.measured, self._device)
        return Group(*lines, *(Text(line, style="dim") for line in folded(measured, width) if line))
