"""From ``kubectl apply`` to an adapter that loads: real pods train over DeepSpeed on real nodes, on the CPU.

What may happen on the way is done to the job for real: pods deleted, the operator killed, a node and S3 taken away.
"""

from __future__ import annotations

import json
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import pytest

from cluster.scenarios.jobs import condition, create_job, in_state, job_path
from demo.check_adapter import check_adapter
from demo.installed_cluster import HOSTILE_KEYS
from demo.material import make_large_base
from services.prometheus import Prometheus, scrape
from testing.timeouts import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cluster.api import Object
    from demo.installed_cluster import InstalledCluster

JOB_SECONDS = PATIENCE_SECONDS
METRICS_PORT = 9400


def step_of(job: Object) -> int:
    return int((job.get("status", {}).get("progress") or {}).get("step", 0))


def reached(step: int) -> Callable[[Object], bool]:
    """A condition: the newest attempt runs, and status shows at least this step."""
    return lambda job: in_state("Running")(job) and step_of(job) >= step


def is_at(section: str) -> Callable[[Object], bool]:
    """A condition: the newest attempt runs, and rank 0 is in this section."""
    return lambda job: in_state("Running")(job) and condition(job, "Running")["message"].endswith(section)


class RunningJob:
    """A job on the cluster, and what is asked of it."""

    def __init__(self, installed: InstalledCluster, team: str, bucket: str, name: str, **groups: Any) -> None:
        self.installed, self.team, self.name = installed, team, name
        self.path = create_job(installed.cluster.api, installed.s3_job(name, team, bucket, **groups))

    def wait(self, condition: Callable[[Object], Any], seconds: float = JOB_SECONDS) -> Object:
        """Wait; a job that failed instead tells its story."""

        def holds_or_failed(job: Object) -> bool:
            return bool(condition(job)) or in_state("Failed")(job)

        try:
            found = self.installed.cluster.api.wait_for(self.path, holds_or_failed, seconds=seconds, what=self.name)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.installed.story(self.team, self.name)}") from None
        assert condition(found), self.installed.story(self.team, self.name)
        return found

    def succeeded(self) -> Object:
        """Wait until it has, and hold the adapter against its manifest and its base."""
        done = self.wait(in_state("Succeeded", "Completed"))
        check_adapter(self.installed, done["status"]["adapter"])
        return done

    def reasons(self, job: Object) -> list[str]:
        return [a["reason"] for a in job["status"]["attempts"]]


@contextmanager
def scraped(installed: InstalledCluster, team: str, folder: Path) -> Iterator[Prometheus]:
    """A Prometheus that scrapes the operator and a namespace's trainers, as the chart's monitors would have it."""
    targets, over = folder / "targets.json", Event()

    def look() -> None:
        while not over.wait(0.2):
            found = [
                {
                    "targets": [f"{pod['status']['podIP']}:{METRICS_PORT}"],
                    "labels": {"pod": pod["metadata"]["name"], "namespace": team},
                }
                for pod in installed.trainer_pods(team)
                if pod["status"].get("podIP")
            ]
            fresh = targets.with_suffix(".new")
            fresh.write_text(json.dumps(found))
            fresh.rename(targets)

    operator = installed.operator_pod["status"]["podIP"]
    trainers = {"job_name": "trainers", "honor_labels": True, "file_sd_configs": [{"files": [str(targets)]}]}
    thread = Thread(target=look)
    thread.start()
    try:
        with Prometheus(
            folder / "prometheus", [scrape("operator", f"{operator}:9090", honor_labels=True), trainers]
        ) as prometheus:
            yield prometheus
    finally:
        over.set()
        thread.join()


