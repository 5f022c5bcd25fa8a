"""The operator dies, or loses an answer, at every call of a sweep's life that changes something; it ends the same."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest

from cluster.scenarios.forked_operator import ForkedOperator
from cluster.scenarios.operator import READY_SECONDS
from cluster.scenarios.proxy import AnswerLost, Killed, Proxy
from cluster.scenarios.sweeps import EXPECTED, LIFE_LABELS, live_sweep, sweep_moment, sweep_outcome, trials_live

LIFE = (
    "POST qlorajobs search-0",
    "PATCH qlorasweeps/status Searching",
    "POST events Started",
    "POST qlorajobs search-1",
    "PATCH qlorajobs search-1",
    "PATCH qlorajobs search-1",
    "PATCH qlorasweeps/status Suspending",
    "PATCH qlorasweeps/status Suspended",
    "POST events Suspended",
    "PATCH qlorajobs search-1",
    "PATCH qlorasweeps/status Searching",
    "POST events Resumed",
    "PATCH qlorasweeps/status Completed",
    "POST events Completed",
    "DELETE qlorasweeps search",
)
"""Every call of a life without mishaps that is for the sweep: the trials' own are in those of jobs."""
MISHAPS = ("killed-before", "killed-after", "answer-lost")
MOST_ERRORS = 6


@pytest.fixture(scope="session")
def scripted(crd_cluster):
    """The cluster, on which pods play the trials of this life."""
    with trials_live(crd_cluster.api, crd_cluster.create_namespace("setup", LIFE_LABELS)):
        yield crd_cluster


@pytest.fixture
def live_through(scripted, fork_server, history, tmp_path):
    """Play a whole life with a mishap at one place of it; returns its moments."""

    def play(mishap="", place=-1):
        folder, namespace, risen = tmp_path / mishap, scripted.create_namespace("sweep", LIFE_LABELS), Event()
        seen = Counter()

        def is_the_one(call):
            is_this = bool(call.number) and sweep_moment(call) == LIFE[place]
            seen.update([is_this])
            return is_this and seen[True] == LIFE[:place].count(LIFE[place]) + 1

        with (
            Proxy(scripted, folder) as proxy,
            ForkedOperator(fork_server, folder, proxy.kubeconfig, namespaces=[namespace]) as operator,
        ):

            def die():
                operator.kill()
                operator.spawn()
                risen.set()

            if mishap:
                faults = {"killed-before": Killed(die, after=False), "killed-after": Killed(die, after=True)}
                proxy.when(is_the_one, faults.get(mishap, AnswerLost()))
            live_sweep(scripted.api, namespace)
            assert proxy.pending_faults == 0, f"there was no {LIFE[place]}"
            assert not mishap.startswith("killed") or risen.wait(READY_SECONDS)
            failed = operator.metric_sum("qlora_operator_reconcile_errors_total")
            moments = [text for call in proxy.calls if call.number and (text := sweep_moment(call))]
        where = f"{mishap} {LIFE[place]}: {moments}"
        assert sweep_outcome(history, namespace) == EXPECTED, where
        assert failed <= MOST_ERRORS, where
        return moments

    return play


def test_a_life_without_mishaps_makes_these_calls_and_no_others(live_through):
    assert live_through() == list(LIFE)


@pytest.mark.parametrize("place", range(len(LIFE)), ids=lambda place: f"{place}-{LIFE[place].replace(' ', '-')}")
def test_a_sweep_ends_the_same_whatever_happens_to_the_operator_at(place, live_through):
    with ThreadPoolExecutor(len(MISHAPS)) as threads:
        lives = [threads.submit(live_through, mishap, place) for mishap in MISHAPS]
    errors = [error for each in lives if (error := each.exception())]
    if errors:
        raise ExceptionGroup(LIFE[place], errors)
