"""The operator dies, or loses an answer, at every call of a job's life that changes something; the life ends the same.

Each test is one call; its three mishaps happen at once, in namespaces and to operators of their own.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING

import pytest

from cluster.scenarios.forked_operator import ForkedOperator
from cluster.scenarios.operator import READY_SECONDS
from cluster.scenarios.proxy import AnswerLost, Killed, Proxy
from cluster.scenarios.whole_life import (
    EXPECTED,
    NAMESPACE_LABELS,
    SETTINGS,
    contradictions,
    live,
    moment,
    outcome,
    pods_live,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from cluster.control_plane import ControlPlane
    from cluster.scenarios.forked_operator import ForkServerClient
    from cluster.scenarios.history import History
    from cluster.scenarios.proxy import Call, Fault

LIFE = (
    "POST secrets qlora-key-UID",
    "POST jobs job-prepare",
    "PATCH qlorajobs/status Preparing",
    "POST services qlora-trainers",
    "POST networkpolicies qlora-workers-UID",
    "POST jobs job-1",
    "PATCH qlorajobs/status Starting attempt 1",
    "POST events Prepared",
    "POST jobs job-2",
    "PATCH qlorajobs/status attempt 2",
    "POST events OutOfDeviceMemory",
    "PATCH qlorajobs/status Training attempt 2",
    "POST events Recovered",
    "DELETE jobs job-2",
    "PATCH qlorajobs/status Suspending",
    "PATCH qlorajobs/status Suspended attempt 2",
    "POST events Suspended",
    "POST jobs job-3",
    "PATCH qlorajobs/status Starting attempt 3",
    "PATCH qlorajobs/status Completed attempt 3",
    "POST events Completed",
    "DELETE qlorajobs job",
    "DELETE services qlora-trainers",
)
"""Every call of a life without mishaps that changes something."""
MISHAPS = ("killed-before", "killed-after", "answer-lost")
MOST_ERRORS = 5
"""Reconciles that may fail on account of one mishap: the one it befell, and what is conflicting for a moment."""


@dataclass(frozen=True)
class CrashSetup:
    """Setting that all lives share."""

    cluster: ControlPlane
    fork_server: ForkServerClient
    history: History


@pytest.fixture(scope="session")
def setup(crd_cluster, fork_server, history) -> Iterator[CrashSetup]:
    namespace = crd_cluster.create_namespace("setup", NAMESPACE_LABELS)
    with pods_live(crd_cluster.api, namespace):
        yield CrashSetup(crd_cluster, fork_server, history)


def is_nth(moments: tuple[str, ...], place: int) -> Callable[[Call], bool]:
    """Return whether a call is the one at a place of a life: of several alike, the one with as many before it."""
    before = moments[:place].count(moments[place])
    seen = Counter()

    def matches(call: Call) -> bool:
        is_this = bool(call.number) and moment(call) == moments[place]
        seen.update([is_this])
        return is_this and seen[True] == before + 1

    return matches


def live_through(setup: CrashSetup, folder: Path, mishap: str = "", place: int = -1) -> list[str]:
    """A whole life with a mishap at one place of it; its moments."""
    namespace = setup.cluster.create_namespace("life", NAMESPACE_LABELS)
    risen = Event()
    with (
        Proxy(setup.cluster, folder) as proxy,
        ForkedOperator(setup.fork_server, folder, proxy.kubeconfig, namespaces=[namespace], **SETTINGS) as operator,
    ):

        def die() -> None:
            operator.kill()
            operator.spawn()
            risen.set()

        faults: dict[str, Fault] = {
            "killed-before": Killed(die, after=False),
            "killed-after": Killed(die, after=True),
            "answer-lost": AnswerLost(),
        }
        if mishap:
            proxy.when(is_nth(LIFE, place), faults[mishap])
        live(setup.cluster.api, namespace)
        assert proxy.pending_faults == 0, f"there was no {LIFE[place]}"
        # the last call of a life is its end, here before the operator's death is over
        assert not mishap.startswith("killed") or risen.wait(READY_SECONDS)
        failed = {n: v for n, v in operator.metrics().items() if n.startswith("qlora_operator_reconcile_errors_total")}
        moments = [text for call in proxy.calls if (text := moment(call))]
    where = f"{mishap} {LIFE[place]}: {moments}"
    assert outcome(setup.history, namespace) == EXPECTED, where
    assert contradictions(setup.history, namespace) == [], where
    assert sum(failed.values()) <= MOST_ERRORS, f"{where}: {failed}"
    return moments


def test_a_life_without_mishaps_makes_these_calls_and_no_others(setup, tmp_path):
    assert live_through(setup, tmp_path) == list(LIFE)


@pytest.mark.parametrize("place", range(len(LIFE)), ids=lambda place: f"{place}-{LIFE[place].replace(' ', '-')}")
def test_a_life_ends_the_same_whatever_happens_to_the_operator_at(place, setup, tmp_path):
    with ThreadPoolExecutor(len(MISHAPS)) as threads:
        lives = [threads.submit(live_through, setup, tmp_path / mishap, mishap, place) for mishap in MISHAPS]
    errors = [error for life in lives if (error := life.exception())]
    if errors:
        raise ExceptionGroup(LIFE[place], errors)


def test_two_operators_at_once_do_no_harm(setup, tmp_path):
    namespace = setup.cluster.create_namespace("life", NAMESPACE_LABELS)
    with ExitStack() as both:
        for name in ("one", "other"):
            folder, kubeconfig = tmp_path / name, setup.cluster.kubeconfig
            operator = ForkedOperator(setup.fork_server, folder, kubeconfig, namespaces=[namespace], **SETTINGS)
            both.enter_context(operator)
        live(setup.cluster.api, namespace)
    assert outcome(setup.history, namespace) == EXPECTED
    assert contradictions(setup.history, namespace) == []
