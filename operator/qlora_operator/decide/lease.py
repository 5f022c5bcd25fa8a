"""Decide which of several replicas leads, by a Lease, as client-go's leader election does. Pure.

Times in a Lease are of other machines' clocks and are for people. A candidate measures by its own clock for how long it
has seen the Lease unchanged; the leader, since when it last asked for it and got it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from qlora_operator.decide.micro_time import micro_time

LEASE_SECONDS, RENEW_SECONDS, RETRY_SECONDS = 15, 10, 2
"""Until a Lease that nobody renews is free; until a leader that cannot renew it stops; between two tries."""


@dataclass(frozen=True)
class Lease:
    """A Lease of coordination.k8s.io."""

    version: str
    holder: str
    """Empty: it was given back."""
    acquired: str
    transitions: int


@dataclass(frozen=True)
class Sighting:
    """A Lease, and when this process first saw it so."""

    lease: Lease
    at: float
    """By a monotonic clock."""


def read_lease(body: Mapping[str, Any]) -> Lease:
    """Cut a Lease out of an API object."""
    spec = body.get("spec") or {}
    return Lease(
        version=body["metadata"]["resourceVersion"],
        holder=spec.get("holderIdentity") or "",
        acquired=spec.get("acquireTime") or "",
        transitions=spec.get("leaseTransitions") or 0,
    )


def sighting_of(before: Sighting | None, lease: Lease, now: float) -> Sighting:
    """Return when a Lease was first seen as it is."""
    return before if before and before.lease.version == lease.version else Sighting(lease, now)


def is_free(seen: Sighting, candidate: str, now: float) -> bool:
    """Return whether a candidate may take a Lease."""
    return seen.lease.holder in ("", candidate) or now - seen.at >= LEASE_SECONDS


def claim(candidate: str, before: Lease | None, now: datetime) -> dict[str, Any]:
    """Return the spec of a Lease that a candidate takes or renews."""
    time = micro_time(now)
    stays = before is not None and before.holder == candidate
    return {
        "holderIdentity": candidate,
        "leaseDurationSeconds": LEASE_SECONDS,
        "acquireTime": before.acquired if before and stays and before.acquired else time,
        "renewTime": time,
        "leaseTransitions": before.transitions + (not stays) if before else 0,
    }
