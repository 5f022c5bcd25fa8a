"""Attacks of tenants and taken-over pods on the operator, on a real API server; it goes on serving all others."""

from __future__ import annotations

import json
import os
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest

from cluster.api import ClusterApiError
from cluster.kwok import PREFIX, finish_pod
from cluster.scenarios.forked_operator import ForkedOperator
from cluster.scenarios.jobs import condition, create_job, in_state, last_attempt, qlora_job
from cluster.scenarios.operator import OperatorProcess
from cluster.scenarios.script import pods_do
from cluster.scenarios.whole_life import ADAPTER, ends, word
from cluster.waits import eventually
from qlora_api.untrusted.printable import is_printable
from services.hostile_rank import TERMINAL, HostileRank, answers, report

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster.api import ClusterApi, Object

FAULTY = Path(__file__).parents[4] / "tools" / "cluster" / "scenarios" / "faulty_operator.py"
JOBS, PODS = "/apis/batch/v1/namespaces/{}/jobs", "/api/v1/namespaces/{}/pods"
OWNED, FOREIGN, ELSEWHERE = (f"127.{os.getpid() % 200 + 10}.{number}.4" for number in (11, 12, 13))
METRICS_PORT = 9400
ADMISSION = "admissionregistration.k8s.io/v1"
DONE = ends(adapter=ADAPTER)
FORGED_ADAPTER = {**ADAPTER, "uri": "s3://forged/adapter", "manifestSha256": "f" * 64}
LONG = 90


