"""Several replicas of the operator: one operates, another takes over, and nothing is done twice."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from cluster.scenarios.forked_operator import ForkedOperator
from cluster.scenarios.jobs import create_job, in_state, qlora_job
from cluster.scenarios.proxy import Proxy, Refused
from cluster.scenarios.whole_life import (
    EXPECTED,
    NAMESPACE_LABELS,
    SETTINGS,
    WORKERS,
    contradictions,
    finish_life,
    outcome,
    pods_live,
    start_life,
)
from cluster.waits import eventually
from qlora_operator.decide.lease import LEASE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster.api import Object

LONG = 60
LEASE = "/apis/coordination.k8s.io/v1/namespaces/{}/leases/qlora"
EVER = 1_000_000


@dataclass(frozen=True)
class Replica:
    """An operator, and the proxy through which it reaches the API server."""

    operator: ForkedOperator
    proxy: Proxy

    def writes(self) -> list[str]:
        """All that it changed, but for the Lease."""
        return [f"{call.method} {call.resource}" for call in self.proxy.calls if call.resource != "leases"]


@pytest.fixture
def namespace(crd_cluster) -> Iterator[str]:
    """A namespace in which pods do what a whole life needs."""
    name = crd_cluster.create_namespace("life", NAMESPACE_LABELS)
    with pods_live(crd_cluster.api, name):
        yield name


@pytest.fixture
def replicas(crd_cluster, fork_server, namespace, tmp_path) -> Iterator[dict[str, Replica]]:
    """Two replicas by name, of which the one named leader leads."""
    with ExitStack() as stack:
        found: dict[str, Replica] = {}
        for name in ("leader", "standby"):
            proxy = stack.enter_context(Proxy(crd_cluster, tmp_path / f"{name}-proxy"))
            settings = {**SETTINGS, "namespaces": [namespace], "lease": f"{namespace}/qlora"}
            operator = ForkedOperator(fork_server, tmp_path / name, proxy.kubeconfig, **settings)
            stack.enter_context(operator)
            found[name] = Replica(operator, proxy)
            crd_cluster.api.wait_for(LEASE.format(namespace), bool, what="somebody leads")
        yield found


def holder(lease: Object) -> str:
    return lease["spec"]["holderIdentity"]


def transitions(lease: Object) -> int:
    return lease["spec"]["leaseTransitions"]


def test_the_other_replica_takes_over_from_a_leader_that_dies_at_work(crd_cluster, history, replicas, namespace):
    path = start_life(crd_cluster.api, namespace)
    assert replicas["standby"].writes() == []
    leading = {name: replica.operator.metrics()["qlora_operator_leading"] for name, replica in replicas.items()}
    assert leading == {"leader": 1, "standby": 0}
    replicas["leader"].operator.kill()
    finish_life(crd_cluster.api, namespace, path)
    assert outcome(history, namespace) == EXPECTED
    assert contradictions(history, namespace) == []
    assert transitions(crd_cluster.api.get(LEASE.format(namespace))) == 1
    assert replicas["standby"].writes()


def test_a_leader_that_cannot_renew_its_lease_ends_before_another_leads(crd_cluster, history, replicas, namespace):
    leader, standby = replicas["leader"], replicas["standby"]
    path = start_life(crd_cluster.api, namespace)
    leader.proxy.when(lambda call: call.resource == "leases", Refused(503), EVER)
    renewed = max(call.at for call in leader.proxy.calls if call.resource == "leases")
    assert eventually(lambda: not leader.operator.running, LONG), "the leader ends"
    assert "LeadershipLost" in leader.operator.log.read_text()
    finish_life(crd_cluster.api, namespace, path)
    last = max(call.at for call in leader.proxy.calls if call.resource != "leases")
    first = min(call.at for call in standby.proxy.calls if call.resource != "leases")
    assert last < renewed + LEASE_SECONDS
    assert last < first
    assert outcome(history, namespace) == EXPECTED
    assert contradictions(history, namespace) == []


def test_a_leader_that_is_told_to_stop_gives_its_lease_back(crd_cluster, replicas, namespace):
    lease = crd_cluster.api.get(LEASE.format(namespace))
    replicas["leader"].operator.terminate()
    taken = crd_cluster.api.wait_for(LEASE.format(namespace), lambda found: transitions(found) == 1, seconds=LONG)
    assert holder(taken) not in ("", holder(lease))
    path = create_job(crd_cluster.api, qlora_job(namespace=namespace, workers=WORKERS))
    crd_cluster.api.wait_for(path, in_state("Running"), seconds=LONG)
    assert replicas["leader"].writes() == []


def test_one_replica_without_a_lease_asks_for_none(crd_cluster, fork_server, namespace, tmp_path):
    with (
        Proxy(crd_cluster, tmp_path / "proxy") as proxy,
        ForkedOperator(fork_server, tmp_path / "one", proxy.kubeconfig, namespaces=[namespace], **SETTINGS),
    ):
        finish_life(crd_cluster.api, namespace, start_life(crd_cluster.api, namespace))
        assert not [call for call in (*proxy.calls, *proxy.reads) if call.resource == "leases"]
