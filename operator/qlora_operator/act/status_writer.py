"""Write status: the smallest patch, on the version that was decided on, and figures no more often than configured."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime

from pydantic import ValidationError

from qlora_api.errors import ManifestError
from qlora_api.job import QLoRAJob
from qlora_operator.act.children import job_path
from qlora_operator.act.merge_patch import merge_patch
from qlora_operator.decide.attempt_history import REPORTED_FIELDS, differ_in_figures, with_job_uids
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
        after = status.to_json_dict()
        patch = after if job.status is None else merge_patch(stored.get("status") or {}, after)
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

    async def refuse(self, key: Key, stored: Object, error: Exception) -> None:
        """Write into status that this operator does not understand a job that the API server accepted.

        Raises:
            RuntimeError: it is the status that is not understood, which says nothing against the job.

        """
        now = datetime.now(UTC).replace(microsecond=0).isoformat()
        text = str(error)[:LONGEST_ERROR]
        conditions = (stored.get("status") or {}).get("conditions", ())
        if any(c["type"] == "Failed" and c.get("message") == text for c in conditions):
            return
        if _is_valid({name: value for name, value in stored.items() if name != "status"}):
            # What a newer operator wrote is no reason to end a job: leave it alone until this one is newer, too.
            raise RuntimeError(f"status cannot be understood: {text}")
        failed = {
            "type": "Failed",
            "status": "True",
            "reason": "UserError",
            "message": text,
            "lastTransitionTime": now,
            "observedGeneration": stored["metadata"].get("generation", 0),
        }
        status = {"state": "Failed", "reason": "UserError", "completionTime": now, "conditions": [failed]}
        body = {"metadata": {"resourceVersion": stored["metadata"]["resourceVersion"]}, "status": status}
        self._cache.take_job(await self._api.patch(f"{job_path(key)}/status", body))

    async def _patch(self, key: Key, body: Object) -> Object:
        """Write status; without the figures that pods report, where the API server refuses it with them."""
        try:
            return await self._api.patch(f"{job_path(key)}/status", body)
        except ApiError as error:
            kept = {name: value for name, value in body["status"].items() if name not in REPORTED_FIELDS}
            if error.status != 422 or kept == body["status"]:
                raise
            log.warning("%s: status is refused with the figures of its pods: %s", "/".join(key), error)
            return await self._api.patch(f"{job_path(key)}/status", {**body, "status": kept})


def _is_valid(manifest: Object) -> bool:
    try:
        QLoRAJob.model_validate_json(json.dumps(manifest))
    except (ValidationError, ManifestError):
        return False
    return True
