"""The queue of keys: one worker a key, nothing lost, later and later after errors."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import pytest

from qlora_operator.act import work_queue
from qlora_operator.act.work_queue import WORKERS, WorkQueue

LIMIT_SECONDS = 60


class NoMetrics:
    def waited(self, seconds: float) -> None: ...

    def reconciled(self, seconds: float) -> None: ...


class AskedToWaitError(Exception):
    """An error that asks not to be tried again for a while."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch):
    monkeypatch.setattr(work_queue, "FIRST_RETRY_SECONDS", 0.01)


def run(scenario):
    """Run a scenario on a queue of its own; return the errors that it told of."""
    errors = []

    async def main():
        queue = WorkQueue(NoMetrics(), lambda error: getattr(error, "seconds", 0.0), lambda *told: errors.append(told))
        async with asyncio.timeout(LIMIT_SECONDS):
            await scenario(queue)

    asyncio.run(main())
    return errors


async def working(queue, handle, until):
    """Have the queue work until an event is set."""
    work = asyncio.create_task(queue.run(handle))
    await until.wait()
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)


def test_a_key_that_is_added_often_is_handled_once():
    handled = []

    async def scenario(queue):
        done = asyncio.Event()

        async def handle(key):
            handled.append(key)
            if key == "last":
                done.set()

        for key in ("a", "a", "b", "a", "last"):
            queue.add(key)
        await working(queue, handle, done)

    run(scenario)
    assert handled == ["a", "b", "last"]


def test_a_key_that_is_added_while_it_is_handled_is_handled_once_more_and_never_twice_at_once():
    active, most, handled = Counter(), Counter(), Counter()

    async def scenario(queue):
        done = asyncio.Event()

        async def handle(key):
            active[key] += 1
            most[key] = max(most[key], active[key])
            handled[key] += 1
            if handled[key] == 1:
                for _ in range(3):
                    queue.add(key)
            for _ in range(WORKERS):
                await asyncio.sleep(0)  # other workers would take it now
            active[key] -= 1
            if all(handled[each] == 2 for each in "abc"):
                done.set()

        for key in "abc":
            queue.add(key)
        await working(queue, handle, done)

    run(scenario)
    assert most == {"a": 1, "b": 1, "c": 1}
    assert handled == {"a": 2, "b": 2, "c": 2}


def test_a_key_that_fails_is_handled_again_later_and_later_and_the_others_go_on():
    handled = Counter()

    async def scenario(queue):
        done, other = asyncio.Event(), asyncio.Event()

        async def handle(key):
            handled[key] += 1
            if key == "good":
                other.set()
            elif handled[key] <= 3:
                assert queue.failures(key) == handled[key] - 1
                raise ValueError(key)
            else:
                await other.wait()
                done.set()

        queue.add("bad")
        queue.add("good")
        await working(queue, handle, done)
        assert queue.failures("bad") == 0

    errors = run(scenario)
    assert [(key, str(error), wait) for key, error, wait in errors] == [("bad", "bad", 0.01 * 2**n) for n in range(3)]


def test_a_key_whose_error_asks_to_wait_is_not_handled_before_whoever_adds_it():
    times = []

    async def scenario(queue):
        done = asyncio.Event()

        async def handle(key):
            times.append(time.monotonic())
            if len(times) == 1:
                asyncio.get_running_loop().call_later(0.02, queue.add, key)
                raise AskedToWaitError(0.3)
            done.set()

        queue.add("key")
        await working(queue, handle, done)

    ((_, _, wait),) = run(scenario)
    assert wait == 0.3
    assert times[1] - times[0] >= 0.3


def test_of_several_timers_the_earliest_counts():
    handled = []

    async def scenario(queue):
        done = asyncio.Event()

        async def handle(key):
            handled.append(key)
            done.set()

        queue.add_after("key", 1000)
        queue.add_after("key", 0.01)
        queue.add_after("key", 2000)
        await working(queue, handle, done)

    run(scenario)
    assert handled == ["key"]


def test_a_key_whose_handling_is_cancelled_is_taken_up_by_the_next_run():
    handled = []

    async def scenario(queue):
        began, done = asyncio.Event(), asyncio.Event()

        async def hang(key):
            began.set()
            await asyncio.Event().wait()

        async def handle(key):
            handled.append(key)
            done.set()

        queue.add("key")
        await working(queue, hang, began)
        await working(queue, handle, done)

    run(scenario)
    assert handled == ["key"]
