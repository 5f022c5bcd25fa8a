"""QLoRAJobs in the queues of the real Kueue."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from cluster.scenarios.forked_operator import ForkedOperator
from cluster.scenarios.jobs import condition, create_job, in_state, last_attempt, qlora_job
from testing.timeouts import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster.api import ClusterApi, Object

VERSION = "kueue.x-k8s.io/v1beta2"
PODS, JOBS = "/api/v1/namespaces/{}/pods", "/apis/batch/v1/namespaces/{}/jobs"
WORKLOADS = f"/apis/{VERSION}/namespaces/{{}}/workloads"
PLENTY = "1000"
RACK = "test.qlora.dev/rack"
JUDGED = ("AdmissionCheck", "ClusterQueue", "LocalQueue")
"""Kinds that have conditions as soon as Kueue knows an object; what is created before passes its webhooks unchanged."""


class Queues:
    """Flavors, ClusterQueues and LocalQueues of one test; they go with it."""

    def __init__(self, api: ClusterApi, namespace: str, owned: ExitStack) -> None:
        self.api, self.namespace, self._owned = api, namespace, owned

    def add(self, kind: str, name: str, spec: Object, namespace: str = "") -> None:
        body = {"apiVersion": VERSION, "kind": kind, "metadata": {"name": name}, "spec": spec}
        self.api.create(body, namespace)
        path = self.api.path_of(body, namespace)
        self._owned.callback(self._remove, path)
        if kind in JUDGED:
            self.api.wait_for(path, lambda found: found.get("status", {}).get("conditions"), seconds=PATIENCE_SECONDS)

    def flavor(self, name: str, **spec: Any) -> str:
        self.add("ResourceFlavor", f"{self.namespace}-{name}", spec)
        return f"{self.namespace}-{name}"

    def queue(self, name: str, gpus: dict[str, int], **spec: Any) -> None:
        """A ClusterQueue with so many GPUs of each flavor, plenty of all else, and a LocalQueue of the same name."""
        flavors = [{"name": flavor, "resources": resources(count)} for flavor, count in gpus.items()]
        covered = [r["name"] for r in resources(0)]
        groups = [{"coveredResources": covered, "flavors": flavors}]
        cluster_queue = f"{self.namespace}-{name}"
        self.add("ClusterQueue", cluster_queue, {"namespaceSelector": {}, "resourceGroups": groups, **spec})
        self.add("LocalQueue", name, {"clusterQueue": cluster_queue}, self.namespace)

    def priorities(self) -> tuple[str, str]:
        """Two WorkloadPriorityClasses, the lower one first."""
        low, high = f"{self.namespace}-low", f"{self.namespace}-high"
        for name, value in ((low, 1), (high, 100)):
            body = {"apiVersion": VERSION, "kind": "WorkloadPriorityClass", "metadata": {"name": name}, "value": value}
            self.api.create(body)
            self._owned.callback(self._remove, self.api.path_of(body))
        return low, high

    def _remove(self, path: str) -> None:
        self.api.delete(path)


def resources(gpus: int) -> list[Object]:
    amounts = {"cpu": PLENTY, "memory": "100Ti", "ephemeral-storage": "100Ti", "nvidia.com/gpu": str(gpus)}
    return [{"name": name, "nominalQuota": amount} for name, amount in amounts.items()]


@pytest.fixture
def queues(kueue_cluster, team) -> Iterator[Queues]:
    with ExitStack() as owned:
        yield Queues(kueue_cluster.api, team, owned)


@pytest.fixture
def api(kueue_cluster) -> ClusterApi:
    return kueue_cluster.api


def job(
    namespace: str, name: str, queue: str | None = "main", workers: int = 1, priority: str = "", **groups: Any
) -> Object:
    """A job of whole nodes."""
    scheduling = ({"queue": queue} if queue else {}) | groups.pop("scheduling", {})
    parallelism = {"workers": workers, "gpusPerWorker": 8}
    manifest = qlora_job(name, namespace, parallelism=parallelism, scheduling=scheduling, **groups)
    if priority:
        manifest["metadata"]["labels"] = {"kueue.x-k8s.io/priority-class": priority}
    return manifest


def trainers(api: ClusterApi, namespace: str, name: str) -> list[Object]:
    return api.list(PODS.format(namespace), labelSelector=f"qlora.dev/job={name}")


def pools(api: ClusterApi, namespace: str, name: str, label: str = "pool") -> set[str]:
    """Values of a label of the nodes of a job's pods."""
    nodes = {pod["spec"]["nodeName"] for pod in trainers(api, namespace, name)}
    return {api.get(f"/api/v1/nodes/{node}")["metadata"]["labels"][label] for node in nodes}


