"""Write status: the smallest patch, on the version that was decided on, and figures no more often than configured.

Where another program writes another status, such as a second release of the operator, neither gives in: each writes its
own again, after pauses that grow.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable

from qlora_api.job import QLoRAJob
from qlora_api.status import QLoRAJobStatus, Reason
from qlora_operator.act.merge_patch import merge_patch
from qlora_operator.act.object_paths import job_path
from qlora_operator.act.other_versions import (
    for_older_definition,
    is_not_understood,
    not_understood_message,
    with_not_understood,
    with_unknown_fields,
)
from qlora_operator.act.repeated_writes import RepeatedWrites, fingerprint
from qlora_operator.decide.attempts.attempt_history import REPORTED_FIELDS, differ_in_figures, with_job_uids
from qlora_operator.decide.decision import Decision
from qlora_operator.kube.client import Api, ApiError, Object
from qlora_operator.state.cache import Key, ObjectCache

log = logging.getLogger(__name__)

REPLACED = (
    "%s: another program replaces what this one writes into %s of status; it is written again in %.0f s, or later;"
    " have one release of the operator serve each namespace"
)


class StatusWriter:
    """The only writer of status. What the API server answers goes into the cache.

    Args:
        cache: what is known.
        api: the operator's calls.
        progress_seconds: between two writes of a job that change nothing but figures, see ``repeated_writes.py``.
        wake_later: has a key decided on again after a while.

    """

    def __init__(
        self, cache: ObjectCache, api: Api, progress_seconds: float, wake_later: Callable[[Key, float], None]
    ) -> None:
        self._cache, self._api, self._progress_seconds, self._wake_later = cache, api, progress_seconds, wake_later
        self._writes = RepeatedWrites()

    def forget(self, key: Key) -> None:
        """Forget what was written of a job's status."""
        self._writes.forget(key)

    async def write(self, key: Key, job: QLoRAJob, stored: Object, decision: Decision) -> bool:
        """Write the status of a decision, unless nothing has changed or only figures have, a moment ago.

        Return whether the decision counts: its status is not held back because another program replaces it.

        Raises:
            ApiError: it was refused; with 409, the cache has the job as it is now.

        """
        status = with_job_uids(decision.status, self._cache[key].own_children())
        before = stored.get("status") or {}
        after = with_unknown_fields(before, status.to_json_dict(), QLoRAJobStatus)
        patch = merge_patch(before, after)
        if not patch:
            return True
        if job.status is not None and differ_in_figures(job.status, status):
            left = self._progress_seconds - self._writes.seconds_since(key)
            if status.reason in (Reason.STARTING, Reason.PREPARING):
                left = self._writes.words_left(key, hash(json.dumps(patch, sort_keys=True)), self._progress_seconds)
            if left > 0:
                self._wake_later(key, left)
                return True
        before_and_after = fingerprint(job.status or QLoRAJobStatus()), fingerprint(status)
        if self._is_held_back(key, *before_and_after):
            return False
        body = {"metadata": {"resourceVersion": job.metadata.resource_version}, "status": patch}
        try:
            written = await self._patch(key, body)
        except ApiError as error:
            if error.status == 404:  # deleted meanwhile; the watch will say so
                return True
            if error.status == 409:  # somebody changed the job: decide again on what it is now
                self._cache.take_job(await self._api.get(job_path(key)))
            raise
        answered = QLoRAJobStatus.model_validate(written.get("status") or {}, extra="ignore")
        self._record(key, *before_and_after, fingerprint(answered), patch)
        self._cache.take_job(written)
        return True

    async def write_unknown_fields(self, key: Key, stored: Object, error: Exception) -> None:
        """Write that a job has a value that this operator does not know. Until it does, it leaves the job as it is."""
        status: Object = stored.get("status") or {}
        text = not_understood_message("job", error)
        if is_not_understood(status, text):
            return
        before_and_after = 0, hash(text)
        if self._is_held_back(key, *before_and_after):
            return
        change: Object = {"conditions": with_not_understood(stored, text, self._api.clock.now())}
        if not status.get("attempts") and status.get("state") in (None, "Pending"):
            change |= {"state": "Pending", "reason": Reason.NOT_UNDERSTOOD}
        body = {"metadata": {"resourceVersion": stored["metadata"]["resourceVersion"]}, "status": change}
        written = await self._patch(key, body)
        answered = hash(text) if is_not_understood(written.get("status") or {}, text) else 0
        self._record(key, *before_and_after, answered, change)
        self._cache.take_job(written)

    def _is_held_back(self, key: Key, stored: int, wanted: int) -> bool:
        """Return whether a status is written later, since another program has replaced it so often."""
        left = self._writes.seconds_left(key, stored, wanted)
        if left > 0:
            self._wake_later(key, left)
        return left > 0

    def _record(self, key: Key, stored: int, wanted: int, answered: int, change: Object) -> None:
        """Record a write, and say so where it was one more of the same."""
        if pause := self._writes.record(key, stored, wanted, answered):
            log.warning(REPLACED, "/".join(key), ", ".join(change), pause)

    async def _patch(self, key: Key, body: Object) -> Object:
        """Write status; without what the API server refuses of it, by an older definition or of its pods' figures."""
        path = f"{job_path(key)}/status"
        try:
            return await self._api.patch(path, body)
        except ApiError as error:
            if error.status != 422:
                raise
            kept = for_older_definition(body["status"], error.message)
            if kept == body["status"]:
                kept = {name: value for name, value in kept.items() if name not in REPORTED_FIELDS}
            if kept == body["status"]:
                raise
            log.warning("%s: the API server rejects a part of status: %s", "/".join(key), error)
            return await self._api.patch(path, {**body, "status": kept})
