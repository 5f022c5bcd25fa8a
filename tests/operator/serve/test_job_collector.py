"""Job metrics of the operator: counted from their status, for budgets, queues and alerts."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from prometheus_client import CollectorRegistry

from qlora_api.metrics_catalogue import OPERATOR, MetricKind
from qlora_operator.serve.job_collector import JobsCollector
from qlora_operator.state.cache import ObjectCache

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC).timestamp()


class Scraped:
    """A cache with jobs in it, and what is scraped of it at a time of day."""

    def __init__(self) -> None:
        self.cache, self.now, self.operates = ObjectCache(), NOON, True
        self._registry = CollectorRegistry()
        self._registry.register(JobsCollector(self.cache, lambda: self.now, operates=lambda: self.operates))
        self._version = 0

    def job(self, name="one", status=None, namespace="team", **spec):
        """Put a job in, or in the place of the one of its name."""
        self._version += 1
        self.cache.take_job(
            {
                "apiVersion": "qlora.dev/v1alpha1",
                "kind": "QLoRAJob",
                "metadata": {
                    "name": name,
                    "namespace": namespace,
                    "uid": f"uid-{name}",
                    "resourceVersion": str(self._version),
                    "creationTimestamp": "2026-01-01T11:00:00Z",
                },
                "spec": {"parallelism": {"gpusPerWorker": 8}, **spec},
                "status": status or {},
            }
        )

    def pod(self, index, node="node", phase="Running", attempt=1, name="one"):
        """Put a pod in, and the Job that controls it."""
        job, child = ("qlora.dev/v1alpha1", "QLoRAJob", name, f"uid-{name}"), f"{name}-{attempt}"
        self.cache.take_child({"metadata": self._metadata(child, f"job-{child}", attempt, name, job), "spec": {}})
        metadata = self._metadata(
            f"{child}-{index}", f"pod-{child}-{index}", attempt, name, ("batch/v1", "Job", child, f"job-{child}")
        )
        self.cache.take_pod({"metadata": metadata, "spec": {"nodeName": node}, "status": {"phase": phase}})

    def _metadata(self, name, uid, attempt, job, controller):
        self._version += 1
        labels = {"qlora.dev/job": job, "qlora.dev/job-uid": f"uid-{job}", "qlora.dev/attempt": str(attempt)}
        fields = dict(zip(("apiVersion", "kind", "name", "uid"), controller, strict=True))
        return {
            "name": name,
            "namespace": "team",
            "uid": uid,
            "resourceVersion": str(self._version),
            "creationTimestamp": "2026-01-01T11:00:00Z",
            "labels": labels,
            "ownerReferences": [{**fields, "controller": True}],
        }

    def value(self, name, **labels):
        families = {f.name: f for f in self._registry.collect()}
        name = name.removesuffix("_total")
        found = [s.value for s in families[name].samples if labels.items() <= s.labels.items()]
        assert len(found) <= 1, (name, labels, found)
        return found[0] if found else None


@pytest.fixture
def scraped():
    return Scraped()


def attempt(number=1, world_size=16, **more):
    return {"number": number, "worldSize": world_size, "startTime": "2026-01-01T11:10:00Z", **more}


def test_gpus_of_placed_pods_are_held_and_the_others_waited_for(scraped):
    scraped.job(status={"state": "Pending", "reason": "Unschedulable", "attempts": [attempt()]})
    scraped.pod(0)
    scraped.pod(1, node="")
    assert scraped.value("qlora_operator_gpus", namespace="team", state="Held") == 8
    assert scraped.value("qlora_operator_gpus", namespace="team", state="Waiting") == 8


def test_a_pod_that_ended_holds_nothing(scraped):
    scraped.job(status={"state": "Running", "attempts": [attempt()]})
    scraped.pod(0, phase="Failed")
    scraped.pod(1)
    assert scraped.value("qlora_operator_gpus", state="Held") == 8


def test_a_job_that_is_over_neither_holds_nor_waits(scraped):
    over = {"state": "Succeeded", "attempts": [attempt(endTime="2026-01-01T11:30:00Z", reason="Completed")]}
    scraped.job(status={**over, "completionTime": "2026-01-01T11:30:00Z"})
    scraped.pod(0)
    assert scraped.value("qlora_operator_gpus") is None


def test_gpu_time_counts_from_when_all_pods_were_ready(scraped):
    ended = attempt(runningTime="2026-01-01T11:20:00Z", endTime="2026-01-01T11:30:00Z", reason="NodeLost")
    runs = attempt(2, runningTime="2026-01-01T11:50:00Z")
    scraped.job(status={"state": "Running", "attempts": [ended, attempt(3), runs]})
    assert scraped.value("qlora_job_gpu_seconds", job="one") == 16 * (600 + 600)


def test_the_namespaces_counter_grows_by_what_was_used_and_never_falls(scraped):
    scraped.job(status={"state": "Running", "attempts": [attempt(runningTime="2026-01-01T11:50:00Z")]})
    assert scraped.value("qlora_operator_gpu_seconds_total", namespace="team") == 0  # before this process began
    scraped.now += 60
    assert scraped.value("qlora_operator_gpu_seconds_total", namespace="team") == 16 * 60
    scraped.cache.drop(("team", "one"), "job", "uid-one")
    assert scraped.value("qlora_operator_gpu_seconds_total", namespace="team") == 16 * 60


def test_a_job_that_began_since_the_last_scrape_is_counted_whole(scraped):
    scraped.value("qlora_operator_jobs")
    scraped.job(status={"state": "Running", "attempts": [attempt(runningTime="2026-01-01T11:59:00Z")]})
    assert scraped.value("qlora_operator_gpu_seconds_total", namespace="team") == 16 * 60


def test_what_was_used_before_a_standby_takes_over_is_not_counted_anew(scraped):
    scraped.operates = False
    assert scraped.value("qlora_operator_leading") == 0
    scraped.job(status={"state": "Running", "attempts": [attempt(runningTime="2026-01-01T11:50:00Z")]})
    scraped.operates = True
    assert scraped.value("qlora_operator_gpu_seconds_total", namespace="team") == 0
    scraped.now += 60
    assert scraped.value("qlora_operator_gpu_seconds_total", namespace="team") == 16 * 60


def test_the_longest_wait_speaks_for_its_reason(scraped):
    scraped.job("new", status={"state": "Pending", "reason": "Queued"})
    last = attempt(endTime="2026-01-01T11:58:00Z", reason="Preempted")
    scraped.job("again", status={"state": "Pending", "reason": "Queued", "attempts": [last]})
    assert scraped.value("qlora_operator_pending_seconds", reason="Queued") == 3600
    scraped.cache.drop(("team", "new"), "job", "uid-new")
    assert scraped.value("qlora_operator_pending_seconds", reason="Queued") == 120


def test_a_suspended_job_does_not_wait(scraped):
    scraped.job(status={"state": "Pending", "reason": "Suspending"}, suspend=True)
    assert scraped.value("qlora_operator_pending_seconds") is None


def test_ends_are_counted_by_reason_and_the_newest_is_dated(scraped):
    ends = [("OutOfDeviceMemory", "11:10"), ("OutOfDeviceMemory", "11:20"), ("Stalled", "11:15")]
    attempts = [attempt(i, endTime=f"2026-01-01T{at}:00Z", reason=why) for i, (why, at) in enumerate(ends, 1)]
    scraped.job(status={"state": "Pending", "reason": "BackingOff", "attempts": attempts})
    assert scraped.value("qlora_job_attempts", job="one", reason="OutOfDeviceMemory") == 2
    assert scraped.value("qlora_job_attempts", job="one", reason="Stalled") == 1
    assert scraped.value("qlora_job_attempt_end_timestamp_seconds", reason="OutOfDeviceMemory") == NOON - 2400


def test_limits_are_there_while_a_job_is_not_over(scraped):
    policy = {"activeDeadlineSeconds": 7200, "budgetGpuHours": "1.5"}
    ran = {"runningTime": "2026-01-01T10:00:00Z", "endTime": "2026-01-01T10:30:00Z", "reason": "Preempted"}
    attempts = [attempt(1, **ran), attempt(2, runningTime="2026-01-01T11:50:00Z")]
    status = {"state": "Running", "startTime": "2026-01-01T09:30:00Z", "attempts": attempts}
    scraped.job(status=status, policy=policy)
    assert scraped.value("qlora_job_deadline_timestamp_seconds", job="one") == NOON + 7200 - 1800 - 600
    assert scraped.value("qlora_job_budget_gpu_seconds", job="one") == 5400
    scraped.job(status={**status, "earlierGpuSeconds": 8 * 60}, policy=policy)
    assert scraped.value("qlora_job_deadline_timestamp_seconds", job="one") == NOON + 7200 - 1800 - 600 - 60
    assert scraped.value("qlora_job_gpu_seconds", job="one") == 8 * 60 + (1800 + 600) * attempts[0]["worldSize"]
    scraped.job(status={**status, "completionTime": "2026-01-01T12:00:00Z"}, policy=policy)
    assert scraped.value("qlora_job_deadline_timestamp_seconds") is None
    assert scraped.value("qlora_job_budget_gpu_seconds") is None


def test_expected_gpu_time_is_prepares_and_stays_when_the_job_is_over(scraped):
    scraped.job()
    assert scraped.value("qlora_job_expected_gpu_seconds") is None
    scraped.job(status={"state": "Running", "prepared": {"expectedGpuHours": "2.5"}})
    assert scraped.value("qlora_job_expected_gpu_seconds", job="one") == 9000
    over = {"state": "Succeeded", "completionTime": "2026-01-01T12:00:00Z", "prepared": {"expectedGpuHours": "2.5"}}
    scraped.job(status=over)
    assert scraped.value("qlora_job_expected_gpu_seconds", job="one") == 9000


def test_a_job_that_waits_comes_no_nearer_to_its_deadline(scraped):
    for attempts in (
        [],
        [attempt(1)],
        [attempt(1, runningTime="2026-01-01T11:00:00Z", endTime="2026-01-01T11:30:00Z")],
    ):
        status = {"state": "Pending", "startTime": "2026-01-01T11:00:00Z", "attempts": attempts}
        scraped.job(status=status, policy={"activeDeadlineSeconds": 60})
        assert scraped.value("qlora_job_deadline_timestamp_seconds") is None


def test_a_finished_job_says_what_its_ranks_said_last(scraped):
    scraped.job(
        status={
            "state": "Succeeded",
            "completionTime": "2026-01-01T12:00:00Z",
            "progress": {"step": 10, "loss": "1.5", "bestEvalLoss": "1.25", "tokensPerSecond": "100"},
            "memory": {"measured": {"peak": 5}},
        }
    )
    assert scraped.value("qlora_job_final_loss", job="one", namespace="team") == 1.5
    assert scraped.value("qlora_job_final_eval_loss") == 1.25
    assert scraped.value("qlora_job_final_steps") == 10
    assert scraped.value("qlora_job_final_memory_bytes", component="peak") == 5
    assert scraped.value("qlora_job_state", job="one", state="Succeeded") == 1


def test_a_job_that_is_over_for_a_day_is_only_counted(scraped):
    ended = attempt(runningTime="2026-01-01T11:20:00Z", endTime="2026-01-01T11:30:00Z", reason="Completed")
    scraped.job(status={"state": "Succeeded", "completionTime": "2026-01-01T11:30:00Z", "attempts": [ended]})
    assert scraped.value("qlora_job_state") == 1
    scraped.now += 86400
    for name in ("qlora_job_state", "qlora_job_attempts", "qlora_job_gpu_seconds"):
        assert scraped.value(name) is None
    assert scraped.value("qlora_operator_jobs", state="Succeeded") == 1


def test_a_job_whose_status_nobody_wrote_yet_is_pending(scraped):
    scraped.job()
    assert scraped.value("qlora_operator_jobs", state="Pending", reason="Pending") == 1


def test_labels_are_those_of_the_catalogue(scraped):
    scraped.job(status={"state": "Running", "attempts": [attempt(runningTime="2026-01-01T11:50:00Z")]})
    for family in scraped._registry.collect():
        assert OPERATOR[family.name].kind is not MetricKind.HISTOGRAM
        for sample in family.samples:
            assert tuple(sample.labels) == OPERATOR[family.name].labels