def check_environments() -> None:
    """Check that keys of a Secret besides credentials reach no environment of the trainers' processes."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (process / "cmdline").read_bytes().split(b"\0")
            if b"qlora_trainer.rank" in command and b"-I" in command:
                found.append((process / "environ").read_text())
    assert len(found) >= 2
    for environment in found:
        names = {line.partition("=")[0] for line in environment.split("\0")}
        assert "AWS_ACCESS_KEY_ID" in names
        assert not names & HOSTILE_KEYS.keys()
        assert not [name for name in names if name.startswith("QLORA_SECRET_")]


def test_two_workers_train_are_seen_and_leave_an_adapter(installed, team, bucket, tmp_path):
    run = RunningJob(installed, team, bucket, "quick", training={"maxSteps": 60})
    with scraped(installed, team, tmp_path) as prometheus:
        run.wait(in_state("Pending", "Preparing"))
        (prepare,) = installed.cluster.api.list(f"/api/v1/namespaces/{team}/pods")
        assert "nvidia.com/gpu" not in json.dumps(prepare["spec"]["containers"])
        running = run.wait(reached(3))
        check_environments()
        assert running["status"]["prepared"]["trainRows"] > 0
        memory = running["status"]["memory"]
        assert memory["predicted"]["adapterWeights"] == memory["measured"]["adapterWeights"] > 0
        series = prometheus.wait_for('qlora_host_memory_resident_bytes{job="quick"}', seconds=30)
        assert {(s.labels["rank"], s.labels["namespace"]) for s in series} == {("0", team), ("1", team)}
        assert len({s.labels["pod"] for s in series}) == 2
        assert prometheus.wait_for('qlora_loss{job="quick", rank="0"} > 0')
        assert prometheus.wait_for(f'qlora_operator_jobs{{namespace="{team}", state="Running"}} == 1')
        done = run.succeeded()
        assert prometheus.wait_for('qlora_job_final_eval_loss{job="quick"} > 0')
    assert run.reasons(done) == ["Completed"]
    assert done["status"]["progress"]["step"] == 60
    row = installed.cluster.kubectl("get", "qlorajobs", "-n", team, "--no-headers").split()
    assert row[:4] == ["quick", "Succeeded", "Completed", "60"]


def test_a_worker_pod_that_is_deleted_with_thirty_seconds_to_leave_costs_no_step(installed, team, bucket):
    run = RunningJob(installed, team, bucket, "evicted", training={"maxSteps": 80}, policy={"maxRestarts": 0})
    run.wait(reached(4))
    second = next(p for p in installed.trainer_pods(team) if p["metadata"]["name"].startswith("evicted-1-1"))
    installed.cluster.api.delete(f"/api/v1/namespaces/{team}/pods/{second['metadata']['name']}", gracePeriodSeconds=30)
    done = run.succeeded()
    assert run.reasons(done) == ["Preempted", "Completed"]
    first, last = done["status"]["attempts"]
    assert last["firstStep"] == first["lastStep"] >= 4
    assert done["status"]["restarts"] == 0


def test_suspend_frees_the_gpus_with_a_checkpoint_and_resume_goes_on(installed, team, bucket):
    run = RunningJob(installed, team, bucket, "paused", training={"maxSteps": 80})
    run.wait(reached(4))
    installed.cluster.api.patch(run.path, {"spec": {"suspend": True}})
    suspended = run.wait(in_state("Suspended"))
    assert all(pod["status"]["phase"] in ("Succeeded", "Failed") for pod in installed.trainer_pods(team))
    installed.cluster.api.patch(run.path, {"spec": {"suspend": False}})
    done = run.succeeded()
    assert run.reasons(done) == ["Suspended", "Completed"]
    assert done["status"]["attempts"][1]["firstStep"] == suspended["status"]["attempts"][0]["lastStep"] >= 4


def test_the_operator_may_be_killed_at_any_moment(installed, team, bucket):
    """While Prepare runs, while pods start, and three times while they train."""
    run = RunningJob(installed, team, bucket, "headless", training={"maxSteps": 80})
    moments: list[Callable[[Object], Any]] = [
        lambda job: job.get("status", {}).get("conditions"),
        lambda job: job["status"].get("attempts"),
        lambda job: step_of(job) >= 4,
        lambda job: step_of(job) >= 20,
        lambda job: step_of(job) >= 60,
    ]
    for moment in moments:
        run.wait(moment)
        kill_operator(installed)
    done = run.succeeded()
    assert run.reasons(done) == ["Completed"]
    jobs = installed.cluster.api.list(f"/apis/batch/v1/namespaces/{team}/jobs")
    assert sorted(j["metadata"]["name"] for j in jobs) == ["headless-1", "headless-prepare"]


def kill_operator(installed: InstalledCluster) -> None:
    """Take its pod away without a word; the Deployment makes another."""
    pod = installed.operator_pod["metadata"]["name"]
    installed.cluster.api.delete(f"/api/v1/namespaces/{installed.system}/pods/{pod}", gracePeriodSeconds=0)


def test_s3_may_be_away_for_a_minute_when_the_adapter_is_published(installed, team, bucket):
    once = {"maxSteps": 400, "evaluation": {"everySteps": 400}}
    run = RunningJob(installed, team, bucket, "offline", training=once, checkpoint={"everySteps": 400})
    run.wait(reached(1))
    installed.s3.stop()
    run.wait(is_at("Checkpoint"))  # the last one, and then the adapter: both wait
    time.sleep(60)
    installed.s3.start()
    assert run.reasons(run.succeeded()) == ["Completed"]


def test_a_node_that_is_lost_costs_an_attempt_and_no_restart(installed, team, bucket):
    lost = installed.add_trainer_node("short-lived")
    alone = {"parallelism": {"workers": 1, "zeroStage": 0}, "policy": {"maxRestarts": 0}}
    installed.place_new_pods(only_on=lost.name)
    run = RunningJob(installed, team, bucket, "stranded", training={"maxSteps": 120}, **alone)
    running = run.wait(reached(12))
    assert running["status"]["attempts"][0]["node"] == lost.name
    installed.place_new_pods(not_on=lost.name)
    lost.stop_kubelet()
    done = run.succeeded()
    lost.stop()
    first, last = done["status"]["attempts"]
    assert (first["reason"], first["node"]) == ("NodeLost", lost.name)
    # Its containers go on without a kubelet: they may have published before the next attempt looked.
    assert "attempt-1" in done["status"]["adapter"]["uri"] or last["firstStep"] >= 10
    assert done["status"]["restarts"] == 0


@pytest.mark.parametrize(
    ("groups", "reason", "words"),
    [
        pytest.param(
            {"output": {"credentials": "absent"}}, "MissingReference", 'secret "absent" not found', id="missing-secret"
        ),
        pytest.param(
            {"model": {"source": "pvc://absent/base"}}, "MissingReference", 'claim "absent"', id="missing-claim"
        ),
    ],
)
def test_what_is_missing_is_named_within_ten_seconds(installed, team, bucket, groups, reason, words):
    run = RunningJob(installed, team, bucket, "waiting", **groups)
    waiting = run.wait(in_state("Pending", reason), seconds=10)
    assert words in condition(waiting, "Prepared")["message"]


def test_bad_rows_end_the_job_before_a_gpu_is_held(installed, team, bucket):
    run = RunningJob(installed, team, bucket, "badrows", dataset={"columns": {"completion": "answer"}})
    failed = installed.cluster.api.wait_for(run.path, in_state("Failed", "UserError"), seconds=JOB_SECONDS)
    assert "answer" in condition(failed, "Failed")["message"]
    assert installed.trainer_pods(team) == []


def test_a_base_that_no_gpu_holds_ends_the_job_before_one_is_held(installed, team, bucket):
    place = installed.s3.folder_of(bucket.removeprefix("s3://"))
    make_large_base(place / "large", place / "base")
    installed.install(trainer={"device": "", "gpu": "rtx4090-24gb"})
    run = RunningJob(installed, team, bucket, "large", model={"source": f"{bucket}/large"})
    failed = installed.cluster.api.wait_for(run.path, in_state("Failed", "UserError"), seconds=JOB_SECONDS)
    message = condition(failed, "Failed")["message"]
    assert message.startswith("spec.model.source: ")
    for words in ("GiB on each GPU, but rtx4090-24gb gives 23.5", "a GPU such as"):
        assert words in message
    assert installed.trainer_pods(team) == []
    jobs = installed.cluster.api.list(f"/apis/batch/v1/namespaces/{team}/jobs")
    assert [job["metadata"]["name"] for job in jobs] in ([], ["large-prepare"])


def test_uninstalling_leaves_nothing(installed, team, bucket):
    """Last in this file: the others need what it takes away."""
    installed.install()
    run = RunningJob(installed, team, bucket, "cut-short", training={"maxSteps": 500})
    run.wait(in_state("Running"))
    installed.cluster.api.delete(job_path(team, "cut-short"))
    for collection in (f"/apis/batch/v1/namespaces/{team}/jobs", f"/api/v1/namespaces/{team}/pods"):
        installed.cluster.api.wait_for(collection, lambda found: not found["items"], seconds=150)
    installed.uninstall()
    pods = f"/api/v1/namespaces/{installed.system}/pods"
    installed.cluster.api.wait_for(
        pods, lambda found: not found["items"], seconds=60
    )  # helm waits for the Deployment alone
    left = installed.cluster.kubectl(
        "get", "all,cm,sa,roles,rolebindings", "-n", installed.system, "-o", "name"
    ).split()
    assert [name for name in left if "qlora" in name] == []
    cluster_wide = "clusterroles,clusterrolebindings,validatingadmissionpolicies,validatingadmissionpolicybindings"
    left = installed.cluster.kubectl("get", cluster_wide, "-o", "name").split()
    assert [name for name in left if "qlora" in name] == []
    services = installed.cluster.kubectl("get", "services", "-n", team, "-o", "name")
    assert services == ""
