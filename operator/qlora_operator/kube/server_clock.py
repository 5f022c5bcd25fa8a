"""Tell the time of the API server, by the Date headers of its answers: the times in objects are of its clock.

An operator's own clock may be minutes off. Between two answers the time goes on by a clock that nobody sets.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

TOLERANCE = timedelta(seconds=5)
"""Several API servers may differ by this much; what is further back is a clock that was set."""


class ServerClock:
    """The newest time that an answer had, and what has passed since."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._known: datetime | None = None
        self._at = 0.0

    def note(self, date: str | None) -> None:
        """Take in the Date header of an answer. It is cut to seconds and has travelled, so the latest one counts."""
        try:
            received = parsedate_to_datetime(date).astimezone(UTC) if date else None
        except ValueError:
            return
        if received is None:
            return
        ahead = received - self.now()
        if self._known is None or ahead > timedelta() or ahead < -TOLERANCE:
            self._known, self._at = received, self._monotonic()

    def now(self) -> datetime:
        """Return the API server's time; this machine's, before the first answer."""
        if self._known is None:
            return datetime.now(UTC)
        return self._known + timedelta(seconds=self._monotonic() - self._at)
