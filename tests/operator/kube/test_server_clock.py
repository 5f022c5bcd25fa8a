"""The API server's time, from the headers of its answers."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from qlora_operator.kube.server_clock import ServerClock

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def test_the_time_is_the_servers_and_goes_on_between_answers():
    elapsed = [100.0]
    clock = ServerClock(lambda: elapsed[0])
    clock.note("Thu, 01 Jan 2026 12:00:00 GMT")
    elapsed[0] += 7.5
    assert clock.now() == NOON + timedelta(seconds=7.5)
    clock.note("Thu, 01 Jan 2026 12:00:07 GMT")  # cut to seconds: it is no step back
    assert clock.now() == NOON + timedelta(seconds=7.5)
    clock.note("Thu, 01 Jan 2026 11:50:00 GMT")  # the server's clock was set
    assert clock.now() == NOON - timedelta(minutes=10)


def test_what_is_no_date_is_left_out():
    clock = ServerClock(lambda: 0.0)
    clock.note("Thu, 01 Jan 2026 12:00:00 GMT")
    for date in (None, "", "yesterday"):
        clock.note(date)
    assert clock.now() == NOON
