"""Objects that the cache takes for a job's own, and what it keeps of them."""

from __future__ import annotations

import contextlib
import json

import pytest

from qlora_api.untrusted.printable import is_printable
from qlora_operator.state.cache import ObjectCache
from qlora_operator.state.observed import NotOwnedError
from services.hostile_rank import TERMINAL

UID, KEY = "uid-of-the-job", ("team", "job")
QLORA_JOB = {"apiVersion": "qlora.dev/v1alpha1", "kind": "QLoRAJob", "name": "job", "uid": UID, "controller": True}
CHILD = {"apiVersion": "batch/v1", "kind": "Job", "name": "job-1", "uid": "uid-of-job-1", "controller": True}


def meta(name, uid, *owners, version=1, **labels):
    return {
        "name": name,
        "namespace": "team",
        "uid": uid,
        "resourceVersion": str(version),
        "creationTimestamp": "2026-01-01T11:00:00Z",
        "labels": {"qlora.dev/job": "job", "qlora.dev/job-uid": UID, "qlora.dev/attempt": "1", **labels},
        "ownerReferences": list(owners),
    }


def qlora_job(version=1, status=None, **more):
    metadata = {"name": "job", "namespace": "team", "uid": UID, "resourceVersion": str(version), **more}
    return {
        "apiVersion": "qlora.dev/v1alpha1",
        "kind": "QLoRAJob",
        "metadata": metadata,
        "spec": {},
        "status": status or {},
    }


def child(*owners, name="job-1", **more):
    return {"metadata": meta(name, f"uid-of-{name}", *(owners or (QLORA_JOB,)), **more), "spec": {}}


def pod(*owners, name="pod", **more):
    return {"metadata": meta(name, f"uid-of-{name}", *owners, **more), "spec": {"nodeName": "node"}}


@pytest.fixture
def cache():
    made = ObjectCache()
    made.take_job(qlora_job())
    made.take_child(child())
    return made


def test_a_pod_that_a_job_of_the_jobs_controls_is_its_own(cache):
    assert cache.take_pod(pod(CHILD)) == KEY
    assert [p.name for p in cache[KEY].own_pods()] == ["pod"]


@pytest.mark.parametrize(
    "forged",
    [
        pytest.param(pod(), id="nobodys"),
        pytest.param(pod(QLORA_JOB), id="the-jobs-itself"),
        pytest.param(pod({**CHILD, "controller": False}), id="owned-and-not-controlled"),
        pytest.param(pod({**CHILD, "uid": "uid-of-another"}), id="of-a-job-that-the-operator-does-not-know"),
        pytest.param(pod({**CHILD, "apiVersion": "tenant.dev/v1"}), id="of-another-kind-of-job"),
        pytest.param(pod(CHILD, **{"qlora.dev/attempt": "2"}), id="of-another-attempt"),
    ],
)
def test_a_pod_with_the_labels_alone_is_not(cache, forged):
    with contextlib.suppress(NotOwnedError):
        cache.take_pod(forged)
    assert cache[KEY].own_pods() == ()


@pytest.mark.parametrize(
    "forged",
    [
        pytest.param(child({**QLORA_JOB, "controller": False}), id="owned-and-not-controlled"),
        pytest.param(child({**QLORA_JOB, "kind": "CronJob", "apiVersion": "batch/v1"}), id="of-another-kind"),
        pytest.param(child({**QLORA_JOB, "name": "another"}), id="of-another-name"),
        pytest.param(child(name="job-7"), id="under-a-name-that-the-operator-does-not-give"),
    ],
)
def test_a_job_that_the_job_does_not_control_is_not_its_child(forged):
    cache = ObjectCache()
    cache.take_job(qlora_job())
    with pytest.raises(NotOwnedError):
        cache.take_child(forged)
    assert cache[KEY].own_children() == ()


def test_a_job_of_an_earlier_job_of_the_same_name_is_not_its_child():
    cache = ObjectCache()
    cache.take_job(qlora_job())
    cache.take_child(child({**QLORA_JOB, "uid": "uid-of-an-earlier-one"}))
    assert cache[KEY].own_children() == ()


def test_pods_outlive_their_job_and_are_known_by_what_status_recorded_of_it(cache):
    cache.take_pod(pod(CHILD))
    cache.drop_child(child())
    cache.take_job(qlora_job(2))
    assert len(cache[KEY].own_pods()) == 1
    begun = ObjectCache()  # an operator that starts when the Job is gone already
    begun.take_pod(pod(CHILD))
    begun.take_job(qlora_job())
    assert begun[KEY].own_pods() == ()
    begun.take_job(qlora_job(2, {"attempts": [{"number": 1, "jobUid": CHILD["uid"]}]}))
    assert len(begun[KEY].own_pods()) == 1


def test_a_pod_that_its_job_released_is_not_its_own_any_more(cache):
    cache.take_pod(pod(CHILD))
    with pytest.raises(NotOwnedError):
        cache.take_pod(pod(version=2))
    assert cache[KEY].own_pods() == ()


def test_a_forged_pod_that_is_deleted_leaves_nothing_behind(cache):
    cache.take_pod(pod({**CHILD, "uid": "uid-of-another"}))
    cache.drop_pod(pod({**CHILD, "uid": "uid-of-another"}))
    assert cache[KEY].pods == {}


def test_texts_of_pods_jobs_and_events_are_fit_to_be_shown(cache):
    terminated = {"exitCode": 1, "reason": TERMINAL, "message": TERMINAL}
    status = {
        "reason": TERMINAL,
        "message": TERMINAL,
        "conditions": [{"type": "PodScheduled", "status": "False", "message": TERMINAL}],
        "containerStatuses": [{"name": "trainer", "state": {"terminated": terminated}}],
    }
    cache.take_pod({**pod(CHILD), "status": status})
    conditions = [{"type": "Failed", "status": "True", "reason": TERMINAL, "message": TERMINAL}]
    cache.take_child({**child(version=2), "status": {"conditions": conditions}})
    involved = {"namespace": "team", "name": "job-1", "uid": "uid-of-job-1"}
    assert cache.take_refusal({"involvedObject": involved, "message": f"no pods: {TERMINAL}"}) == KEY
    (kept,), known = cache[KEY].own_pods(), cache[KEY]
    texts = [kept.message, kept.exit_reason, kept.pod_reason, kept.pod_message, kept.unschedulable, known.pods_refused]
    texts += [text for job in known.own_children() for text in (job.message, job.failed_reason)]
    assert len(texts) == 8
    assert all(is_printable(text) and text.endswith("end") for text in texts), texts


def test_the_label_of_a_job_that_its_children_get_is_kept(cache):
    cache.take_job(qlora_job(2, labels={"kueue.x-k8s.io/priority-class": "urgent", "team": "search"}))
    assert json.loads(cache[KEY].job.body)["metadata"]["labels"] == {"kueue.x-k8s.io/priority-class": "urgent"}


def test_of_an_object_no_more_is_kept_than_is_needed(cache):
    cache.take_job(
        qlora_job(
            2,
            labels={f"label-{number}": "x" * 60 for number in range(15_000)},
            annotations={"a": "x" * 250_000},
            finalizers=[f"tenant.dev/{number}" for number in range(15_000)],
            managedFields=[{"fieldsV1": {"f:x": {}}}],
        )
    )
    assert len(cache[KEY].job.body) < 1_000
    large = pod(CHILD)
    large["status"] = {"message": "x" * 10**6, "reason": "y" * 10**6}
    cache.take_pod(large)
    (kept,) = cache[KEY].own_pods()
    assert len(kept.pod_message) + len(kept.pod_reason) < 10_000
