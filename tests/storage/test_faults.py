"""Every kind of bad answer, at every call of a store: repeated, or the user's to mend, and said at once."""

import logging
import os
from dataclasses import replace

import pytest

from fixtures import use_s3
from qlora_storage import buckets, retry
from qlora_storage.backend import MIB
from qlora_storage.buckets import BucketBackend
from qlora_storage.errors import AlreadyExistsError, StorageError, UserError
from qlora_storage.object_store import Store, open_store
from services.faulty_s3 import FINAL, TRANSIENT, S3Fault, faulty_s3, once_each

FIELD = "spec.output.destination"
DATA = bytes(range(256)) * 16
SMALL_PARTS = buckets.UploadPace(5 * MIB, 2)


@pytest.fixture
def proxy(s3_server):
    with faulty_s3(s3_server) as running:
        yield running


@pytest.fixture
def bucket(proxy, monkeypatch):
    return use_s3(proxy, monkeypatch)


def use_every_call(bucket, large):
    """Write, read, list and delete, small and in parts; what a run does."""
    store = open_store(f"{bucket}/run", FIELD, patience_seconds=30)
    store.put("adapter/config.json", DATA)
    store.put("adapter/weights", large)
    try:
        store.create("manifest.json", DATA)
    except AlreadyExistsError:  # by this very call, whose answer was lost
        assert store.get("manifest.json") == DATA
    assert store.get("adapter/config.json") == DATA
    assert store.sha256("adapter/weights")
    assert store.read("adapter/weights", 8, 16) == (large[8:16], len(large))
    assert store.stat("adapter/config.json").size == len(DATA)
    assert store.stat("nothing") is None
    assert store.list() == [
        ("adapter/config.json", len(DATA)),
        ("adapter/weights", len(large)),
        ("manifest.json", len(DATA)),
    ]
    store.delete("adapter")
    assert store.list() == [("manifest.json", len(DATA))]


