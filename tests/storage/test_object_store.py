"""Every promise of the store, on a folder and on a real S3 server."""

import logging
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from fixtures import use_s3, winners_at_once
from qlora_storage import object_store
from qlora_storage.backend import CHUNK_BYTES
from qlora_storage.buckets import BucketBackend
from qlora_storage.errors import StorageError, UserError
from qlora_storage.folders import create_without_links
from qlora_storage.object_store import (
    AlreadyExistsError,
    NotFoundError,
    Store,
    local_path,
    open_store,
    sha256_bytes,
    sha256_file,
)
from services.versitygw import VersityGateway

FIELD = "spec.output.destination"
LARGE = CHUNK_BYTES + 1_000_003
WRITERS = 8


@pytest.fixture
def store(place):
    return open_store(place, FIELD)


def test_an_empty_endpoint_is_none(monkeypatch):
    """A Secret made of a variable that was not set has one."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    open_store("s3://bucket/folder", FIELD)
    assert "AWS_ENDPOINT_URL" not in os.environ
    assert os.environ["AWS_ENDPOINT_URL_S3"] == "http://127.0.0.1:9"


# ----------------------------------------------------------------------------------------------------- what is promised


def test_an_object_reads_back_as_it_was_written_last(store):
    store.put("a/b.txt", b"first")
    store.put("a/b.txt", b"second")
    assert store.get("a/b.txt") == b"second"
    assert store.list() == [("a/b.txt", 6)]


@pytest.mark.parametrize("size", [pytest.param(0, id="empty"), pytest.param(LARGE, id="larger-than-one-request")])
def test_files_of_any_size_survive_the_round_trip(store, tmp_path, size):
    data = os.urandom(size)
    (tmp_path / "source").write_bytes(data)
    store.put("weights/file", tmp_path / "source")
    assert store.get("weights/file") == data
    assert store.sha256("weights/file") == sha256_bytes(data) == sha256_file(tmp_path / "source")
    store.download("weights", tmp_path / "copy")
    assert (tmp_path / "copy" / "file").read_bytes() == data


def test_what_is_not_there_is_said_to_be_not_there(store):
    with pytest.raises(NotFoundError, match=r"nothing\.json: not found"):
        store.get("nothing.json")
    assert store.stat("nothing.json") is None
    assert store.list("no/such/folder") == []


def test_a_folder_is_not_a_prefix_of_names(store):
    store.put("step-1/x", b"1")
    store.put("step-10/x", b"10")
    assert store.list("step-1") == [("step-1/x", 1)]
    store.delete("step-1")
    assert store.list() == [("step-10/x", 2)]


def test_deleting_takes_a_folder_an_object_and_what_is_not_there(store):
    for key in ("folder/deep/x", "folder/y", "single", "stays"):
        store.put(key, b"")
    for key in ("folder", "single", "never-there"):
        store.delete(key)
    assert [key for key, _ in store.list()] == ["stays"]


def test_names_with_blanks_and_signs_keep_their_spelling(store):
    store.put("ä b%20c/+x=1.txt", b"1")
    assert store.list("ä b%20c") == [("ä b%20c/+x=1.txt", 1)]
    assert store.get("ä b%20c/+x=1.txt") == b"1"


def test_create_refuses_a_name_that_is_taken(store):
    store.create("manifest.json", b"mine")
    with pytest.raises(AlreadyExistsError):
        store.create("manifest.json", b"theirs")
    assert store.get("manifest.json") == b"mine"


def test_of_writers_that_create_at_once_exactly_one_wins(place):
    stores = [open_store(place, FIELD) for _ in range(WRITERS)]

    def create(number):
        stores[number].create("manifest.json", b"writer %d" % number)

    winners = winners_at_once(WRITERS, create, AlreadyExistsError)
    assert len(winners) == 1
    assert open_store(place, FIELD).get("manifest.json") == b"writer %d" % winners[0]


def test_without_hard_links_still_exactly_one_creates(tmp_path):
    def create(number):
        create_without_links(tmp_path / "manifest.json", b"%d" % number)

    winners = winners_at_once(WRITERS, create, FileExistsError)
    assert len(winners) == 1
    assert (tmp_path / "manifest.json").read_bytes() == b"%d" % winners[0]


@pytest.mark.parametrize("key", ["../outside", "a/../../outside", "/etc/passwd", "a//b", "."])
def test_no_key_leaves_the_folder(store, key):
    for act in (store.get, store.delete, store.uri, lambda k: store.put(k, b"")):
        with pytest.raises(ValueError, match="empty parts"):
            act(key)


def test_a_store_says_where_an_object_is(place, store):
    store.put("a/b", b"1")
    parent, _, name = store.uri("a/b").rpartition("/")
    assert open_store(parent, FIELD).get(name) == b"1"
    assert store.uri() == place


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        pytest.param("ftp://host/x", "must start with s3://", id="unknown-scheme"),
        pytest.param("s3://", "must name a folder", id="no-bucket"),
        pytest.param("s3://bucket/../other", "must name a folder", id="climbs-out"),
        pytest.param("pvc://claim/../../etc", "must name a folder", id="leaves-the-claim"),
        pytest.param("gs://bucket//x", "must name a folder", id="empty-part"),
    ],
)
def test_a_uri_that_names_no_place_is_the_users_error(uri, said):
    with pytest.raises(UserError, match=said) as caught:
        open_store(uri, FIELD)
    assert str(caught.value).startswith(f'{FIELD}: "{uri}"')
    assert caught.value.exit_code == 40


@pytest.mark.parametrize(
    ("changes", "bucket", "said"),
    [
        pytest.param({"AWS_SECRET_ACCESS_KEY": "wrong"}, None, "403 SignatureDoesNotMatch", id="wrong-secret"),
        pytest.param({"AWS_ACCESS_KEY_ID": "wrong"}, None, "access is denied", id="unknown-key"),
        pytest.param(
            {"AWS_SECRET_ACCESS_KEY": ""},
            None,
            "AWS_SECRET_ACCESS_KEY: is missing or empty",
            id="half-of-the-credentials",
        ),
        pytest.param({"AWS_ALLOW_HTTP": ""}, None, "AWS_ALLOW_HTTP=true", id="plain-http-was-not-asked-for"),
        pytest.param({}, "s3://no-such-bucket", "no such bucket", id="missing-bucket"),
    ],
)
@pytest.mark.parametrize("action", ["put", "create", "get", "list", "delete"])
def test_a_place_that_does_not_let_us_in_is_the_users_to_mend(s3, monkeypatch, caplog, changes, bucket, said, action):
    for name, value in changes.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    with pytest.raises(UserError, match=said) as caught:
        _call(open_store(bucket or s3, FIELD), action)
    assert "spec.output.credentials" in str(caught.value)
    assert "AWS_ACCESS_KEY_ID" in str(caught.value)
    assert "next try in" not in caplog.text, "there was nothing to wait for"


def test_without_any_credentials_the_user_is_told_which_are_missing(s3, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")  # no cloud's machine
    with pytest.raises(UserError, match="no credentials were found"):
        open_store(s3, FIELD).list()


@pytest.mark.parametrize(
    ("uri", "changes", "said"),
    [
        pytest.param("az://container/x", {}, "AZURE_STORAGE_ACCOUNT_NAME", id="azure-without-account"),
        pytest.param(
            "gs://bucket/x", {"GOOGLE_APPLICATION_CREDENTIALS": "/nowhere.json"}, "/nowhere.json", id="google-key-file"
        ),
    ],
)
def test_incomplete_environments_are_named_when_a_store_is_opened(monkeypatch, uri, changes, said):
    for name in [n for n in os.environ if n.startswith(("AZURE_", "GOOGLE_"))]:
        monkeypatch.delenv(name)
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        open_store(uri, FIELD)


def test_the_evaluation_rows_credentials_are_those_of_the_training_rows(s3, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UserError, match=r"spec\.dataset\.train\.credentials"):
        open_store(s3, "spec.dataset.eval.source").list()


def _call(store, action):
    arguments = {"put": ("k", b"1"), "create": ("k", b"1"), "get": ("k",), "list": (), "delete": ("k",)}[action]
    getattr(store, action)(*arguments)


# ---------------------------------------------------------------------------------------------------- servers that fail


@pytest.fixture
def own_server(s3_server, tmp_path):
    """A server that the test may stop; ``s3_server`` sees to it that there is one to be had."""
    with VersityGateway(tmp_path / "server") as server:
        yield server


def test_a_server_that_is_away_for_some_seconds_is_waited_for(own_server, monkeypatch, caplog):
    store = open_store(use_s3(own_server, monkeypatch), FIELD)
    store.put("there", b"1")
    own_server.stop()
    acts = {
        "put": lambda: store.put("new", b"2"),
        "create": lambda: store.create("manifest.json", b"3"),
        "get": lambda: store.get("there"),
        "list": lambda: store.list("folder"),
        "delete": lambda: store.delete("gone"),
    }
    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(len(acts)) as pool:
        running = {name: pool.submit(act) for name, act in acts.items()}
        time.sleep(3.5)  # longer than obstore's own patience
        assert not any(act.done() for act in running.values())
        own_server.start()
        assert running["get"].result(60) == b"1"
        assert [act.result(60) for name, act in running.items() if name != "get"] == [None, None, [], None]
    assert store.list() == [("manifest.json", 1), ("new", 1), ("there", 1)]
    assert caplog.text.count("yet, next try in") >= len(acts)


@pytest.fixture
def hasty(own_server, monkeypatch):
    """A store whose requests time out after half a second."""
    bucket = use_s3(own_server, monkeypatch)
    backend = BucketBackend("s3", bucket.removeprefix("s3://"), "", request_seconds=0.5)
    return Store(backend, bucket, FIELD, patience_seconds=60)


def test_a_write_that_times_out_is_written_again(own_server, hasty):
    with ThreadPoolExecutor(1) as pool:
        with own_server.frozen():
            write = pool.submit(hasty.put, "k", b"1")
            time.sleep(1.5)
            assert not write.done()
        write.result(30)
    assert hasty.get("k") == b"1"


def test_a_create_whose_answer_is_lost_may_find_its_own_object(own_server, hasty, caplog):
    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(1) as pool:
        with own_server.frozen():
            write = pool.submit(hasty.create, "manifest.json", b"mine")
            while caplog.text.count("yet, next try in") < 2:  # now it waits a second, and no request is under way
                time.sleep(0.02)
        # The first request waited in the server's socket and was carried out after its sender had given it up.
        with pytest.raises(AlreadyExistsError):
            write.result(30)
    assert hasty.get("manifest.json") == b"mine"


def test_a_server_that_stays_away_is_a_storage_failure_after_a_bounded_wait(own_server, monkeypatch):
    store = open_store(use_s3(own_server, monkeypatch), FIELD, patience_seconds=1)
    own_server.stop()
    with pytest.raises(StorageError, match=r"cannot write s3://bucket-\d+/k: tried for 1 s") as caught:
        store.put("k", b"1")
    assert caught.value.exit_code == 47


def test_an_object_that_changes_while_it_is_read_is_not_mixed(s3):
    store = open_store(s3, FIELD)
    store.put("weights", b"1" * LARGE)
    pieces = store.chunks("weights")
    next(pieces)
    store.put("weights", b"2" * LARGE)
    with pytest.raises(StorageError, match="changed while it was read"):
        next(pieces)


# ------------------------------------------------------------------------------------------------------------- folders


def test_a_full_disk_is_a_storage_failure_and_leaves_what_was_there(tmpfs):
    with tmpfs("size=1m") as folder:
        store = open_store(str(folder), FIELD)
        store.put("small", b"whole")
        for write in (store.put, store.create):
            with pytest.raises(StorageError, match="disk is full"):
                write("large", bytes(2 << 20))
        assert store.get("small") == b"whole"
        assert [p.name for p in folder.iterdir()] == ["small"], "the half-written file takes no room"
        store.put("fits-again", bytes(1 << 19))


def test_a_read_only_folder_is_the_users_error(tmpfs):
    with tmpfs("size=1m") as folder:
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        with pytest.raises(UserError, match="Read-only file system"):
            open_store(str(folder), FIELD).put("x", b"1")


def test_a_file_where_a_folder_is_wanted_is_the_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot be used"):
            open_store(str(root), FIELD).put("x", b"1")


def test_what_a_killed_writer_leaves_is_not_listed(tmp_path):
    store = open_store(str(tmp_path), FIELD)
    store.put("x", b"1")
    (tmp_path / ".y.123-1-1.tmp").write_bytes(b"half")
    assert store.list() == [("x", 1)]


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        pytest.param("/data/x", "/data/x", id="absolute"),
        pytest.param("file:///data/x", "/data/x", id="file-uri"),
        pytest.param("./x", "{here}/x", id="relative"),
        pytest.param("pvc://claim/models/x", "/mnt/pvc/claim/models/x", id="mounted-claim"),
        pytest.param("s3://bucket/x", None, id="behind-a-network"),
    ],
)
def test_local_sources_have_a_path(tmp_path, monkeypatch, uri, path):
    monkeypatch.chdir(tmp_path)
    found = local_path(uri, FIELD)
    assert (str(found) if found else None) == (path.format(here=tmp_path) if path else None)


def test_a_store_on_a_claim_is_named_as_the_manifest_names_it():
    assert open_store("pvc://claim/out", FIELD).uri("manifest.json") == "pvc://claim/out/manifest.json"


def test_a_folder_of_a_claim_does_not_lead_into_another_claim(tmp_path, monkeypatch):
    monkeypatch.setattr(object_store, "PVC_MOUNT", tmp_path)
    (tmp_path / "theirs" / "folder").mkdir(parents=True)
    (tmp_path / "theirs" / "folder" / "kept").write_bytes(b"1")
    (tmp_path / "mine" / "own").mkdir(parents=True)
    (tmp_path / "mine" / "out").symlink_to("../theirs")
    (tmp_path / "mine" / "own" / "out").symlink_to("../../theirs/folder")
    (tmp_path / "mine" / "own" / "file").symlink_to("../../theirs/folder/kept")
    for uri, folder in (("pvc://mine/out", "folder/"), ("pvc://mine/own", "out/"), ("pvc://mine", "own/out/")):
        store = open_store(uri, FIELD)
        for act in (
            lambda store, key: store.put(key, b"2"),
            lambda store, key: store.create(f"{key}-new", b"2"),
            lambda store, key: store.delete(key),
            lambda store, key: store.get(key),
            lambda store, key: store.stat(key),
            lambda store, key: store.list(key.rpartition("/")[0]),
        ):
            with pytest.raises(UserError, match="leads out of its claim by a link"):
                act(store, f"{folder}kept")
    with pytest.raises(UserError, match="leads out of its claim by a link"):
        open_store("pvc://mine/own", FIELD).get("file")
    open_store("pvc://mine/own", FIELD).put("file", b"2")  # takes the link's place
    assert [p.read_bytes() for p in (tmp_path / "theirs").rglob("*") if p.is_file()] == [b"1"]
    (tmp_path / "mine" / "latest").symlink_to("own")
    assert open_store("pvc://mine/latest", FIELD).get("file") == b"2"
    open_store("pvc://mine/latest", FIELD).delete("file")
    assert not (tmp_path / "mine" / "own" / "file").exists()
