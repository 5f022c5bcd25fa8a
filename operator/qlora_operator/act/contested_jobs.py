"""Report each waiting Job of another release of the operator once as an Event, and each release once in the log."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from qlora_operator.decide.attempts.outdated import contested_note
from qlora_operator.decide.decision import Note
from qlora_operator.serve.metrics import Metrics
from qlora_operator.state.cache import Key
from qlora_operator.state.observed import ObservedJob

log = logging.getLogger(__name__)
MOST_RELEASES = 100
"""Named in the log: a release's name is an annotation that whoever creates a Job may write."""


class ContestedJobs:
    """Keeps the jobs for which an Event was written."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._reported: dict[Key, str] = {}
        """UID of the newest Job of each QLoRAJob that was reported as contested."""
        self._releases: set[str] = set()

    def take(self, key: Key, job: ObservedJob | None) -> Iterator[Note]:
        """Count a contested Job that was not reported yet, and yield the Event for it."""
        if job is None or self._reported.get(key) == job.uid:
            return
        self._reported[key] = job.uid
        self._metrics.job_contested()
        note = contested_note(job)
        if job.operator not in self._releases and len(self._releases) < MOST_RELEASES:
            self._releases.add(job.operator)
            log.warning("%s: %s", "/".join(key), note.message)
        yield note

    def forget(self, key: Key) -> None:
        """Forget a QLoRAJob that is gone."""
        self._reported.pop(key, None)