def wait(api: ClusterApi, path: str, *state: str) -> Object:
    """Wait until a job is in a state. The garbage collector learns of new kinds by polling, every 30 s."""
    return api.wait_for(path, in_state(*state), seconds=PATIENCE_SECONDS)


def says(text: str) -> Any:
    """A condition for ``api.wait_for``: the message of Running, or before it of Prepared, has this text."""
    return lambda body: any(text in condition(body, kind).get("message", "") for kind in ("Running", "Prepared"))


def runs_on(prefix: str) -> Any:
    """A condition for ``api.wait_for``: the job's newest attempt trains on a node of this prefix."""

    def holds(body: Object) -> bool:
        return in_state("Running")(body) and last_attempt(body)["node"].startswith(prefix)

    return holds


# --------------------------------------------------------------------------------------------------------------- quota


def test_a_job_waits_for_quota_and_is_admitted_when_there_is_some(api, queues, team, operator):
    queues.queue("main", {queues.flavor("any"): 8})
    first = create_job(api, job(team, "first"))
    wait(api, first, "Running")
    second = create_job(api, job(team, "second"))
    queued = wait(api, second, "Pending", "Queued")
    assert 'waits for queue "main" to admit 1 pods' in condition(queued, "Running")["message"]
    assert trainers(api, team, "second") == []

    api.delete(first)
    running = wait(api, second, "Running")
    assert [attempt["number"] for attempt in running["status"]["attempts"]] == [1]


def test_a_job_that_is_suspended_while_it_is_queued_leaves_the_queue_and_comes_back(api, queues, team, operator):
    queues.queue("main", {queues.flavor("any"): 8})
    first, second = create_job(api, job(team, "first")), create_job(api, job(team, "second"))
    wait(api, first, "Running")
    wait(api, second, "Pending", "Queued")

    api.patch(second, {"spec": {"suspend": True}})
    wait(api, second, "Suspended")
    api.wait_gone(f"{JOBS.format(team)}/second-1")
    api.delete(first)
    nothing = "no workload is left"
    api.wait_for(WORKLOADS.format(team), lambda found: not found["items"], seconds=PATIENCE_SECONDS, what=nothing)
    assert api.get(second)["status"]["state"] == "Suspended"

    api.patch(second, {"spec": {"suspend": False}})
    wait(api, second, "Running")


# ---------------------------------------------------------------------------------------------- borrowing, preemption


def test_a_queue_that_takes_back_what_another_borrowed_sends_its_job_back_to_wait(api, queues, team, operator):
    flavor = queues.flavor("any")
    shared = {"cohortName": f"{team}-cohort"}
    queues.queue("a", {flavor: 8}, **shared)
    queues.queue("b", {flavor: 8}, **shared, preemption={"reclaimWithinCohort": "Any"})
    borrower = create_job(api, job(team, "borrower", "a", workers=2))
    wait(api, borrower, "Running")
    assert len(trainers(api, team, "borrower")) == 2

    owner = create_job(api, job(team, "owner", "b"))
    wait(api, owner, "Running")
    waiting = wait(api, borrower, "Pending", "Queued")
    assert waiting["status"].get("restarts", 0) == 0

    api.delete(owner)
    again = wait(api, borrower, "Running")
    assert again["status"].get("restarts", 0) == 0, "what a queue takes back is counted as no failure"


def test_a_job_of_a_higher_workload_priority_goes_before_one_of_a_lower(api, queues, team, operator):
    low, high = queues.priorities()
    queues.queue("main", {queues.flavor("any"): 8}, preemption={"withinClusterQueue": "LowerPriority"})
    patient = create_job(api, job(team, "patient", priority=low))
    wait(api, patient, "Running")
    urgent = create_job(api, job(team, "urgent", priority=high))
    wait(api, urgent, "Running")
    wait(api, patient, "Pending", "Queued")
    api.delete(urgent)
    wait(api, patient, "Running")


# --------------------------------------------------------------------------------------------------- flavors, topology


def test_a_job_that_is_evicted_from_one_flavor_goes_on_at_another_ones_nodes(api, queues, team, operator):
    spot = queues.flavor("spot", nodeLabels={"pool": "spot"})
    reserved = queues.flavor("reserved", nodeLabels={"pool": "reserved"})
    queues.queue("main", {spot: 8, reserved: 8})
    path = create_job(api, job(team, "moving"))
    wait(api, path, "Running")
    assert pools(api, team, "moving") == {"spot"}

    [workload] = api.list(WORKLOADS.format(team))
    name = f"{team}-main"
    queue = f"/apis/{VERSION}/clusterqueues/{name}"
    groups = api.get(queue)["spec"]["resourceGroups"]
    groups[0]["flavors"][0]["resources"] = resources(0)
    api.patch(queue, {"spec": {"resourceGroups": groups}})
    api.patch(api.path_of(workload), {"spec": {"active": False}})
    wait(api, path, "Pending", "Queued")
    api.patch(api.path_of(workload), {"spec": {"active": True}})
    moved = wait(api, path, "Running")
    assert pools(api, team, "moving") == {"reserved"}
    assert moved["status"].get("restarts", 0) == 0


