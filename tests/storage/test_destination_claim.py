"""A destination is for one job: the second is told before it trains, on a folder and on a real S3 server."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from fixtures import use_s3, winners_at_once
from qlora_api.contract import JobRef
from qlora_storage.destination_claim import FIELD, Claim, claim_destination, release_destination
from qlora_storage.errors import UserError
from qlora_storage.object_store import open_store
from services.faulty_s3 import S3Fault, faulty_s3, once_each

OTHER = JobRef(name="other", namespace="team", uid="0000-other")
JOBS = 8


@pytest.fixture
def job():
    return JobRef(name="tune", namespace="team", uid="3f2a9c01-tune")


def claims(place):
    return [key for key, _ in open_store(place, FIELD).list(".claims")]


def test_the_second_job_is_told_who_was_first(place, job):
    claim_destination(place, job)
    claim_destination(place, job)
    told = r"is claimed by job team/tune .*, .* began at \d{4}-.*, less than an hour ago, .*delete .*\.claims"
    with pytest.raises(UserError, match=told):
        claim_destination(place, OTHER)
    assert claims(place) == [".claims/00000001.json"]


def test_another_run_under_the_same_name_is_another_job(place, job):
    claim_destination(place, job)
    with pytest.raises(UserError, match=r"is claimed by job team/tune \(run 3f2a"):
        claim_destination(place, job.model_copy(update={"uid": "1111-elsewhere"}))
    assert claims(place) == [".claims/00000001.json"]


IN_CLUSTER = JobRef(name="tune", namespace="team", uid="3f2a9c01-tune", cluster="c1")
RECREATED = IN_CLUSTER.model_copy(update={"uid": "1111-recreated"})


def test_a_job_that_is_created_anew_in_its_cluster_takes_the_claim_over(place, caplog):
    claim_destination(place, IN_CLUSTER)
    claim_destination(place, RECREATED)
    assert claims(place) == [".claims/00000002.json"]
    assert "(run 3f2a9c01-tune) on" in caplog.text
    assert "passes to this job, which is in its place" in caplog.text
    release_destination(place, IN_CLUSTER.uid)  # the pod of the deleted job may end later than it
    with pytest.raises(UserError, match=r"is claimed by job team/tune \(run 1111-recreated"):
        claim_destination(place, OTHER)


@pytest.mark.parametrize(
    "other",
    [
        RECREATED.model_copy(update={"cluster": "c2"}),
        RECREATED.model_copy(update={"cluster": ""}),
        RECREATED.model_copy(update={"namespace": "other"}),
        RECREATED.model_copy(update={"name": "other"}),
    ],
    ids=["another-cluster", "a-local-run", "another-namespace", "another-name"],
)
def test_no_other_job_takes_the_claim_of_a_clusters_job_over(place, other):
    claim_destination(place, IN_CLUSTER)
    with pytest.raises(UserError, match=r"is claimed by job team/tune \(run 3f2a"):
        claim_destination(place, other)
    release_destination(place, IN_CLUSTER.uid)
    claim_destination(place, other)
    with pytest.raises(UserError, match="is claimed by job"):
        claim_destination(place, IN_CLUSTER)


def test_a_claim_of_version_0_1_is_of_its_run_alone_until_an_attempt_names_the_cluster(place, job):
    time = datetime.now(UTC).isoformat()
    old = {"runUid": job.uid, "namespace": "team", "job": "tune", "time": time, "released": False}
    open_store(place, FIELD).put(".claims/00000001.json", json.dumps(old).encode())
    with pytest.raises(UserError, match=r"or delete .*\.claims if that job is gone"):
        claim_destination(place, RECREATED)
    claim_destination(place, IN_CLUSTER)
    claim_destination(place, RECREATED)
    assert claims(place) == [".claims/00000003.json"]


def test_a_claim_of_a_local_run_is_read_by_version_0_1(place, job):
    claim_destination(place, job)
    claim = json.loads(open_store(place, FIELD).get(".claims/00000001.json"))
    assert claim.keys() == {"runUid", "namespace", "job", "time"}


def test_what_is_released_is_free(place, job):
    claim_destination(place, job)
    release_destination(place, OTHER.uid)
    with pytest.raises(UserError, match="is claimed by"):
        claim_destination(place, OTHER)
    release_destination(place, job.uid)
    claim_destination(place, OTHER)
    with pytest.raises(UserError, match="is claimed by job team/other"):
        claim_destination(place, job)


def claim_of(place, job, **ago):
    """Claim the destination as if it had been some time ago."""
    time = datetime.now(UTC) - timedelta(**ago)
    claim = Claim(run_uid=job.uid, namespace=job.namespace, job=job.name, cluster=job.cluster, time=time)
    open_store(place, FIELD).put(".claims/00000001.json", claim.model_dump_json(by_alias=True).encode())


def test_a_claim_expires_when_no_attempt_has_begun_for_long(place, job, caplog):
    claim_of(place, job, days=14, minutes=1)
    claim_destination(place, OTHER)
    assert claims(place) == [".claims/00000002.json"]
    assert "the claim of job team/tune (run 3f2a" in caplog.text
    assert "has expired: its last attempt began 14 days ago" in caplog.text
    with pytest.raises(UserError, match="is claimed by job team/other"):
        claim_destination(place, job)


def test_a_claim_that_is_not_old_enough_holds_and_its_age_is_told(place, job):
    claim_of(place, job, days=13, hours=23)
    with pytest.raises(
        UserError, match=r"team/tune .*, 13 days ago, .*after 14 days without a new attempt its claim expires"
    ):
        claim_destination(place, OTHER)


def test_an_attempt_renews_the_claim_of_its_job(place, job):
    claim_of(place, job, days=14, minutes=1)
    claim_destination(place, job)
    assert claims(place) == [".claims/00000002.json"]
    with pytest.raises(UserError, match="less than an hour ago"):
        claim_destination(place, OTHER)


def test_of_jobs_that_claim_at_once_exactly_one_succeeds(place, job):
    claim_destination(place, job)
    release_destination(place, job.uid)

    def claim(number):
        claim_destination(place, JobRef(name=f"job-{number}", namespace="team", uid=f"uid-{number}"))

    winners = winners_at_once(JOBS, claim, UserError)
    assert len(winners) == 1
    with pytest.raises(UserError, match=f"job team/job-{winners[0]} "):
        claim_destination(place, OTHER)


def test_what_is_no_claim_is_named(place, job):
    open_store(place, FIELD).put(".claims/00000007.json", b"{}")
    with pytest.raises(UserError, match=r"00000007\.json.* is not a claim of a job; delete it"):
        claim_destination(place, job)


@pytest.fixture
def proxy(s3_server):
    with faulty_s3(s3_server) as running:
        yield running


@pytest.mark.parametrize(
    ("conditions", "said"),
    [
        ("ignored", r"replaces an object where it is told to create it only"),
        ("refused", r"lacks a feature .*conditional"),
    ],
)
def test_a_server_without_conditional_writes_is_found_out_by_doing_it(proxy, monkeypatch, job, conditions, said):
    bucket = use_s3(proxy, monkeypatch)
    proxy.conditions = conditions
    with pytest.raises(UserError, match=said) as refused:
        claim_destination(f"{bucket}/out", job)
    assert str(refused.value).startswith(f"{FIELD}: ")


def test_a_claim_whose_answer_is_lost_is_this_jobs(proxy, monkeypatch, job):
    bucket = use_s3(proxy, monkeypatch)
    proxy.choose = once_each(S3Fault("answer-lost", carried_out=True))
    claim_destination(f"{bucket}/out", job)
    assert claims(f"{bucket}/out") == [".claims/00000001.json"]
