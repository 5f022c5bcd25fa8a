"""Create and change the QLoRAJobs of trials. What the API server answers goes into the cache at once."""

from __future__ import annotations

from collections.abc import Callable

from qlora_operator.act.object_paths import job_path, jobs_path
from qlora_operator.decide.sweeps.sweep_plan import SweepActions, TrialPatch
from qlora_operator.kube.client import Api, ApiError, Object
from qlora_operator.state.cache import Key, ObjectCache
from qlora_operator.state.ownership import is_same_object


class NotATrialError(ApiError):
    """Another object has a trial's name."""

    def __init__(self, name: str) -> None:
        super().__init__(
            409,
            "NotATrial",
            f'a QLoRAJob named "{name}" is there that is not a trial of this sweep; it is waited for until it is gone: '
            "delete it, or give the sweep another name",
        )


class TrialWriter:
    """Carries out what was decided; a second time changes nothing.

    Args:
        jobs: all QLoRAJobs.
        api: the operator's calls.
        wake_job: told the key of each QLoRAJob that was created or changed.

    """

    def __init__(self, jobs: ObjectCache, api: Api, wake_job: Callable[[Key], None]) -> None:
        self._jobs, self._api, self._wake_job = jobs, api, wake_job

    def _take(self, body: Object) -> None:
        """Take a QLoRAJob in and have it decided on: what its watch says later is no news then."""
        if key := self._jobs.take_job(body):
            self._wake_job(key)

    async def do(self, key: Key, actions: SweepActions) -> None:
        """Change and create trials, in this order.

        Raises:
            ApiError: one was refused; those after it are not changed or created.

        """
        for patch in actions.patch:
            await self._change(key, patch)
        for body in actions.create:
            await self._create(key, body)

    async def _change(self, key: Key, patch: TrialPatch) -> None:
        path = job_path((key[0], patch.name))
        try:
            self._take(await self._api.patch(path, patch.body))
        except ApiError as error:
            if error.status == 409:  # its status was written meanwhile: decide again on what it is now
                self._take(await self._api.get(path))
            raise

    async def _create(self, key: Key, body: Object) -> None:
        try:
            made = await self._api.create(jobs_path(key[0]), body)
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise
            made = await self._existing(key, body)
        self._take(made)

    async def _existing(self, key: Key, body: Object) -> Object:
        """Return the QLoRAJob under a trial's name, if this sweep controls it."""
        name = body["metadata"]["name"]
        there = await self._api.get(job_path((key[0], name)))
        if not is_same_object(body, there):
            raise NotATrialError(name)
        return there
