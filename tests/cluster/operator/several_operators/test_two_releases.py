"""Two releases of the operator with different settings serve one namespace: they do not undo each other's work."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from cluster.scenarios.forked_operator import ForkedOperator
from cluster.scenarios.jobs import create_job, in_state, qlora_job
from cluster.scenarios.script import pods_do
from cluster.scenarios.whole_life import made
from cluster.waits import eventually

JOBS = "/apis/batch/v1/namespaces/{}/jobs"
EVENTS = "/apis/events.k8s.io/v1/namespaces/{}/events"
LONG = 60
CONTESTED = "qlora_operator_contested_jobs_total"
NO_PAUSE = {"qlora_operator.decide.plan.LOOK_AGAIN_SECONDS": 0.5}
"""Patch of the operators' modules: they look again after half a second, so that a loop would show at once."""
IMAGES = ("one:1", "other:1")
MOST_WRITES = 40
"""Maximum writes of both operators until one has paused for 1, 2 and 4 seconds. Without pauses there are hundreds in
that time."""


@pytest.fixture
def releases(fork_server, crd_cluster, kwok_namespace, tmp_path):
    """Two operators, by the image that each wants."""
    with ExitStack() as stack:
        made = {
            image: ForkedOperator(
                fork_server,
                tmp_path / image,
                crd_cluster.kubeconfig,
                NO_PAUSE,
                namespaces=[kwok_namespace],
                release=f"system/{image[:-2]}",
                trainer={"image": image},
            )
            for image in IMAGES
        }
        for operator in made.values():
            stack.enter_context(operator)
        yield made


def served_twice(api, namespace):
    return [event for event in api.list(EVENTS.format(namespace)) if event["reason"] == "ServedTwice"]


def image_of(child):
    return child["spec"]["template"]["spec"]["containers"][0]["image"]


def test_a_waiting_job_of_another_release_is_left_alone_and_said(crd_cluster, history, releases, kwok_namespace):
    api, child = crd_cluster.api, f"{JOBS.format(kwok_namespace)}/job-1"
    with pods_do(api, kwok_namespace, {"start-seconds": 600}):
        path = create_job(api, qlora_job(namespace=kwok_namespace))
        api.wait_for(
            EVENTS.format(kwok_namespace), lambda _: served_twice(api, kwok_namespace), seconds=LONG, what="it is said"
        )
        first = api.get(child)
        maker = releases[image_of(first)]
        (other,) = (operator for operator in releases.values() if operator is not maker)
        assert (maker.metrics()[CONTESTED], other.metrics()[CONTESTED]) == (0, 1)
        # A correction of the job is followed by either, once; by the other one here, when the first is gone.
        maker.kill()
        changed = api.patch(path, {"spec": {"scheduling": {"nodeSelector": {"gpu": "none"}}}})
        again = api.wait_for(child, lambda found: found["metadata"]["uid"] != first["metadata"]["uid"], seconds=LONG)
        assert again["metadata"]["annotations"]["qlora.dev/generation"] == str(changed["metadata"]["generation"])
        assert image_of(again) != image_of(first)
        assert again["spec"]["template"]["spec"]["nodeSelector"] == {"gpu": "none"}
    assert made(history, "jobs", kwok_namespace) == {"1": 2}
    assert len(served_twice(api, kwok_namespace)) == 1


def test_a_release_that_is_gone_leaves_nothing_behind_that_waits_for_ever(
    crd_cluster, history, releases, kwok_namespace
):
    api, child = crd_cluster.api, f"{JOBS.format(kwok_namespace)}/job-1"
    path = create_job(api, qlora_job(namespace=kwok_namespace, scheduling={"nodeSelector": {"gpu": "none"}}))
    api.wait_for(
        EVENTS.format(kwok_namespace), lambda _: served_twice(api, kwok_namespace), seconds=LONG, what="it is said"
    )
    maker = image_of(api.get(child))
    (other,) = set(IMAGES) - {maker}
    releases[maker].kill()
    releases[other].kill()
    releases[other].start()
    api.wait_for(child, lambda found: image_of(found) == other, seconds=LONG, what="it is made anew")
    waiting = api.wait_for(path, in_state("Pending", "Unschedulable"), seconds=LONG)
    assert [a["number"] for a in waiting["status"]["attempts"]] == [1]
    assert made(history, "jobs", kwok_namespace) == {"1": 2}


def test_releases_that_decide_differently_replace_each_others_status_less_and_less_often(
    crd_cluster, history, fork_server, kwok_namespace, tmp_path
):
    """One of them is a version that does not tell a missing priority class from other refusals."""
    versions = {"one": {}, "other": {"qlora_operator.decide.refusal._REMEDIES": []}}
    with ExitStack() as stack:
        both = [
            stack.enter_context(
                ForkedOperator(
                    fork_server, tmp_path / name, crd_cluster.kubeconfig, constants, namespaces=[kwok_namespace]
                )
            )
            for name, constants in versions.items()
        ]
        create_job(crd_cluster.api, qlora_job(namespace=kwok_namespace, scheduling={"priorityClassName": "none"}))
        for operator in both:
            paused = eventually(lambda log=operator.log: "written again in 8 s" in log.read_text(), LONG)
            assert paused, f"no pause in {len(history.of('qlorajobs', kwok_namespace))} writes"
            assert (
                f"{kwok_namespace}/job: another program replaces what this one writes into" in operator.log.read_text()
            )
        reasons = [job["status"]["reason"] for job in history.of("qlorajobs", kwok_namespace)]
    assert {"MissingReference", "Refused"} <= set(reasons)
    assert len(reasons) < MOST_WRITES