@pytest.mark.parametrize("fault", TRANSIENT, ids=lambda fault: fault.name)
def test_what_goes_away_by_itself_is_repeated_at_every_call(proxy, bucket, monkeypatch, s3_server, fault):
    monkeypatch.setattr(buckets, "PACES", (SMALL_PARTS,))
    monkeypatch.setattr(retry, "FIRST_WAIT_SECONDS", 0.02)
    proxy.choose = once_each(fault)
    use_every_call(bucket, os.urandom(11 * MIB))
    assert proxy.faults[fault.name] > 10
    assert [p.name for p in (s3_server.folder_of(bucket.removeprefix("s3://")) / "run").iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("fault", FINAL, ids=lambda fault: fault.name)
@pytest.mark.parametrize("action", ["put", "create", "get", "stat", "list", "delete"])
def test_what_only_the_user_can_mend_is_said_at_once_with_its_field(proxy, bucket, caplog, fault, action):
    store = open_store(f"{bucket}/run", FIELD)
    store.put("key", DATA)
    proxy.choose = lambda call, _times: fault if call[0] != "HEAD" or fault.status != 404 else None
    acts = {"put": ("key", DATA), "create": ("key", DATA), "list": ()}
    if (fault.status, action) == (404, "stat"):
        pytest.skip("the answer to a HEAD does not tell a missing bucket from a missing object")
    with pytest.raises(UserError) as refused:
        getattr(store, action)(*acts.get(action, ("key",)))
    assert str(refused.value).startswith(f'{FIELD}: "{bucket}/run"')
    assert "spec.output.credentials" in str(refused.value)
    assert "next try in" not in caplog.text


def test_another_region_is_named(proxy, bucket):
    proxy.choose = lambda _call, _times: FINAL[1]
    with pytest.raises(UserError, match=r"the bucket is in another region \(eu-west-1\) than AWS_REGION says"):
        open_store(bucket, FIELD).get("key")


def test_a_wrong_clock_is_named_with_how_far_it_is_off(proxy, bucket):
    proxy.choose = lambda _call, _times: next(f for f in TRANSIENT if f.name == "clock")
    with pytest.raises(StorageError, match=r"the clock of this machine is 20\.0 minutes behind the server's: set it"):
        open_store(bucket, FIELD, patience_seconds=1).get("key")


def test_a_slow_line_gets_smaller_parts_one_at_a_time(proxy, bucket, monkeypatch, caplog):
    """Two parts at once need 3 s, one smaller part alone 1.25 s, and a request may take 2.5 s.

    The patience is shorter than a request, as it is on a line that needs minutes for one.
    """
    monkeypatch.setattr(buckets, "PACES", (buckets.UploadPace(6 * MIB, 2), buckets.UploadPace(5 * MIB, 1)))
    proxy.uplink_bytes_per_second = 4 * MIB
    data = os.urandom(12 * MIB)
    store = Store(BucketBackend("s3", bucket.removeprefix("s3://"), "", request_seconds=2.5), bucket, FIELD, 0)
    with caplog.at_level(logging.WARNING):
        store.put("weights", data)
    assert "no answer came in time" in caplog.text
    proxy.uplink_bytes_per_second = None
    assert store.get("weights") == data


def test_a_line_on_which_no_part_is_through_in_time_gets_more_time(proxy, bucket, monkeypatch, caplog):
    """A part alone needs 2.5 s, and a request may take half a second at first, then twenty."""
    alone = buckets.UploadPace(5 * MIB, 1)
    monkeypatch.setattr(buckets, "PACES", (alone, alone, replace(alone, times=40)))
    proxy.uplink_bytes_per_second = 2 * MIB
    data = os.urandom(6 * MIB)
    store = Store(BucketBackend("s3", bucket.removeprefix("s3://"), "", request_seconds=0.5), bucket, FIELD, 0)
    with caplog.at_level(logging.WARNING):
        store.put("weights", data)
        store.create("manifest.json", data[: 2 * MIB])
    assert caplog.text.count("no answer came in time") == 2
    assert store.get("weights") == data


def test_a_read_may_take_long_as_long_as_bytes_come(proxy, bucket, caplog):
    data = os.urandom(3 * MIB)
    store = Store(BucketBackend("s3", bucket.removeprefix("s3://"), "", request_seconds=2), bucket, FIELD, 0)
    store.put("weights", data)
    proxy.downlink_bytes_per_second = MIB / 2
    assert store.get("weights") == data
    assert store.read("weights", 0, 2 * MIB) == (data[: 2 * MIB], len(data))
    assert "no answer came in time" not in caplog.text


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("action", ["put", "create", "get", "stat", "list", "delete"])
def test_a_busy_server_is_left_alone_for_as_long_as_it_says(proxy, bucket, caplog, status, action):
    store = open_store(f"{bucket}/run", FIELD)
    store.put("key", DATA)
    answers = iter([S3Fault("busy", status, "SlowDown", (("Retry-After", "1"),))] * (3 if action == "stat" else 2))
    proxy.choose = lambda _call, _times: next(answers, None)
    proxy.times.clear()
    act = {"put": ("key", DATA), "create": ("new", DATA), "list": ()}.get(action, ("key",))
    with caplog.at_level(logging.WARNING):
        getattr(store, action)(*act)
    assert [record.args[1] for record in caplog.records if "next try" in record.msg] == [1]
    asked = 3 if action == "stat" else 2  # a HEAD is asked again by GET; then one request for the time
    assert proxy.times[asked][0] - proxy.times[asked - 1][0] >= 1


def test_an_upload_that_fails_leaves_no_parts_behind(proxy, bucket, monkeypatch):
    """Parts of an upload that is not ended are in no listing, and are paid for."""
    monkeypatch.setattr(buckets, "PACES", (SMALL_PARTS,))
    denied = next(fault for fault in FINAL if fault.name == "denied")
    proxy.choose = lambda call, _times: denied if call[0] == "PUT" and "partNumber" in call[2] else None
    store = open_store(f"{bucket}/run", FIELD)
    with pytest.raises(UserError, match="access is denied"):
        store.put("weights", bytes(11 * MIB))
    begun = [call for call in proxy.calls if call[0] == "POST" and call[2] == "uploads"]
    ended = [call for call in proxy.calls if call[0] == "DELETE" and call[2] == "uploadId"]
    assert (len(begun), len(ended)) == (1, 1)
    assert store.list() == []
