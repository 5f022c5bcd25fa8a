"""A Lease is taken by one candidate at a time, and names it."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from qlora_operator.decide.lease import (
    LEASE_SECONDS,
    RENEW_SECONDS,
    RETRY_SECONDS,
    Lease,
    Sighting,
    claim,
    is_free,
    read_lease,
    sighting_of,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
HELD = Lease("7", "other", "2025-12-31T00:00:00.000000Z", 3)


def body(version: str = "7", **spec: object) -> dict:
    return {"metadata": {"resourceVersion": version}, "spec": spec}


@pytest.mark.parametrize(
    ("holder", "unchanged_seconds", "free"),
    [
        pytest.param("other", LEASE_SECONDS - 0.1, False, id="held"),
        pytest.param("other", LEASE_SECONDS, True, id="not-renewed"),
        pytest.param("", 0, True, id="given-back"),
        pytest.param("me", 0, True, id="own"),
    ],
)
def test_a_lease_is_free_when_it_was_given_back_or_not_renewed(holder, unchanged_seconds, free):
    lease = Lease("7", holder, "", 0)
    assert is_free(Sighting(lease, 100), "me", 100 + unchanged_seconds) == free


def test_what_counts_is_how_long_it_was_seen_unchanged_and_not_what_it_says():
    first = sighting_of(None, read_lease(body("7", holderIdentity="other", renewTime="1970-01-01T00:00:00Z")), 100)
    same = sighting_of(first, read_lease(body("7", holderIdentity="other", renewTime="1970-01-01T00:00:00Z")), 110)
    renewed = sighting_of(same, read_lease(body("8", holderIdentity="other", renewTime="1970-01-01T00:00:00Z")), 110)
    assert (first.at, same.at, renewed.at) == (100, 100, 110)


def test_a_leader_stops_before_another_may_lead():
    assert RETRY_SECONDS < RENEW_SECONDS < LEASE_SECONDS


def test_a_new_holder_is_a_transition():
    spec = claim("me", HELD, NOW)
    assert (spec["holderIdentity"], spec["leaseTransitions"]) == ("me", 4)
    assert spec["acquireTime"] == spec["renewTime"] == "2026-01-01T00:00:00.000000Z"


def test_a_renewal_keeps_the_time_since_when_it_is_held():
    spec = claim("other", HELD, NOW)
    assert (spec["acquireTime"], spec["leaseTransitions"]) == (HELD.acquired, 3)
    assert spec["renewTime"] == "2026-01-01T00:00:00.000000Z"


def test_an_empty_lease_can_be_read():
    assert read_lease({"metadata": {"resourceVersion": "1"}}) == Lease("1", "", "", 0)
