"""Faults of the API server, or of the way to it, that the operator survives."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from cluster.api import ClusterApiError
from cluster.control_plane import ControlPlane
from cluster.kwok import finish_pod
from cluster.scenarios.forked_operator import ForkedOperator
from cluster.scenarios.jobs import condition, create_job, in_state, job_path, qlora_job, serve_crd
from cluster.scenarios.operator import OperatorProcess
from cluster.scenarios.proxy import GONE, Passed, Proxy, Refused
from cluster.scenarios.script import pods_do
from cluster.scenarios.whole_life import ADAPTER, ends, word
from cluster.waits import SOON, eventually
from fixtures import skip_unless_ci
from services.binaries import ToolMissingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cluster.scenarios.proxy import Call

JOBS, PODS = "/apis/batch/v1/namespaces/{}/jobs", "/api/v1/namespaces/{}/pods"
DONE = ends(adapter=ADAPTER)
ERRORS = "qlora_operator_reconcile_errors_total"
RECONCILES = "qlora_operator_reconcile_seconds_count"


def is_list(resource: str) -> Callable[[Call], bool]:
    return lambda call: call.method == "GET" and not call.watch and call.resource == resource


def is_watch(resource: str) -> Callable[[Call], bool]:
    return lambda call: call.watch and call.resource == resource


def makes(name: str) -> Callable[[Call], bool]:
    return lambda call: call.method == "POST" and call.resource == "jobs" and call.name == name


def is_status(call: Call) -> bool:
    return call.method == "PATCH" and call.resource == "qlorajobs/status"


# -------------------------------------------------------------------------------------------------------------- watches


def test_a_job_goes_on_when_all_watches_are_cut(api, behind_proxy, proxy, kwok_namespace):
    path = create_job(api, qlora_job(namespace=kwok_namespace, workers=2))
    running = api.wait_for(path, in_state("Running"))
    proxy.cut_watches()
    for pod in api.list(PODS.format(kwok_namespace)):
        finish_pod(api, kwok_namespace, pod["metadata"]["name"], message=word(adapter=ADAPTER))
    done = api.wait_for(path, in_state("Succeeded"))
    assert len(done["status"]["attempts"]) == len(running["status"]["attempts"]) == 1


@pytest.fixture
def unseen(api, proxy, behind_proxy, kwok_namespace) -> Callable[[str, str], None]:
    """Delete an object while the watch of its kind is down, which then learns that its place is forgotten: 410 Gone."""

    def delete(resource: str, path: str, **parameters: object) -> None:
        before = sum(1 for call in proxy.reads if is_list(resource)(call))
        proxy.when(is_list(resource), Refused(503), times=2)  # until the object is gone
        proxy.end_watches(resource)
        assert eventually(lambda: sum(1 for call in proxy.reads if is_list(resource)(call)) > before)
        api.delete(path, **parameters)
        api.wait_gone(path)
        assert proxy.pending_faults, "it was listed before it was deleted"

    return delete


def test_a_job_that_was_deleted_unseen_is_forgotten(api, unseen, behind_proxy, kwok_namespace):
    path = create_job(api, qlora_job(namespace=kwok_namespace, workers=2))
    api.wait_for(path, in_state("Running"))
    assert behind_proxy.metric_sum("qlora_operator_jobs") == 1
    unseen("qlorajobs", path)
    assert eventually(lambda: behind_proxy.metric_sum("qlora_operator_jobs") == 0)
    api.wait_for(f"/api/v1/namespaces/{kwok_namespace}/services", lambda found: not found["items"], seconds=SOON)


def test_a_child_that_was_deleted_unseen_is_followed_by_another_attempt(api, unseen, kwok_namespace):
    stops = {"stop-exit-code": 43, "stop-message": word(43, "Preempted", "stopped at step 5")}
    with pods_do(api, kwok_namespace, stops, attempt=1), pods_do(api, kwok_namespace, DONE, attempt=2):
        path = create_job(api, qlora_job(namespace=kwok_namespace))
        api.wait_for(path, in_state("Running"))
        unseen("jobs", f"{JOBS.format(kwok_namespace)}/job-1")
        done = api.wait_for(path, in_state("Succeeded"), seconds=SOON)
    assert [a["reason"] for a in done["status"]["attempts"]] == ["Preempted", "Completed"]


def test_pods_that_were_deleted_unseen_do_not_keep_a_job_from_being_suspended(api, unseen, kwok_namespace):
    with pods_do(api, kwok_namespace, {"stop-seconds": 100}):
        path = create_job(api, qlora_job(namespace=kwok_namespace))
        api.wait_for(path, in_state("Running"))
    api.patch(path, {"spec": {"suspend": True}})
    api.wait_for(path, in_state("Pending", "Suspending"))
    pod = api.list(PODS.format(kwok_namespace))[0]["metadata"]["name"]
    unseen("pods", f"{PODS.format(kwok_namespace)}/{pod}", gracePeriodSeconds=0)
    api.wait_for(path, in_state("Suspended"), seconds=SOON)


def test_a_watch_that_is_silent_is_asked_for_anew(api, fork_server, proxy, kwok_namespace, tmp_path):
    quick = {"qlora_operator.watch.kopf_handlers.SILENCE_SECONDS": 2, "qlora_operator.kube.client.SILENCE_SECONDS": 2}
    with ForkedOperator(fork_server, tmp_path, proxy.kubeconfig, quick, namespaces=[kwok_namespace]) as operator:
        proxy.freeze_watches()
        path = create_job(api, qlora_job(namespace=kwok_namespace))
        api.wait_for(path, in_state("Running"), seconds=SOON)
        assert operator.healthz() == (200, "ok\n")


def deletions(proxy: Proxy, resource: str) -> int:
    return sum(1 for call in proxy.calls if call.method == "DELETE" and call.resource == resource)


def test_a_child_is_deleted_once_however_late_its_watch_says_so(api, behind_proxy, proxy, kwok_namespace):
    stops = {"stop-seconds": 3, "stop-exit-code": 43, "stop-message": word(43, "Preempted", "stopped at step 5")}
    with pods_do(api, kwok_namespace, stops):
        path = create_job(api, qlora_job(namespace=kwok_namespace))
        api.wait_for(path, in_state("Running"))
    proxy.freeze_watches("jobs")
    api.patch(path, {"spec": {"suspend": True}})
    assert eventually(lambda: deletions(proxy, "jobs") == 1)
    before = behind_proxy.metric_sum(RECONCILES)
    assert eventually(lambda: behind_proxy.metric_sum(RECONCILES) >= before + 2), "nothing woke it as its pod left"
    assert deletions(proxy, "jobs") == 1
    proxy.cut_watches("jobs")
    suspended = api.wait_for(path, in_state("Suspended"), seconds=SOON)
    assert [a["message"] for a in suspended["status"]["attempts"]] == ["stopped at step 5"]


def test_a_job_is_deleted_once_however_late_its_watch_says_so(api, behind_proxy, proxy, kwok_namespace):
    with pods_do(api, kwok_namespace, DONE):
        path = create_job(api, qlora_job(namespace=kwok_namespace, policy={"ttlSecondsAfterFinished": 8}))
        api.wait_for(path, in_state("Succeeded"))
    proxy.freeze_watches("qlorajobs")
    before = behind_proxy.metric_sum(RECONCILES)
    api.wait_gone(path, seconds=2 * SOON)
    with suppress(ClusterApiError):  # the garbage collector was quicker
        api.delete(f"{JOBS.format(kwok_namespace)}/job-1")
    # One has deleted it, and the end of its child wakes it once more.
    assert eventually(lambda: behind_proxy.metric_sum(RECONCILES) >= before + 2), "nothing woke it"
    assert deletions(proxy, "qlorajobs") == 1


def test_what_was_decided_on_a_job_that_has_changed_deletes_nothing(api, behind_proxy, proxy, kwok_namespace):
    """As of an operator that has not seen yet that a job goes on."""
    path = create_job(api, qlora_job(namespace=kwok_namespace))
    api.wait_for(path, in_state("Running"))
    resumed = []

    def resumes(call: Call) -> bool:
        if call.method == "GET" and not call.watch and call.path == path:
            resumed.append(api.patch(path, {"spec": {"suspend": False}}))
            return True
        return False

    proxy.when(resumes, Passed())
    api.patch(path, {"spec": {"suspend": True}})
    assert eventually(lambda: resumed)
    before = behind_proxy.metric_sum(RECONCILES)
    api.patch(path, {"spec": {"policy": {"maxRestarts": 9}}})
    assert eventually(lambda: behind_proxy.metric_sum(RECONCILES) > before)
    assert deletions(proxy, "jobs") == 0
    running = api.get(path)
    assert running["status"]["state"] == "Running"
    assert [a.get("reason") for a in running["status"]["attempts"]] == [None]


@pytest.mark.parametrize("trouble", ["error", "gone"])
def test_what_ends_the_watch_of_jobs_for_good_has_it_started_again_and_the_operator_goes_on(
    api, behind_proxy, proxy, kwok_namespace, trouble
):
    pid = behind_proxy.pid
    with pods_do(api, kwok_namespace, DONE, attempt=1):
        path = create_job(api, qlora_job("deleted-meanwhile", kwok_namespace, suspend=True))
        api.wait_for(path, in_state("Suspended"))
        if trouble == "error":
            proxy.end_watches("qlorajobs", {**GONE, "code": 500, "reason": "InternalError"})
        else:
            proxy.when(is_watch("qlorajobs"), Refused(410))
            proxy.cut_watches("qlorajobs")
        failures = 'qlora_operator_task_failures_total{task="watch-qlorajobs"}'
        assert eventually(lambda: behind_proxy.metrics()[failures] == 1)
        api.delete(path)
        api.wait_for(create_job(api, qlora_job(namespace=kwok_namespace)), in_state("Succeeded"))
        assert eventually(lambda: behind_proxy.metric_sum("qlora_operator_jobs") == 1)
    assert (behind_proxy.pid, behind_proxy.healthz()) == (pid, (200, "ok\n"))


@pytest.mark.parametrize("resource", ["jobs", "pods", "events", "services"])
@pytest.mark.parametrize("trouble", ["error", "gone"])
def test_trouble_with_the_watch_of_what_belongs_to_jobs_is_overcome(
    api, behind_proxy, proxy, kwok_namespace, resource, trouble
):
    if trouble == "error":
        proxy.end_watches(resource, {**GONE, "code": 500, "reason": "InternalError"})
    else:
        proxy.when(is_watch(resource), Refused(410))
        proxy.cut_watches(resource)
    assert eventually(lambda: not proxy.pending_faults)
    with pods_do(api, kwok_namespace, DONE):
        api.wait_for(create_job(api, qlora_job(namespace=kwok_namespace, workers=2)), in_state("Succeeded"))
    assert behind_proxy.healthz() == (200, "ok\n")


def test_a_token_that_has_expired_is_asked_for_anew(api, behind_proxy, proxy, kwok_namespace):
    proxy.when(is_watch("jobs"), Refused(401))
    proxy.cut_watches("jobs")
    assert eventually(lambda: not proxy.pending_faults)
    with pods_do(api, kwok_namespace, DONE):
        api.wait_for(create_job(api, qlora_job(namespace=kwok_namespace)), in_state("Succeeded"))
    assert behind_proxy.healthz() == (200, "ok\n")


def test_an_operator_that_starts_again_writes_nothing(api, behind_proxy, proxy, kwok_namespace):
    with pods_do(api, kwok_namespace, DONE, job="done"):
        done = create_job(api, qlora_job("done", kwok_namespace))
        api.wait_for(done, in_state("Succeeded"))
    running, waiting, suspended = (
        create_job(api, qlora_job("running", kwok_namespace, workers=2)),
        create_job(api, qlora_job("waiting", kwok_namespace, parallelism={"gpusPerWorker": 16})),
        create_job(api, qlora_job("suspended", kwok_namespace, suspend=True)),
    )
    api.wait_for(running, in_state("Running"))
    api.wait_for(waiting, in_state("Pending", "Unschedulable"))
    api.wait_for(suspended, in_state("Suspended"))
    behind_proxy.kill()
    written, looked = len(proxy.calls), len(proxy.reads)
    behind_proxy.start()
    # Before the first decision, by kopf, and once more after that: by then each job was decided upon.
    assert eventually(lambda: sum(is_list("qlorajobs")(call) for call in proxy.reads[looked:]) >= 3)
    assert behind_proxy.metric_sum(RECONCILES) >= 4
    assert proxy.calls[written:] == []


def test_a_kind_that_cannot_be_listed_any_more_makes_the_liveness_probe_fail(
    fork_server, proxy, kwok_namespace, tmp_path
):
    quick = dict.fromkeys(
        (
            f"qlora_operator.{name}_SECONDS"
            for name in (
                "watch.kopf_handlers.WATCH",
                "watch.list_watch.WATCH",
                "serve.health.WATCH",
                "serve.health.SLACK",
            )
        ),
        2,
    )
    with ForkedOperator(fork_server, tmp_path, proxy.kubeconfig, quick, namespaces=[kwok_namespace]) as operator:
        proxy.when(is_list("pods"), Refused(500), times=100)
        proxy.end_watches("pods")
        assert eventually(lambda: operator.healthz() == (503, "watches without progress: pods\n"))


# ---------------------------------------------------------------------------------------------------------------- calls


def test_a_status_that_was_decided_on_an_older_job_is_decided_again(api, behind_proxy, proxy, kwok_namespace):
    proxy.when(is_status, Refused(409), times=2)
    with pods_do(api, kwok_namespace, DONE):
        done = api.wait_for(create_job(api, qlora_job(namespace=kwok_namespace)), in_state("Succeeded"))
    assert [a["reason"] for a in done["status"]["attempts"]] == ["Completed"]
    assert behind_proxy.metric_sum(ERRORS) == 2


def test_a_spec_that_changes_between_decision_and_status_counts(api, behind_proxy, proxy, kwok_namespace):
    """The job is suspended after its attempt was made and before that is written."""
    path = job_path(kwok_namespace)

    def suspends(call: Call) -> bool:
        if is_status(call) and "attempts" in call.body["status"]:
            api.patch(path, {"spec": {"suspend": True}})
            return True
        return False

    proxy.when(suspends, Passed())
    create_job(api, qlora_job(namespace=kwok_namespace))
    suspended = api.wait_for(path, in_state("Suspended"))
    assert [a["reason"] for a in suspended["status"]["attempts"]] == ["Suspended"]
    assert api.list(JOBS.format(kwok_namespace)) == []


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_obeyed_whatever_happens_meanwhile(api, behind_proxy, proxy, kwok_namespace, status):
    proxy.when(makes("job-1"), Refused(status, retry_after=3))
    path = create_job(api, qlora_job(namespace=kwok_namespace))
    assert eventually(lambda: not proxy.pending_faults)
    api.patch(path, {"spec": {"policy": {"maxRestarts": 9}}})  # wakes the operator
    api.wait_for(path, in_state("Running"))
    first, second = (call.at for call in proxy.calls if makes("job-1")(call))
    assert second - first >= 3


@pytest.mark.parametrize("status", [500, 503])
def test_server_errors_are_waited_out(api, behind_proxy, proxy, kwok_namespace, status):
    proxy.when(makes("job-1"), Refused(status), times=3)
    path = create_job(api, qlora_job(namespace=kwok_namespace))
    api.wait_for(path, in_state("Running"))
    calls = [call.at for call in proxy.calls if makes("job-1")(call)]
    assert len(calls) == 4
    assert calls[-1] - calls[0] > 1
    assert len(api.list(JOBS.format(kwok_namespace))) == 1


def test_what_keeps_failing_is_said_in_status_while_it_is_tried_again(api, behind_proxy, proxy, kwok_namespace):
    """As when the webhook of somebody else's is down."""
    proxy.when(makes("job-1"), Refused(500), times=5)
    path = create_job(api, qlora_job(namespace=kwok_namespace))
    waiting = api.wait_for(path, in_state("Pending", "Refused"))
    assert "a bad day, by the test" in condition(waiting, "Running")["message"]
    api.wait_for(path, in_state("Running"))
    assert not proxy.pending_faults


