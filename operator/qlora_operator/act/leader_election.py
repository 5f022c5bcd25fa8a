"""Have one of several replicas operate: take a Lease, renew it, and stop in time when that fails."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress

from qlora_operator.decide.lease import (
    RENEW_SECONDS,
    RETRY_SECONDS,
    Lease,
    Sighting,
    claim,
    is_free,
    read_lease,
    sighting_of,
)
from qlora_operator.kube.client import TRANSIENT, Api, ApiError

log = logging.getLogger(__name__)

CALL_SECONDS = RENEW_SECONDS / 2
"""Timeout of one call, short enough that a renewal is tried more than once."""
GROUP = "coordination.k8s.io/v1"


class LeadershipLostError(Exception):
    """Another replica leads, or may lead soon."""


class LeaderElection:
    """One candidate.

    Args:
        api: for the Lease alone, so that no other call holds a renewal up.
        lease: ``namespace/name``.
        candidate: name of this process, of no other one.
        clock: in seconds, monotonic.

    """

    def __init__(self, api: Api, lease: str, candidate: str, clock: Callable[[], float] = time.monotonic) -> None:
        namespace, _, self._name = lease.partition("/")
        self._api, self._candidate, self._clock = api, candidate, clock
        self._collection = f"/apis/{GROUP}/namespaces/{namespace}/leases"
        self._seen: Sighting | None = None
        self._leads_until = -math.inf
        self._last_logged = ""

    @property
    def leads(self) -> bool:
        """Return whether this process may write: no other one can have the Lease yet."""
        return self._clock() < self._leads_until

    @property
    def holder(self) -> str:
        """Return who led when the Lease was last seen; empty: nobody."""
        return self._seen.lease.holder if self._seen else ""

    async def acquire(self) -> None:
        """Wait until this process leads."""
        while not await self._try():  # noqa: ASYNC110 nothing announces it
            await asyncio.sleep(RETRY_SECONDS)
        log.info("this process leads")

    async def renew(self) -> None:
        """Renew the Lease until cancelled.

        Raises:
            LeadershipLostError: it could not be renewed in time, or another process has it.

        """
        while True:
            await asyncio.sleep(RETRY_SECONDS)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._leads_until - self._clock()):
                    await self._try()
            if not self.leads:
                raise LeadershipLostError(f"Lease {self._name} could not be renewed; its holder is {self.holder}")

    async def release(self) -> None:
        """Give the Lease back, so that no other process waits for its end. Nothing may be written any more."""
        was_leading, self._leads_until = self.leads, -math.inf
        if was_leading and self._seen:
            try:
                await self._patch(self._seen.lease, {"holderIdentity": ""})
            except (ApiError, *TRANSIENT) as error:
                log.info("the Lease is not released, and will expire: %s", error)

    async def close(self) -> None:
        await self._api.close()

    async def _try(self) -> bool:
        """Take or renew the Lease if it may be had; return whether this process has it now."""
        asked = self._clock()
        try:
            taken = await self._take()
        except (ApiError, *TRANSIENT) as error:
            if isinstance(error, ApiError) and error.status == 409:
                self._seen = None  # it has changed: look at it first
            self._log_change(f"Lease {self._name} cannot be acquired: {error or type(error).__name__}")
            return False
        if taken:
            self._leads_until, self._last_logged = asked + RENEW_SECONDS, ""
        return taken

    async def _take(self) -> bool:
        if self._seen is None or self._seen.lease.holder != self._candidate:
            lease = await self._look()
            if lease is None:
                await self._create()
                return True
            self._seen = sighting_of(self._seen, lease, self._clock())
        lease = self._seen.lease
        if not is_free(self._seen, self._candidate, self._clock()):
            self._leads_until = -math.inf
            self._log_change(f"{lease.holder} leads; this process is on standby")
            return False
        await self._patch(lease, claim(self._candidate, lease, self._api.clock.now()))
        return True

    async def _look(self) -> Lease | None:
        try:
            async with asyncio.timeout(CALL_SECONDS):
                return read_lease(await self._api.get(f"{self._collection}/{self._name}"))
        except ApiError as error:
            if error.status != 404:
                raise
            return None

    async def _create(self) -> None:
        spec = claim(self._candidate, None, self._api.clock.now())
        body = {"apiVersion": GROUP, "kind": "Lease", "metadata": {"name": self._name}, "spec": spec}
        async with asyncio.timeout(CALL_SECONDS):
            self._note(await self._api.create(self._collection, body))

    async def _patch(self, lease: Lease, spec: dict[str, object]) -> None:
        """Change the Lease if it is still as it was seen."""
        body = {"metadata": {"resourceVersion": lease.version}, "spec": spec}
        async with asyncio.timeout(CALL_SECONDS):
            self._note(await self._api.patch(f"{self._collection}/{self._name}", body))

    def _note(self, answer: dict[str, object]) -> None:
        self._seen = Sighting(read_lease(answer), self._clock())

    def _log_change(self, text: str) -> None:
        """Log a text if it differs from the last one."""
        if text != self._last_logged:
            log.info("%s", text)
        self._last_logged = text
