"""Write status: the smallest patch, on the version that was decided on, and figures no more often than configured."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from qlora_api.job import QLoRAJob
from qlora_api.status import ConditionType, QLoRAJobStatus, Reason
from qlora_operator.act.children import job_path
from qlora_operator.act.merge_patch import merge_patch
from qlora_operator.act.other_versions import for_older_definition, with_unknown_fields
from qlora_operator.decide.attempts.attempt_history import REPORTED_FIELDS, differ_in_figures, with_job_uids
from qlora_operator.decide.decision import Decision
from qlora_operator.kube.client import Api, ApiError, Object
from qlora_operator.state.cache import Key, ObjectCache

log = logging.getLogger(__name__)

LONGEST_ERROR = 2000
"""Characters of an error that get into status."""


class StatusWriter:
    """The only writer of status. What the API server answers goes into the cache.

    Args:
        cache: what is known.
        api: the operator's calls.
        progress_seconds: between two writes of a job that change nothing but figures.
        wake_later: has a key decided on again after a while.

    """

    def __init__(
        self, cache: ObjectCache, api: Api, progress_seconds: float, wake_later: Callable[[Key, float], None]
    ) -> None:
        self._cache, self._api, self._progress_seconds, self._wake_later = cache, api, progress_seconds, wake_later
        self._written: dict[Key, float] = {}

    def forget(self, key: Key) -> None:
        """Forget when a job's status was last written."""
        self._written.pop(key, None)

    async def write(self, key: Key, job: QLoRAJob, stored: Object, decision: Decision) -> None:
        """Write the status of a decision, unless nothing has changed or only figures have, a moment ago.

        Raises:
            ApiError: it was refused; with 409, the cache has the job as it is now.

        """
        status = with_job_uids(decision.status, self._cache[key].own_children())
        before = stored.get("status") or {}
        after = with_unknown_fields(before, status.to_json_dict(), QLoRAJobStatus)
        patch = merge_patch(before, after)
        if not patch:
            return
        if job.status is not None and differ_in_figures(job.status, status):
            left = self._written.get(key, 0.0) + self._progress_seconds - time.monotonic()
            if left > 0:
                self._wake_later(key, left)
                return
        body = {"metadata": {"resourceVersion": job.metadata.resource_version}, "status": patch}
        try:
            written = await self._patch(key, body)
        except ApiError as error:
            if error.status == 404:  # deleted meanwhile; the watch will say so
                return
            if error.status == 409:  # somebody changed the job: decide again on what it is now
                self._cache.take_job(await self._api.get(job_path(key)))
            raise
        self._written[key] = time.monotonic()
        self._cache.take_job(written)

    async def write_not_understood(self, key: Key, stored: Object, error: Exception) -> None:
        """Write that a job has a value that this operator does not know. Until it does, it leaves the job as it is."""
        status: Object = stored.get("status") or {}
        before = [c for c in status.get("conditions", ()) if c["type"] != ConditionType.DEGRADED]
        text = f"this version of the operator leaves the job as it is: {error}"[:LONGEST_ERROR]
        said = {(c["type"], c["status"], c.get("message")) for c in status.get("conditions", ())}
        if (ConditionType.DEGRADED, "True", text) in said:
            return
        degraded = {
            "type": ConditionType.DEGRADED,
            "status": "True",
            "reason": Reason.NOT_UNDERSTOOD,
            "message": text,
            "lastTransitionTime": self._api.clock.now().replace(microsecond=0).isoformat(),
            "observedGeneration": stored["metadata"].get("generation", 0),
        }
        change: Object = {"conditions": [*before, degraded]}
        if not status.get("attempts") and status.get("state") in (None, "Pending"):
            change |= {"state": "Pending", "reason": Reason.NOT_UNDERSTOOD}
        body = {"metadata": {"resourceVersion": stored["metadata"]["resourceVersion"]}, "status": change}
        self._cache.take_job(await self._patch(key, body))

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
            log.warning("%s: a part of status is refused: %s", "/".join(key), error)
            return await self._api.patch(path, {**body, "status": kept})