def forged_pod(name: str, does: dict[str, object], owners: tuple[Object, ...] = (), **labels: str) -> Object:
    """Return a pod that says it is rank 0 of a job's first attempt."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "labels": {
                "app.kubernetes.io/managed-by": "qlora-operator",
                "app.kubernetes.io/component": "trainer",
                "qlora.dev/job": "job",
                "qlora.dev/attempt": "1",
                "batch.kubernetes.io/job-completion-index": "0",
                **labels,
            },
            "annotations": {f"{PREFIX}{key}": str(value) for key, value in does.items()},
            "ownerReferences": list(owners),
        },
        "spec": {"containers": [{"name": "trainer", "image": "forged"}]},
    }


def nested(depth: int) -> str:
    return '{"f:a":' * depth + "{}" + "}" * depth


def create_nested(api: ClusterApi, manifest: Object, namespace: str, depth: int = 9_000) -> None:
    """Create an object whose managed fields are nested as deep as the API server takes them."""
    fields = {
        "manager": "tenant",
        "operation": "Update",
        "apiVersion": manifest["apiVersion"],
        "time": "2026-01-01T00:00:00Z",
        "fieldsType": "FieldsV1",
        "fieldsV1": "NESTED",
    }
    body = {**manifest, "metadata": {**manifest["metadata"], "managedFields": [fields]}}
    text = json.dumps(body).replace('"NESTED"', nested(depth))
    collection = api.path_of(manifest, namespace).rpartition("/")[0]
    made = api._http.post(collection, content=text, headers={"Content-Type": "application/json"})
    assert made.is_success, made.text[:500]


# ------------------------------------------------------------------------------------------------------------- objects


def test_objects_as_large_and_as_deep_as_the_api_server_takes_them_end_no_watch(api, forked, kwok_namespace):
    pid = forked.pid
    large = forged_pod("large", {})
    large["spec"]["containers"][0]["env"] = [{"name": "X", "value": "<" * 1_480_000}]  # six bytes each, in JSON
    api.create(large, kwok_namespace)
    create_nested(api, forged_pod("nested", {}), kwok_namespace)
    create_nested(api, qlora_job("nested", kwok_namespace, suspend=True), kwok_namespace)
    labelled = qlora_job("labelled", kwok_namespace, suspend=True)
    labelled["metadata"]["labels"] = {f"label-{number}": "x" * 60 for number in range(16_000)}
    api.create(labelled)
    with pods_do(api, kwok_namespace, DONE, component="trainer", job="honest"):
        path = create_job(api, qlora_job("honest", kwok_namespace))
        api.wait_for(path, in_state("Succeeded"), seconds=LONG)
        for name in ("nested", "labelled"):  # they are served, too
            api.wait_for(path.replace("honest", name), in_state("Suspended"), seconds=LONG)
        assert (forked.pid, forked.metric_sum("qlora_operator_task_failures_total")) == (pid, 0)
        forked.kill()  # and one that starts lists them all
        forked.start()
        path = create_job(api, qlora_job("honest-2", kwok_namespace))
    api.wait_for(path, in_state("Running"), seconds=LONG)
    assert forked.metric_sum("qlora_operator_task_failures_total") == 0


def test_a_pod_that_is_not_controlled_by_a_job_of_the_operators_is_neither_asked_nor_believed(
    api, forked, kwok_namespace
):
    with HostileRank(FOREIGN, METRICS_PORT, [b""]) as foreign:
        path = create_job(api, qlora_job(namespace=kwok_namespace))
        running = api.wait_for(path, in_state("Running"), seconds=LONG)
        labels = {"qlora.dev/job-uid": running["metadata"]["uid"]}
        lies = ends(adapter=FORGED_ADAPTER, message="forged")
        template = {"spec": {"restartPolicy": "Never", "containers": [{"name": "trainer", "image": "forged"}]}}
        other = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": "job-2", "labels": {"qlora.dev/job": "job", "qlora.dev/attempt": "2", **labels}},
            "spec": {"suspend": True, "template": template},
        }
        uid = api.create(other, kwok_namespace)["metadata"]["uid"]
        api.create(forged_pod("a-2-lie", lies, **labels), kwok_namespace)
        api.create(forged_pod("a-1-port", {"pod-ip": FOREIGN}, **labels), kwok_namespace)
        another = {"apiVersion": "batch/v1", "kind": "Job", "name": "job-2", "uid": uid, "controller": True}
        api.create(forged_pod("a-3-child", lies, (another,), **labels), kwok_namespace)
        over = f"{PODS.format(kwok_namespace)}/a-2-lie"
        api.wait_for(over, lambda pod: pod["status"]["phase"] == "Succeeded", seconds=LONG)
        forked.kill()  # and one that starts sees the forged pods first, by name
        forked.start()
        (real,) = (pod for pod in api.list(PODS.format(kwok_namespace)) if pod["metadata"]["name"].startswith("job-1-"))
        finish_pod(api, kwok_namespace, real["metadata"]["name"], message=word(adapter=ADAPTER))
        done = api.wait_for(path, in_state("Succeeded"), seconds=LONG)
    assert done["status"]["adapter"] == ADAPTER
    assert [a["number"] for a in done["status"]["attempts"]] == [1]
    assert foreign.asked == 0
    assert forked.metric_sum("qlora_operator_objects_skipped_total") >= 3


def test_a_service_under_the_shared_ones_name_that_leads_elsewhere_is_not_used(api, forked, kwok_namespace):
    labels = {"app.kubernetes.io/managed-by": "qlora-operator"}
    leads = {"type": "ExternalName", "externalName": "tenant.example.com"}
    body = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "qlora-trainers", "labels": labels}}
    api.create({**body, "spec": leads}, kwok_namespace)
    path = create_job(api, qlora_job(namespace=kwok_namespace, workers=2))
    waiting = api.wait_for(path, in_state("Pending", "Refused"), seconds=LONG)
    assert '"qlora-trainers"' in condition(waiting, "Running")["message"]
    assert api.list(JOBS.format(kwok_namespace)) == []
    api.delete(f"/api/v1/namespaces/{kwok_namespace}/services/qlora-trainers")
    api.wait_for(path, in_state("Running"), seconds=LONG)


def test_figures_of_a_termination_message_that_are_none_are_left_out_and_metrics_are_served(
    api, forked, kwok_namespace
):
    figures = {
        "progress": {"step": 10, "totalSteps": 10, "loss": "n/a", "tokensPerSecond": "nan"},
        "memory": {"measured": {**{f"key{number}": number for number in range(40)}, "peak": 7}},
    }
    with pods_do(api, kwok_namespace, ends(adapter=ADAPTER, **figures)):
        done = api.wait_for(create_job(api, qlora_job(namespace=kwok_namespace)), in_state("Succeeded"), seconds=LONG)
    assert done["status"]["progress"]["step"] == 10
    assert "loss" not in done["status"]["progress"]
    assert done["status"]["memory"]["measured"] == {"peak": 7}
    metrics = forked.metrics()
    assert metrics[f'qlora_job_final_steps{{job="job",namespace="{kwok_namespace}"}}'] == 10


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(word(1, "Crashed", f"failed: {TERMINAL}"), id="termination-message"),
        pytest.param(f"failed: {TERMINAL}".replace("\0", ""), id="end-of-log"),
    ],
)
def test_nothing_that_controls_a_terminal_gets_into_status_or_events(api, forked, kwok_namespace, message):
    path = create_job(api, qlora_job(namespace=kwok_namespace, policy={"maxRestarts": 0}))
    api.wait_for(path, in_state("Running"), seconds=LONG)
    (pod,) = api.list(PODS.format(kwok_namespace))
    terminated = {"exitCode": 1, "reason": "Error", "message": message}
    ended = {**pod["status"]["containerStatuses"][0], "ready": False, "state": {"terminated": terminated}}
    over = f"{PODS.format(kwok_namespace)}/{pod['metadata']['name']}/status"
    api.patch(over, {"status": {"phase": "Failed", "containerStatuses": [ended]}})
    failed = api.wait_for(path, in_state("Failed"), seconds=LONG)
    attempt = last_attempt(failed)["message"]
    assert "failed: " in attempt
    assert "end" in attempt
    notes = [event.get("note", "") for event in api.list(f"/apis/events.k8s.io/v1/namespaces/{kwok_namespace}/events")]
    assert any("failed: " in note for note in notes)
    texts = json.dumps([failed["status"], notes], ensure_ascii=False)
    assert is_printable(texts), texts


def test_a_figure_in_status_that_is_none_takes_no_metric_of_others_away(api, forked, kwok_namespace):
    with pods_do(api, kwok_namespace, DONE):
        path = create_job(api, qlora_job(namespace=kwok_namespace))
        api.wait_for(path, in_state("Succeeded"), seconds=LONG)
    api.patch(f"{path}/status", {"status": {"progress": {"loss": "n/a"}}})
    uncounted = f'qlora_operator_uncounted_jobs{{namespace="{kwok_namespace}"}}'
    assert eventually(lambda: forked.metrics().get(uncounted) == 1, LONG)
    assert forked.metrics()[f'qlora_job_final_steps{{job="job",namespace="{kwok_namespace}"}}'] == 10


def test_an_error_over_what_a_pod_reports_does_not_keep_its_job_from_being_suspended(
    api, crd_cluster, fork_server, kwok_namespace, tmp_path
):
    broken = {"qlora_operator.decide.attempts.attempt_history.known_components": None}  # calling it is an error
    does = {"pod-ip": OWNED, "stop-exit-code": 43, "stop-message": word(43, "Preempted", "stopped")}
    with (
        HostileRank(OWNED, METRICS_PORT, [report()]) as rank,
        ForkedOperator(fork_server, tmp_path, crd_cluster.kubeconfig, broken, namespaces=[kwok_namespace]) as operator,
        pods_do(api, kwok_namespace, does),
    ):
        path = create_job(api, qlora_job(namespace=kwok_namespace))
        api.wait_for(path, in_state("Running"), seconds=LONG)
        errors = 'qlora_operator_reconcile_errors_total{kind="TypeError"}'
        assert eventually(lambda: rank.asked and operator.metrics().get(errors, 0) > 0, LONG)
        api.patch(path, {"spec": {"suspend": True}})
        suspended = api.wait_for(path, in_state("Suspended", "Suspended"), seconds=LONG)
    assert last_attempt(suspended)["reason"] == "Suspended"


def test_status_that_is_refused_with_a_pods_figures_is_written_without_them(api, forked, kwok_namespace):
    figures = {"expression": "!has(object.status) || !has(object.status.progress)", "message": "no figures"}
    name = f"no-figures-{kwok_namespace}"
    rule = {"apiGroups": ["qlora.dev"], "apiVersions": ["*"], "operations": ["UPDATE"]}
    policy = {
        "apiVersion": ADMISSION,
        "kind": "ValidatingAdmissionPolicy",
        "metadata": {"name": name},
        "spec": {
            "matchConstraints": {"resourceRules": [{**rule, "resources": ["qlorajobs/status"]}]},
            "validations": [figures],
        },
    }
    where = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": kwok_namespace}}}
    binding = {
        "apiVersion": ADMISSION,
        "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": {"name": name},
        "spec": {"policyName": name, "validationActions": ["Deny"], "matchResources": where},
    }
    probe = create_job(api, qlora_job("probe", kwok_namespace, suspend=True))
    api.wait_for(probe, in_state("Suspended"), seconds=LONG)
    for body in (policy, binding):
        api.create(body)
    try:
        assert eventually(lambda: is_refused(api, f"{probe}/status", {"status": {"progress": {"step": 1}}}), LONG)
        with pods_do(api, kwok_namespace, DONE):
            path = create_job(api, qlora_job(namespace=kwok_namespace))
            done = api.wait_for(path, in_state("Succeeded"), seconds=LONG)
    finally:
        for body in (binding, policy):
            api.delete(api.path_of(body))
    assert "progress" not in done["status"]
    assert done["status"]["adapter"] == ADAPTER


def is_refused(api: ClusterApi, path: str, change: Object) -> bool:
    try:
        api.patch(path, change, dryRun="All")
    except ClusterApiError:
        return True
    return False


# --------------------------------------------------------------------------------------------------------------- tasks


class FaultyOperator(OperatorProcess):
    """An operator each of whose tasks fails a few times."""

    FAILURES = 3
    program = ("-P", FAULTY, str(FAILURES))


def test_a_task_that_raises_is_counted_and_started_again_and_the_others_go_on(
    api, crd_cluster, kwok_namespace, tmp_path
):
    failures = 'qlora_operator_task_failures_total{{task="{}"}}'
    kinds = ("qlorajobs", "qlorasweeps", "jobs", "pods", "events", "services")
    tasks = ("reconciler", "sweeps", "progress", "resync", "capabilities", *(f"watch-{kind}" for kind in kinds))
    expected = {failures.format(task): FaultyOperator.FAILURES for task in tasks}

    def failed(operator: OperatorProcess) -> dict[str, float]:
        return {name: value for name, value in operator.metrics().items() if name.startswith(failures[:30])}

    with (
        pods_do(api, kwok_namespace, DONE),
        FaultyOperator(tmp_path, crd_cluster.kubeconfig, namespaces=[kwok_namespace]) as operator,
    ):
        pid = operator.pid
        path = create_job(api, qlora_job(namespace=kwok_namespace, workers=2))
        api.wait_for(path, in_state("Succeeded"), seconds=LONG)
        assert eventually(lambda: failed(operator) == expected, LONG), failed(operator)
        path = create_job(api, qlora_job("another", namespace=kwok_namespace))
        api.wait_for(path, in_state("Succeeded"), seconds=LONG)
        assert (operator.pid, failed(operator)) == (pid, expected)
        assert operator.healthz()[0] == 200
        assert operator.stop() == 0


# ---------------------------------------------------------------------------------------------------------------- soak


class Scraper(threading.Thread):
    """Asks for metrics again and again, and keeps what was no answer."""

    def __init__(self, operator: OperatorProcess) -> None:
        super().__init__(daemon=True)
        self._url, self._done = f"http://127.0.0.1:{operator.port}/metrics", threading.Event()
        self.count, self.failed = 0, []

    def run(self) -> None:
        while not self._done.wait(0.2):
            try:
                code: object = httpx.get(self._url, timeout=10, trust_env=False).status_code
            except httpx.TransportError as error:
                code = error
            self.count += 1
            if code != 200:
                self.failed.append(code)

    def stop(self) -> None:
        self._done.set()
        self.join(15)


@contextmanager
def scraped(operator: OperatorProcess) -> Iterator[Scraper]:
    scraper = Scraper(operator)
    scraper.start()
    try:
        yield scraper
    finally:
        scraper.stop()


@pytest.mark.timeout(400)
def test_an_operator_outlives_ranks_that_answer_anything_and_enforces_what_their_jobs_may_take(
    api, crd_cluster, fork_server, kwok_namespace, tmp_path
):
    said = answers(f"{ELSEWHERE}:{METRICS_PORT}")
    junk = {f"key{number}": number for number in range(40)}
    stopped = word(43, "Preempted", "stopped", memory={"measured": junk}, progress={"loss": "n/a"})
    does = {"pod-ip": OWNED, "stop-exit-code": 43, "stop-message": stopped}
    limits: dict[str, Any] = {
        "suspended": {},
        "late": {"activeDeadlineSeconds": 60},
        "spent": {"budgetGpuHours": "0.5"},  # a report says that a stop takes 900 s, and more is not believed
    }
    settings = {"namespaces": [kwok_namespace], "progressSeconds": 0.02}
    with (
        HostileRank(OWNED, METRICS_PORT, said) as owned,
        HostileRank(FOREIGN, METRICS_PORT, said) as foreign,
        HostileRank(ELSEWHERE, METRICS_PORT, said) as elsewhere,
        ForkedOperator(fork_server, tmp_path, crd_cluster.kubeconfig, **settings) as operator,
        pods_do(api, kwok_namespace, does, component="trainer"),
        scraped(operator) as scraper,
    ):
        pid, process = operator.pid, psutil.Process(operator.pid)
        paths = {
            name: create_job(api, qlora_job(name, kwok_namespace, policy=policy)) for name, policy in limits.items()
        }
        jobs = {name: api.wait_for(path, in_state("Running"), seconds=LONG) for name, path in paths.items()}
        uid = jobs["suspended"]["metadata"]["uid"]
        labels = {"qlora.dev/job": "suspended", "qlora.dev/job-uid": uid}
        api.create(forged_pod("foreign", {"pod-ip": FOREIGN}, **labels), kwok_namespace)
        assert eventually(lambda: owned.asked >= 60, LONG)
        before = process.memory_info().rss
        assert eventually(lambda: owned.asked >= 60 + len(said), 200), owned.asked
        after = process.memory_info().rss
        assert after < 1.2 * before, (before, after)

        api.patch(paths["suspended"], {"spec": {"suspend": True}})
        suspended = api.wait_for(paths["suspended"], in_state("Suspended", "Suspended"), seconds=LONG)
        assert last_attempt(suspended)["reason"] == "Suspended"
        late = api.wait_for(paths["late"], in_state("Failed", "DeadlineExceeded"), seconds=LONG)
        assert last_attempt(late)["message"].startswith("its attempts together ran longer")
        api.patch(paths["spent"], {"spec": {"policy": {"budgetGpuHours": "0.0001"}}})
        api.wait_for(paths["spent"], in_state("Suspended", "BudgetReached"), seconds=LONG)
        assert not [p for p in api.list(PODS.format(kwok_namespace)) if p["metadata"]["name"] != "foreign" and alive(p)]
        assert (operator.pid, process.is_running(), operator.healthz()[0]) == (pid, True, 200)
        assert operator.metric_sum("qlora_operator_task_failures_total") == 0
        assert operator.metric_sum("qlora_operator_reports_rejected_total") > 100
    assert (foreign.asked, elsewhere.asked) == (0, 0)
    assert scraper.count > 100
    assert scraper.failed == []


def alive(pod: Object) -> bool:
    return pod["status"]["phase"] in ("Pending", "Running")
