"""Write the status of QLoRASweeps: the smallest patch, on the version that was decided on, and counts not too often."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime

from qlora_api.sweep.status import QLoRASweepStatus, TrialCounts
from qlora_api.sweep.sweep import QLoRASweep
from qlora_operator.act.merge_patch import merge_patch
from qlora_operator.act.object_paths import sweep_path
from qlora_operator.act.other_versions import (
    is_not_understood,
    not_understood_message,
    with_not_understood,
    with_unknown_fields,
)
from qlora_operator.act.repeated_writes import RepeatedWrites
from qlora_operator.kube.client import Api, ApiError, Object
from qlora_operator.state.cache import Key
from qlora_operator.state.sweep_cache import SweepCache

log = logging.getLogger(__name__)

COUNTS_FACTOR = 4
"""Times ``progressSeconds``: so far apart are writes that change nothing but counts, times and the best so far."""
_NO_TIME = datetime(1970, 1, 1, tzinfo=UTC)


class SweepStatusWriter:
    """The only writer of sweeps' status. What the API server answers goes into the cache.

    Args:
        cache: the sweeps.
        api: the operator's calls.
        progress_seconds: see ``COUNTS_FACTOR``.
        wake_later: has a key decided on again after a while.

    """

    def __init__(
        self, cache: SweepCache, api: Api, progress_seconds: float, wake_later: Callable[[Key, float], None]
    ) -> None:
        self._cache, self._api, self._wake_later = cache, api, wake_later
        self._pause = COUNTS_FACTOR * progress_seconds
        self._writes = RepeatedWrites()

    def forget(self, key: Key) -> None:
        """Forget what was written of a sweep's status."""
        self._writes.forget(key)

    async def write(self, key: Key, sweep: QLoRASweep, stored: Object, status: QLoRASweepStatus) -> bool:
        """Write a status, unless nothing has changed or only counts have, a moment ago; return whether it counts.

        Raises:
            ApiError: it was refused; with 409, the cache has the sweep as it is now.

        """
        before = stored.get("status") or {}
        patch = merge_patch(before, with_unknown_fields(before, status.to_json_dict(), QLoRASweepStatus))
        if not patch:
            return True
        old = sweep.status or QLoRASweepStatus()
        if _without_counts(old) == _without_counts(status):
            left = self._pause - self._writes.seconds_since(key)
            if left > 0:
                self._wake_later(key, left)
                return True
        return await self._write(key, stored, patch, _fingerprint(old), _fingerprint(status), _fingerprint_of_stored)

    async def write_unknown_fields(self, key: Key, stored: Object, error: Exception) -> None:
        """Write that a sweep has a value that this operator does not know. Until it does, it leaves the sweep alone."""
        status: Object = stored.get("status") or {}
        text = not_understood_message("sweep", error)
        if is_not_understood(status, text):
            return

        def hash_of_stored(answer: Object) -> int:
            return hash(text) if is_not_understood(answer, text) else 0

        conditions = with_not_understood(stored, text, self._api.clock.now())
        await self._write(key, stored, {"conditions": conditions}, 0, hash(text), hash_of_stored)

    async def _write(
        self, key: Key, stored: Object, patch: Object, before: int, wanted: int, hash_of: Callable[[Object], int]
    ) -> bool:
        left = self._writes.seconds_left(key, before, wanted)
        if left > 0:  # another program replaces it
            self._wake_later(key, left)
            return False
        body = {"metadata": {"resourceVersion": stored["metadata"]["resourceVersion"]}, "status": patch}
        try:
            written = await self._api.patch(f"{sweep_path(key)}/status", body)
        except ApiError as error:
            if error.status == 404:  # deleted meanwhile; the watch will say so
                return True
            if error.status == 409:
                self._cache.take(await self._api.get(sweep_path(key)))
            raise
        if pause := self._writes.record(key, before, wanted, hash_of(written.get("status") or {})):
            log.warning("%s: another program replaces its status; it is written again in %.0f s", "/".join(key), pause)
        self._cache.take(written)
        return True


def _without_counts(status: QLoRASweepStatus) -> QLoRASweepStatus:
    """Return a status without what a running sweep changes all the time."""
    conditions = [c.model_copy(update={"message": "", "observed_generation": 0}) for c in status.conditions]
    update = {"trials": TrialCounts(), "finished": "", "best": None, "gpu_seconds": 0, "gpu_hours": "0"}
    return status.model_copy(update={**update, "conditions": conditions})


def _fingerprint(status: QLoRASweepStatus) -> int:
    """Return a hash of a status without the times of transitions."""
    conditions = [c.model_copy(update={"last_transition_time": _NO_TIME}) for c in status.conditions]
    return hash(status.model_copy(update={"conditions": conditions}).model_dump_json())


def _fingerprint_of_stored(status: Object) -> int:
    return _fingerprint(QLoRASweepStatus.model_validate(status, extra="ignore"))
