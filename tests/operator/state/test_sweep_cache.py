"""The cache of sweeps, and of jobs by the sweep that controls them."""

from __future__ import annotations

import json

import pytest

from qlora_operator.state.cache import ObjectCache
from qlora_operator.state.sweep_cache import SweepCache

FINISHED = {"observedGeneration": 1, "conditions": [{"type": "Finished", "status": "True"}]}


def sweep(version=1, uid="s", generation=1, **more):
    meta = {
        "name": "search",
        "namespace": "team",
        "uid": uid,
        "resourceVersion": str(version),
        "generation": generation,
    }
    return {"metadata": meta | {"managedFields": ["large"], "labels": {"other": "x"}}, "spec": {}, **more}


def trial(number=0, version=1, uid="s", kind="QLoRASweep", group="qlora.dev", *, controller=True):
    owner = {"apiVersion": f"{group}/v1", "kind": kind, "name": "search", "uid": uid, "controller": controller}
    meta = {"name": f"search-{number}", "namespace": "team", "uid": f"u{number}", "resourceVersion": str(version)}
    job = {"apiVersion": "qlora.dev/v1alpha1", "kind": "QLoRAJob", "spec": {}}
    return job | {"metadata": meta | {"ownerReferences": [owner]}}


def test_of_two_views_of_a_sweep_the_newer_one_counts():
    cache = SweepCache()
    assert cache.take(sweep(3)) == ("team", "search")
    assert cache.take(sweep(2)) is None
    assert cache.take(sweep(1, uid="another")) == ("team", "search"), "a later sweep of the name"
    cache.lose(("team", "search"), "s")
    assert list(cache.held()) == [(("team", "search"), "another")]
    cache.drop(sweep(9, uid="another"))
    assert cache.get(("team", "search")) is None


def test_no_more_of_a_sweep_is_kept_than_is_read():
    cache = SweepCache()
    cache.take(sweep())
    kept = json.loads(cache.get(("team", "search")).body)
    assert (kept["kind"], kept["metadata"]["labels"]) == ("QLoRASweep", {})
    assert "managedFields" not in kept["metadata"]


@pytest.mark.parametrize(
    ("body", "is_quiescent"),
    [
        pytest.param(sweep(), False, id="new"),
        pytest.param(sweep(status=FINISHED), True, id="over"),
        pytest.param(sweep(status=FINISHED, generation=2), False, id="changed-since"),
        pytest.param(sweep(status=FINISHED) | {"spec": {"ttlSecondsAfterFinished": 5}}, False, id="goes-by-itself"),
    ],
)
def test_a_sweep_rests_once_nothing_follows(body, is_quiescent):
    cache = SweepCache()
    cache.take(body)
    assert cache.get(("team", "search")).is_quiescent is is_quiescent


def test_a_job_wakes_the_sweep_that_controls_it_until_it_is_gone():
    woken = []
    cache = ObjectCache(woken.append)
    cache.take_job(trial())
    cache.take_job(trial())  # no news
    assert [name for name, _ in cache.trials_of("s")] == ["search-0"]
    cache.drop_job(trial())
    assert cache.trials_of("s") == []
    assert woken == [("team", "search")] * 2


def test_a_job_that_is_given_to_another_sweep_wakes_both():
    woken = []
    cache = ObjectCache(woken.append)
    cache.take_job(trial())
    cache.take_job(trial(version=2, uid="other"))
    assert (cache.trials_of("s"), len(cache.trials_of("other"))) == ([], 1)
    assert len(woken) == 3


@pytest.mark.parametrize(
    "body",
    [trial(controller=False), trial(kind="Job"), trial(group="example.com")],
    ids=["not-its-controller", "another-kind", "another-group"],
)
def test_only_the_controller_makes_a_job_a_trial(body):
    cache = ObjectCache()
    cache.take_job(body)
    assert cache.trials_of("s") == []
