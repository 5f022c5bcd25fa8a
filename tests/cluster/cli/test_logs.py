"""Logs of all ranks through the API server, from pods that the operator made."""

from __future__ import annotations

import importlib.util
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.kwok import finish_pod
from cluster.scenarios.jobs import in_state, job_path
from cluster.scenarios.script import pods_do

PODS = "/api/v1/namespaces/{}/pods"
HERE = {"nodeSelector": {"logs": "here"}, "tolerations": [{"key": "logs", "operator": "Exists"}]}


def _kubelet():
    spec = importlib.util.spec_from_file_location("kubelet", Path(__file__).with_name("kubelet.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Kubelet


@pytest.fixture(scope="module")
def kubelet(crd_cluster):
    taint = {"key": "logs", "effect": "NoSchedule"}
    (node,) = crd_cluster.add_kwok_nodes(1, labels={"logs": "here"}, taints=[taint], prefix="logs")
    with _kubelet()(crd_cluster, node, crd_cluster.address) as running:
        yield running
    crd_cluster.api.delete(f"/api/v1/nodes/{node}")


def running_pods(api, namespace, name, attempt=1):
    """Names of an attempt's pods, by worker."""
    selector = f"qlora.dev/job={name},qlora.dev/attempt={attempt}"
    deadline = time.monotonic() + 30
    while True:
        pods = api.list(PODS.format(namespace), labelSelector=selector)
        if pods and all(p.get("status", {}).get("phase") == "Running" for p in pods):
            break
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return sorted((p["metadata"]["name"] for p in pods), key=lambda n: n.rsplit("-", 2)[-2])


@pytest.fixture
def two_workers(qlora, manifest, api, kubelet):
    """A job of two workers that runs; names of its pods."""
    qlora("submit", manifest("pair", workers=2, scheduling=HERE))
    api.wait_for(job_path(qlora.namespace, "pair"), in_state("Running"), seconds=60)
    yield running_pods(api, qlora.namespace, "pair")
    qlora("cancel", "pair", "--yes")
    api.wait_gone(job_path(qlora.namespace, "pair"))


def test_ranks_are_merged_by_time_and_named(qlora, kubelet, two_workers):
    first, second = two_workers
    kubelet.write(first, "d t rank 0 INFO step 1", at=1)
    kubelet.write(second, "d t rank 1 INFO step 1", "  traceback", at=2)
    kubelet.write(first, "d t rank 0 INFO step 2", at=3)
    said = qlora("logs", "pair")
    assert said.out.splitlines() == [
        "rank 0   │ d t rank 0 INFO step 1",
        "rank 1   │ d t rank 1 INFO step 1",
        "rank 1   │   traceback",
        "rank 0   │ d t rank 0 INFO step 2",
    ]
    assert qlora("logs", "pair", "--rank", "1", "--timestamps").out.splitlines() == [
        "rank 1   │ 2026-01-01T00:00:02.000000000Z d t rank 1 INFO step 1",
        "rank 1   │ 2026-01-01T00:00:02.001000000Z   traceback",
    ]
    assert qlora("logs", "pair", "--worker", "0", "--tail", "1").out == "rank 0   │ d t rank 0 INFO step 2\n"
    assert qlora("logs", "pair", "--since", "5m").code == 0
    assert kubelet.asked[-1]["sinceSeconds"] == "300"
    nothing = qlora("logs", "pair", "--attempt", "7")
    assert (nothing.code, nothing.err) == (
        40,
        'job "pair" has no log of what is asked for; there are logs of attempt 1\n',
    )


@contextmanager
def following(qlora, *arguments):
    """``qlora logs --follow`` as a process; a function that waits for a line."""
    process = qlora.start("logs", "--follow", *arguments)
    lines, errors = [], []
    readers = [
        threading.Thread(target=lambda stream=stream, into=into: into.extend(iter(stream.readline, "")), daemon=True)
        for stream, into in ((process.stdout, lines), (process.stderr, errors))
    ]
    for reader in readers:
        reader.start()

    def wait_for(text, seconds=30):
        deadline = time.monotonic() + seconds
        while not any(text in line for line in lines):
            assert time.monotonic() < deadline, (text, lines, errors)
            time.sleep(0.05)
        return [line.rstrip("\n") for line in lines]

    try:
        yield process, wait_for
    finally:
        process.kill()
        process.wait()
        for reader in readers:
            reader.join()
        process.stdout.close()
        process.stderr.close()


def test_following_goes_on_over_breaks_and_attempts_until_the_job_is_over(qlora, manifest, api, kubelet):
    crash = {"stop-exit-code": 1}
    with pods_do(api, qlora.namespace, crash, job="long"):
        qlora("submit", manifest("long", scheduling=HERE))
        (pod,) = running_pods(api, qlora.namespace, "long")
        kubelet.write(pod, "d t rank 0 INFO one")
        with following(qlora, "long") as (process, wait_for):
            wait_for("INFO one")
            kubelet.write(pod, "d t rank 0 INFO two")
            wait_for("INFO two")
            kubelet.cut(pod)
            kubelet.write(pod, "d t rank 0 INFO three")
            wait_for("INFO three")
            kubelet.end(pod)
            finish_pod(api, qlora.namespace, pod, exit_code=1)
            (again,) = running_pods(api, qlora.namespace, "long", attempt=2)
            kubelet.write(again, "d t rank 0 INFO four")
            kubelet.end(again)
            lines = wait_for("INFO four")
            finish_pod(api, qlora.namespace, again, message='{"exitCode": 0, "reason": "Completed"}')
            api.wait_for(job_path(qlora.namespace, "long"), in_state("Succeeded"))
            assert process.wait(20) == 0
    assert lines == [
        *(f"rank 0   │ d t rank 0 INFO {n}" for n in ("one", "two", "three")),
        "── attempt 2 ──",
        "rank 0   │ d t rank 0 INFO four",
    ]


def test_a_job_that_waits_says_why_there_is_no_log(qlora, manifest, api):
    qlora("submit", manifest("unplaced", scheduling={"nodeSelector": {"no": "such"}}))
    api.wait_for(job_path(qlora.namespace, "unplaced"), in_state("Pending", "Unschedulable"))
    said = qlora("logs", "unplaced")
    assert said.code == 40
    assert said.err.startswith('job "unplaced" has written no log yet, it is Pending (Unschedulable): ')
    assert "spec.scheduling.nodeSelector matches no node" in said.err
    process = qlora.start("logs", "--follow", "unplaced")
    assert process.stderr.readline() == said.err  # at once, not when there is a line
    process.kill()
    process.communicate()
    qlora("cancel", "unplaced", "--yes")
