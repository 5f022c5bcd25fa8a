"""A background task that ends is started again, and only whoever started it ends it."""

from __future__ import annotations

import asyncio

import pytest

from qlora_operator import supervisor
from qlora_operator.supervisor import BackgroundTask, backoff, supervise


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(supervisor, "FIRST_RETRY_SECONDS", 0.0)


async def _raise(error: BaseException) -> None:
    raise error


async def _cancelled_by_another() -> None:
    waits = asyncio.ensure_future(asyncio.sleep(60))
    waits.cancel()
    await waits


ENDS = {
    "an-error": lambda: _raise(ValueError("one job's")),
    "a-group-of-errors": lambda: _raise(ExceptionGroup("two", [ValueError("one"), KeyError("another")])),
    "out-of-depth": lambda: _raise(RecursionError()),
    "out-of-memory": lambda: _raise(MemoryError()),
    "its-own-end": lambda: asyncio.sleep(0),
    "what-it-waits-for-is-cancelled": _cancelled_by_another,
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS.keys())
def test_however_a_task_ends_it_is_counted_and_started_again(end):
    async def both():
        runs, works, failed = 0, asyncio.Event(), []

        async def run():
            nonlocal runs
            runs += 1
            if runs <= 3:
                await end()
                return
            works.set()
            await asyncio.Event().wait()

        task = asyncio.create_task(supervise(BackgroundTask("poller", run), failed.append))
        await asyncio.wait_for(works.wait(), 30)
        assert failed == ["poller"] * 3
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    asyncio.run(both())


def test_a_task_that_fails_without_end_leaves_the_others_their_time():
    async def both():
        failed, beats, enough = [], 0, asyncio.Event()

        async def beat():
            nonlocal beats
            while True:
                await asyncio.sleep(0)
                beats += 1
                if beats >= 1000 and failed:
                    enough.set()

        tasks = [
            asyncio.create_task(supervise(BackgroundTask("bad", lambda: _raise(OSError())), failed.append)),
            asyncio.create_task(supervise(BackgroundTask("good", beat), failed.append)),
        ]
        await asyncio.wait_for(enough.wait(), 30)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert set(failed) == {"bad"}

    asyncio.run(both())


@pytest.mark.parametrize(("failures", "seconds"), [(1, 0.5), (2, 1), (5, 8), (10, 30), (5_000, 30)])
def test_the_wait_after_a_failure_grows_up_to_a_limit_however_many_there_are(failures, seconds):
    assert backoff(failures, 0.5, 30) == seconds
