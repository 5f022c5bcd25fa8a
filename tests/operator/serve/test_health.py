"""Liveness and readiness of the operator."""

from __future__ import annotations

import pytest

from qlora_operator.serve.health import SLACK_SECONDS, WATCH_SECONDS, Watches

LONG = WATCH_SECONDS + SLACK_SECONDS + 1
JOBS, PODS = "/apis/batch/v1/jobs", "/api/v1/pods"


def after(*steps: str | float, each: int = 1) -> Watches:
    """Watches of jobs and pods, after requests and waits in this order."""
    now = [0.0]
    watches = Watches(("jobs", "pods"), each, lambda: now[0])
    for step in steps:
        if isinstance(step, str):
            watches.note(step)
        else:
            now[0] += step
    return watches


def watch(path: str) -> str:
    return f"{path}?watch=true&resourceVersion=7"


@pytest.mark.parametrize(
    ("steps", "stale", "missing"),
    [
        pytest.param([], [], ["jobs", "pods"], id="just-started"),
        pytest.param([f"{JOBS}?limit=500"], [], ["jobs", "pods"], id="a-listing-is-no-watch"),
        pytest.param([watch(JOBS), watch(PODS)], [], [], id="all-watched"),
        pytest.param([watch(JOBS), watch(PODS), LONG, watch(JOBS)], ["pods"], [], id="one-ended-for-good"),
        pytest.param([watch(JOBS), LONG, watch(JOBS)], ["pods"], ["pods"], id="one-never-came"),
        pytest.param([watch(JOBS), watch(PODS), WATCH_SECONDS], [], [], id="within-its-time"),
        pytest.param([watch("/api/v1/events"), watch("/api/v1/jobs/x")], [], ["jobs", "pods"], id="of-something-else"),
    ],
)
def test_a_watch_that_was_not_asked_for_in_time_is_stale(steps, stale, missing):
    watches = after(*steps)
    assert (watches.stale(), watches.missing()) == (stale, missing)


def test_the_watch_of_one_namespace_does_not_hide_that_another_ones_ended():
    here, there, pods = "/apis/batch/v1/namespaces/here/jobs", "/apis/batch/v1/namespaces/there/jobs", PODS
    watches = after(watch(here), watch(there), watch(pods), LONG, watch(here), watch(pods), each=2)
    assert watches.stale() == [there, "pods"]
    assert watches.missing() == ["pods"]