@pytest.mark.parametrize("status", [404, 429, 500])
def test_the_initial_sync_is_repeated_until_it_succeeds(api, fork_server, proxy, kwok_namespace, tmp_path, status):
    """As when the definition of QLoRAJobs is younger than the operator."""
    path = create_job(api, qlora_job(namespace=kwok_namespace, suspend=True))
    proxy.when(is_list("qlorajobs"), Refused(status), times=2)
    with ForkedOperator(fork_server, tmp_path, proxy.kubeconfig, namespaces=[kwok_namespace]) as operator:
        assert not proxy.pending_faults
        assert operator.healthz()[0] == 200
        api.wait_for(path, in_state("Suspended"))


def test_an_operator_that_may_not_look_says_so_and_ends(crd_cluster, kwok_namespace, tmp_path):
    nobody = crd_cluster.user_kubeconfig("nobody")
    operator = OperatorProcess(tmp_path, nobody, namespaces=[kwok_namespace])
    operator.spawn()
    try:
        assert operator.wait(SOON) == 1
    finally:
        operator.kill()
    assert 'cannot list resource "qlorajobs"' in operator.log.read_text()


# ------------------------------------------------------------------------------------------------------- no API server


@pytest.fixture
def own_cluster(tmp_path) -> Iterator[ControlPlane]:
    try:
        cluster = ControlPlane(tmp_path / "cluster")
    except ToolMissingError as error:
        skip_unless_ci(str(error))
    with cluster:
        cluster.add_kwok_nodes(2)
        yield cluster


def test_jobs_outlive_ten_seconds_without_an_api_server(own_cluster, fork_server, tmp_path):
    """The operator starts before the definition is there, and sees the API server go and come back."""
    api = own_cluster.api
    operator = ForkedOperator(fork_server, tmp_path / "operator", own_cluster.kubeconfig)
    operator.spawn()
    try:
        assert eventually(lambda: "the initial sync is not complete" in operator.log.read_text())
        serve_crd(own_cluster)
        operator.wait_until_ready()
        paths = [create_job(api, qlora_job(f"job-{number}", workers=2)) for number in range(4)]
        for path in paths:
            api.wait_for(path, in_state("Running"))
        pid = operator.pid
        own_cluster.stop_api_server()
        time.sleep(10)
        own_cluster.start_api_server()
        for pod in api.list(PODS.format("default")):
            finish_pod(api, "default", pod["metadata"]["name"], message=word(adapter=ADAPTER))
        for path in paths:
            done = api.wait_for(path, in_state("Succeeded"), seconds=60)
            assert [a["reason"] for a in done["status"]["attempts"]] == ["Completed"]
        assert operator.pid == pid
        assert operator.healthz() == (200, "ok\n")
    finally:
        operator.kill()
