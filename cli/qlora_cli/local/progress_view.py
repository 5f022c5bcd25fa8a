"""Show the progress of a training: asked over HTTP, shown live on a terminal, in plain lines elsewhere."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Protocol

import httpx
from pydantic import ValidationError
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qlora_api.contract import ProgressReport
from qlora_cli.text import units

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from rich.console import Console, RenderableType

POLL_SECONDS = 0.5
ANSWER_SECONDS = 1.0
"""A rank that takes longer is busy; the next question comes soon."""
LINE_SECONDS = 10.0
"""Between plain lines when nothing but the step changes."""
STRAGGLER = 1.5
"""Times the median from which on a rank is worth a word."""
LONG_WAIT_SECONDS = 5.0
LONG_RUN_SECONDS = 60
"""What is expected to take longer is said beforehand."""
ROWS_PROGRESS = re.compile(r"[\d,]+ rows, [\d,]+ of [\d,]+ MB, [\d,.]+ MB/s, about \d+ min left")
"""In Prepare's log (qlora_trainer.data.collect)."""
LOG_TAIL_BYTES = 1 << 16
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


def display_for(console: Console, attempt: int) -> Display:
    return LiveDisplay(console, attempt) if console.is_terminal else PlainDisplay(console, attempt)


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
        if report and report.expected_seconds is not None and not self._expectation:
            self._expectation = expectation(report)
            if report.expected_seconds >= LONG_RUN_SECONDS:
                self._display.say(self._expectation)
        self._display.show(report or self.last)
        self._next = time.monotonic() + self._poll_seconds


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


def within_section(report: ProgressReport) -> str:
    """The section, and how far it is where that is known: ``Evaluate 12 of 86 micro-batches, 3.1/s``."""
    progress = report.section_progress
    if progress is None:
        return report.section
    known = f"{report.section} {units.number(progress.done)} of {units.number(progress.total)} {progress.unit}"
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
        ("left", units.duration(report.eta_seconds) if report.eta_seconds is not None else None),
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


def plain_line(report: ProgressReport) -> str:
    """One line for a log."""
    steps = [f"step {report.step}/{report.total_steps}"] if report.total_steps else []
    return "  ".join([within_section(report), *steps, *(f"{k} {v}" for k, v in figures(report))])


def memory_line(report: ProgressReport) -> str:
    """Measured memory by component, the peak last."""
    return " · ".join(f"{units.spaced(name)} {units.size(count)}" for name, count in report.memory.measured.items())


class PlainDisplay:
    """Lines without escape codes: every few seconds, and when an evaluation comes or a section is entered first."""

    def __init__(self, console: Console, attempt: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._attempt = attempt
        self._clock = clock
        self._sections: set[str] = set()
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
        new = report.section not in self._sections or report.eval_loss != self._eval_loss
        if not new and now < self._next:
            return
        self._sections.add(report.section)
        self._eval_loss = report.eval_loss
        self._next = now + LINE_SECONDS
        self.say(plain_line(report))

    def say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)


class LiveDisplay:
    """A bar and the figures, redrawn in place; gone at the end, when the results are printed."""

    def __init__(self, console: Console, attempt: int) -> None:
        self._console = console
        self._attempt = attempt
        self._began = time.monotonic()
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
        if report is None:
            seconds = units.duration(time.monotonic() - self._began)
            return Text(f"Attempt {self._attempt} · {STARTING} … {seconds}", style="dim")
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(f"Attempt {self._attempt} · {within_section(report)}", style="bold"),
            ProgressBar(total=max(report.total_steps, 1), completed=report.step, width=40),
            f"step {report.step}/{report.total_steps}",
        )
        line = Text("   ").join(Text.assemble((f"{label} ", "dim"), value) for label, value in figures(report))
        memory = [Text(memory_line(report), style="dim")] if report.memory.measured else []
        return Group(head, line, *memory)


def rows_progress(log: Path) -> str | None:
    """Return what Prepare's log last said of how far the rows are; None where it has said nothing yet."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
            said = ROWS_PROGRESS.findall(file.read().decode(errors="replace"))
    except OSError:
        return None
    return said[-1] if said else None


class Waiting:
    """Tells how long a process has taken that reports nothing itself: in place on a terminal, else in plain lines."""

    def __init__(
        self,
        console: Console,
        text: str,
        clock: Callable[[], float] = time.monotonic,
        detail: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._console = console
        self._text = text
        self._detail = detail
        self._clock = clock
        self._began = clock()
        self._next = self._began
        self._status = console.status(text) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._status:
            self._status.start()
        else:
            self.tick()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._status:
            self._status.stop()

    def tick(self) -> None:
        """Show the time, if there is something new to show."""
        now = self._clock()
        if now < self._next:
            return
        shown = f"{self._text} {units.duration(now - self._began)}" if now - self._began >= 1 else self._text
        if detail := self._detail():
            shown = f"{shown}: {detail}"
        if self._status:
            self._status.update(shown)
        else:
            self._console.print(shown, soft_wrap=True)
        self._next = now + (1.0 if self._status else LINE_SECONDS)
