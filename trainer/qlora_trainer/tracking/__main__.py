"""Send a run's history to one tool: ``python -m qlora_trainer.tracking CONFIG.json NUMBER``

The launcher starts one such process for each entry of spec.tracking, beside the ranks: a tool that is slow, hangs or
breaks costs no step. When the attempt has ended, the launcher closes standard input, and kills what is not done soon.
"""

from __future__ import annotations

import logging
import os
import select
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_api.status import TrackedRun
from qlora_trainer.configuration import read_config
from qlora_trainer.python_process import forbid_inspection
from qlora_trainer.tracking.journal import FOLDER_ENVIRONMENT, JOURNAL_FILE, RowReader
from qlora_trainer.tracking.run_facts import RunFacts, Sink
from qlora_trainer.tracking.sinks import sink_class
from qlora_trainer.tracking.tracked_runs import write_run

if TYPE_CHECKING:
    from collections.abc import Callable

    from qlora_api.spec import SinkType

READ_SECONDS = 1.0
"""Between looks for new steps."""
RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Between tries to reach a tool; the last one stays."""
GIVE_UP_SECONDS = 60.0
"""After standard input was closed: the launcher waits no longer than this."""
MESSAGE_LENGTH = 256
STANDARD_INPUT = 0
"""File descriptor."""
log = logging.getLogger(__name__)


class LauncherGoneError(Exception):
    """Standard input was closed, and nobody waits: the launcher was killed, or has waited long enough."""


class Input:
    """Standard input, which says nothing but that it is closed."""

    def __init__(self) -> None:
        self._closed_at: float | None = None

    @property
    def is_closed(self) -> bool:
        return self._closed_at is not None

    @property
    def is_over(self) -> bool:
        """True when the launcher, if it is still there, waits no longer."""
        return self._closed_at is not None and time.monotonic() - self._closed_at > GIVE_UP_SECONDS

    def wait(self, seconds: float) -> None:
        """Wait, but not on when it is closed meanwhile."""
        if self.is_closed:
            time.sleep(seconds)
            return
        ready, _, _ = select.select([STANDARD_INPUT], [], [], seconds)
        if ready and not os.read(STANDARD_INPUT, 1):
            self._closed_at = time.monotonic()


class Report:
    """Tell the launcher and rank 0 of the run, by a file that is written when there is something new.

    Args:
        folder: in which they look for it.
        number: of the sink in spec.tracking.
        kind: of the sink.

    """

    def __init__(self, folder: Path, number: int, kind: SinkType) -> None:
        self._folder, self._number, self._kind = folder, number, kind
        self._last: TrackedRun | None = None

    def __call__(self, url: str, message: str) -> None:
        run = TrackedRun(type=self._kind, url=url[:512], message=message)
        if run != self._last:
            self._last = run
            try:
                write_run(self._folder, self._number, run)
            except OSError as error:  # the tool may get its steps all the same
                log.warning("what became of the run cannot be written to a file: %s", error)


def follow(sink: Sink, journal: Path, waits: Input, report: Callable[[str, str], None]) -> None:
    """Send all rows to a sink, until the attempt has ended.

    Raises:
        LauncherGoneError: it will not end any more.

    """
    reader = RowReader(journal)
    while True:
        closed = waits.is_closed  # what was written before is read below
        if rows := reader.read():
            sink.write(rows)
        if reader.exit_code is not None:
            sink.finish(reader.attempts, reader.exit_code, reader.adapter, journal)
            report(sink.url, "")
            return
        if closed:
            raise LauncherGoneError
        report(sink.url, "")
        waits.wait(READ_SECONDS)


def keep_following(facts: RunFacts, journal: Path, waits: Input, report: Callable[[str, str], None]) -> None:
    """Send all rows; start again from the first one whenever the tool fails.

    Raises:
        LauncherGoneError: see :func:`follow`.

    """
    url, failures = "", 0
    while True:
        sink: Sink | None = None
        try:
            sink = sink_class(facts)(facts)
            url = sink.url
            follow(sink, journal, waits, report)
        except LauncherGoneError:
            raise
        except Exception as error:
            log.warning("%s (%s): %s", facts.field, facts.sink.type, error)
            report(url, sentence(error))
            if waits.is_over:
                raise LauncherGoneError from error
        else:
            return
        finally:
            if sink is not None:
                with suppress(Exception):  # it is given up
                    sink.close()
        waits.wait(RETRY_SECONDS[0] if waits.is_closed else RETRY_SECONDS[min(failures, len(RETRY_SECONDS) - 1)])
        failures += 1


def sentence(error: Exception) -> str:
    """Return an error in one line that fits the status."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MESSAGE_LENGTH else f"{text[: MESSAGE_LENGTH - 2]} …"


def main() -> int:
    if sys.flags.isolated:
        forbid_inspection()
    number, folder = int(sys.argv[2]), Path(os.environ[FOLDER_ENVIRONMENT])
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s tracking %(levelname)s %(message)s", force=True)
    facts = RunFacts.of(read_config(Path(sys.argv[1])), number)
    report = Report(folder, number, facts.sink.type)
    report("", "")
    try:
        keep_following(facts, folder / JOURNAL_FILE, Input(), report)
    except LauncherGoneError:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
