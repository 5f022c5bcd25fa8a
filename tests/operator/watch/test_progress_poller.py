"""Answers of a pod to progress requests: nothing of one reaches further than its own job."""

from __future__ import annotations

import asyncio
import os
from datetime import timedelta

import pytest

from cluster.waits import eventually
from operator_builders import NOW, pod
from qlora_operator.kube.bounded_reads import TooLargeError
from qlora_operator.state.cache import ObjectCache
from qlora_operator.state.reports import ReportError
from qlora_operator.watch.progress_poller import ProgressPoller, ask_progress, progress_session
from services.hostile_rank import REPORT, HostileRank, answers, http, report

STAGES = [("reading", 7.2), ("reading", 8.9), ("quantizing", 0.1)]
ADDRESS = f"127.{os.getpid() % 200 + 10}.9.5"


def asked(*said: bytes, address: str = ADDRESS, times: int = 1):
    """Ask a rank that answers so; return reports and errors."""

    async def ask():
        found = []
        async with progress_session() as session:
            for _ in range(times):
                try:
                    found.append(await ask_progress(session, address, rank.port))
                except Exception as error:  # noqa: BLE001 looked at by the test
                    found.append(error)
        return found

    with HostileRank(ADDRESS, 0, said) as rank:
        return asyncio.run(ask())


def test_an_honest_report_is_read():
    (found,) = asked(report())
    assert (found.step, found.loss, found.memory.measured) == (3, "1.25", {"peak": 1100})


@pytest.mark.parametrize("place", ["http://./", "http://{}/", "/progress", "http://169.254.169.254/"])
def test_no_redirect_is_followed(place):
    with HostileRank(ADDRESS, 0, [report()]) as elsewhere:
        target = place.format(f"{ADDRESS}:{elsewhere.port}")
        (found,) = asked(http(b"", f"Location: {target}", status="302 Found"))
    assert isinstance(found, ReportError)
    assert elsewhere.asked == 0


@pytest.mark.parametrize(
    "address", ["169.254.169.254", "::ffff:169.254.169.254", "fe80::1", "0.0.0.0", "224.0.0.1", "metadata", ""]
)
def test_nothing_but_the_address_of_a_pod_is_connected_to(address):
    (found,) = asked(report(), address=address)
    assert isinstance(found, ReportError)


@pytest.mark.parametrize("first", ["::1", "127.0.0.1"], ids=["ipv6-first", "ipv4-first"])
def test_a_pod_that_listens_on_its_other_family_alone_is_asked_there(first):
    """A trainer of IPv4 alone in a cluster whose first family is IPv6, and an operator without a way to the first."""

    async def ask(port):
        poller = ProgressPoller(ObjectCache(), {}, lambda _: None, 1, lambda: None, lambda: NOW, port)
        async with progress_session() as session:
            return await poller._ask_either(session, pod(ip=first, other_ip=ADDRESS))

    with HostileRank(ADDRESS, 0, [report()]) as rank:
        assert asyncio.run(ask(rank.port)).step == 3


def test_a_report_that_comes_in_pieces_is_read_whole():
    body = http(b"")[:-2].replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + b"\r\n"
    text = report().partition(b"\r\n\r\n")[2]
    pieces = b"".join(b"1\r\n" + text[i : i + 1] + b"\r\n" for i in range(len(text)))
    (found,) = asked(body + pieces + b"0\r\n\r\n")
    assert found.step == 3


def test_an_answer_of_more_than_64_kib_is_not_read():
    (found,) = asked(http(b" " * 2**20))
    assert isinstance(found, TooLargeError)


def test_each_of_more_than_200_hostile_answers_is_an_error_or_a_report_that_status_takes():
    said = answers("127.0.0.1:1")
    for found in asked(*said, times=len(said)):
        if not isinstance(found, Exception):
            assert {*found.memory.measured, *found.memory.predicted} <= {"peak"}
            assert 0 <= found.first_step <= 2**53
            assert found.loss is None or float(found.loss) < 10


def test_what_one_pod_answers_ends_no_round_and_the_others_are_heard():
    hostile, honest = ("team", "hostile"), ("team", "honest")
    rejected, woken = [], []

    async def poll(polled, said, rounds):
        poller = ProgressPoller(cache, polled, woken.append, 0.001, lambda: rejected.append(1), lambda: NOW, said.port)
        running = asyncio.create_task(poller.run())
        await asyncio.to_thread(eventually, lambda: said.asked >= rounds or running.done(), 60)
        assert not running.done()
        running.cancel()

    cache = ObjectCache()
    other = f"{ADDRESS[:-1]}6"
    with HostileRank(ADDRESS, 0, answers("127.0.0.1:1")[:60]) as bad, HostileRank(other, bad.port, [report()]) as good:
        asyncio.run(poll({hostile: pod(ip=ADDRESS), honest: pod(uid="other", ip=other)}, bad, 60))
        assert good.asked > bad.asked
    assert cache[honest].report.step == REPORT["step"]
    assert honest in woken
    assert rejected


def test_a_job_is_woken_at_the_beginning_of_each_stage_and_knows_when_that_was():
    key, woken, starts = ("team", "job"), [], []
    said = [report(section="Load", stage=name, stageSeconds=spent) for name, spent in STAGES]

    async def poll(rank):
        poller = ProgressPoller(cache, {key: pod(ip=ADDRESS)}, woken.append, 1, lambda: None, clock, rank.port)
        async with progress_session() as session:
            for _ in said:
                await poller._ask_all(session, poller._polled)
                starts.append(cache[key].stage_start)

    def clock():
        return NOW + timedelta(seconds=len(starts))

    cache = ObjectCache()
    with HostileRank(ADDRESS, 0, said) as rank:
        asyncio.run(poll(rank))
    began = NOW - timedelta(seconds=7)
    assert starts == [began, began, NOW + timedelta(seconds=2)]
    assert woken == [key, key]
