"""One way to repeat what may go away by itself, for all stores and for the Hub."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, TypeVar

from qlora_storage.backend import Fault, FaultKind

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE_SECONDS = 180.0
"""Longest time for which a server may be unreachable. Restarts of MinIO and versitygw and failovers of Ceph's gateways
take less."""
FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 15.0
LEAST_TIMEOUTS = 3
"""Requests without an answer that are borne even where each takes longer than the patience: an upload over a slow line
gets smaller from one to the next, and what is under way of the one before is still on the line."""

T = TypeVar("T")
log = logging.getLogger(__name__)


class FaultError(Exception):
    """A call failed for good; ``fault`` is what its last error means."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        super().__init__(fault.message)


def call_patiently(
    call: Callable[[], T], fault_of: Callable[[Exception], Fault | None], doing: str, patience_seconds: float
) -> T:
    """Run ``call``, again while its fault may go away by itself: with a back-off, or when the server says.

    Args:
        call: does one thing once.
        fault_of: tells what an exception means; None for one that is none of the system's.
        doing: completes the sentence ``cannot … yet``.
        patience_seconds: how long to repeat, from the first fault on.

    Raises:
        FaultError: from the exception, where its fault is not transient or stays for too long.

    """
    give_up_at: float | None = None
    wait = FIRST_WAIT_SECONDS
    timeouts = 0
    while True:
        try:
            return call()
        except Exception as error:
            fault = fault_of(error)
            if fault is None:
                raise
            now = time.monotonic()
            give_up_at = give_up_at or now + patience_seconds
            pause = max(wait, fault.retry_after or 0)
            timeouts += fault.timed_out
            is_late = now + pause > give_up_at and not (fault.timed_out and timeouts < LEAST_TIMEOUTS)
            if fault.kind is not FaultKind.TRANSIENT or is_late:
                raise FaultError(fault) from error
        log.warning("cannot %s yet, next try in %.1f s: %s", doing, pause, fault.message)
        time.sleep(pause)
        wait = min(2 * wait, LONGEST_WAIT_SECONDS)