def test_a_job_whose_flavor_another_one_takes_goes_on_at_another_flavors_nodes(api, queues, team, operator):
    low, high = queues.priorities()
    spot = queues.flavor("spot", nodeLabels={"pool": "spot"})
    reserved = queues.flavor("reserved", nodeLabels={"pool": "reserved"})
    queues.queue("main", {spot: 8, reserved: 8}, preemption={"withinClusterQueue": "LowerPriority"})
    path = create_job(api, job(team, "moving", priority=low))
    wait(api, path, "Running")
    assert pools(api, team, "moving") == {"spot"}

    urgent = create_job(api, job(team, "urgent", priority=high, scheduling={"nodeSelector": {"pool": "spot"}}))
    wait(api, urgent, "Running")
    assert pools(api, team, "urgent") == {"spot"}
    moved = api.wait_for(path, runs_on("rack-2"), seconds=PATIENCE_SECONDS)  # that of pool reserved
    assert moved["status"].get("restarts", 0) == 0, "what a queue takes back is counted as no failure"


def test_two_pods_of_a_job_are_placed_in_one_rack_by_its_profile(api, queues, team, operator):
    levels = [{"nodeLabel": RACK}, {"nodeLabel": "kubernetes.io/hostname"}]
    queues.add("Topology", f"{team}-racks", {"levels": levels})
    flavor = queues.flavor("racks", nodeLabels={"type": "kwok"}, topologyName=f"{team}-racks")
    queues.queue("main", {flavor: 32})
    path = create_job(api, job(team, "wide", workers=2, scheduling={"profile": "one-rack"}))
    wait(api, path, "Running")
    assert len(pools(api, team, "wide", RACK)) == 1
    assert len(pools(api, team, "wide", "kubernetes.io/hostname")) == 2


# -------------------------------------------------------------------------------------- jobs without queues, MultiKueue


@pytest.fixture
def manages_all(kueue) -> Iterator[None]:
    """Kueue manages Jobs that name no queue, too."""
    kueue.restart(manageJobsWithoutQueueName=True)
    yield
    kueue.restart()


def test_where_kueue_manages_every_job_those_without_a_queue_say_so(api, queues, team, operator, manages_all):
    queues.queue("main", {queues.flavor("any"): 8})
    path = create_job(api, job(team, "without", None))
    queued = wait(api, path, "Pending", "Queued")
    assert "jobs that name no queue" in condition(queued, "Running")["message"]


@pytest.mark.parametrize("queue", [None, "main"], ids=["no-queue", "its-own-queue"])
def test_where_kueue_manages_every_job_prepare_needs_a_queue_of_its_own(
    api, queues, team, fork_server, kueue_cluster, tmp_path, manages_all, queue
):
    queues.queue("main", {queues.flavor("any"): 8})
    settings = {"namespaces": [team], "prepare": {"enabled": True, **({"queue": queue} if queue else {})}}
    with ForkedOperator(fork_server, tmp_path / "operator", kueue_cluster.kubeconfig, **settings):
        path = create_job(api, job(team, "job"))
        if queue:
            wait(api, path, "Pending", "Preparing")
            api.wait_for(PODS.format(team), lambda pods: len(pods["items"]) == 1, what="Prepare's pod")
        else:
            api.wait_for(path, says("have the chart's prepare.queue name a LocalQueue"))
            assert api.list(PODS.format(team)) == []


def test_a_job_that_another_cluster_runs_keeps_its_manager(api, queues, team, operator):
    """MultiKueue: Kueue names itself in spec.managedBy of the Job, and no controller here makes pods of it."""
    check = f"{team}-elsewhere"
    queues.add("MultiKueueConfig", check, {"clusters": ["elsewhere"]})
    parameters = {"apiGroup": "kueue.x-k8s.io", "kind": "MultiKueueConfig", "name": check}
    queues.add("AdmissionCheck", check, {"controllerName": "kueue.x-k8s.io/multikueue", "parameters": parameters})
    strategy = {"admissionChecks": [{"name": check}]}
    queues.queue("main", {queues.flavor("any"): 8}, admissionChecksStrategy=strategy)
    path = create_job(api, job(team, "away"))
    queued = wait(api, path, "Pending", "Queued")
    [child] = api.list(JOBS.format(team))
    assert child["spec"]["managedBy"] == "kueue.x-k8s.io/multikueue"
    assert last_attempt(queued)["number"] == 1
