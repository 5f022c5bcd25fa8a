"""Somebody who may write to the bucket and knows the job's UID plants what he likes: it counts for nothing."""

from __future__ import annotations

import json
import logging
import secrets

import pytest

from qlora_api.batch import split_batch
from qlora_api.contract import ExitCode, TrainerConfig
from qlora_storage.object_store import open_store, sha256_bytes
from qlora_trainer.checkpoint.checkpoint_store import MARKER, CheckpointStore, FileEntry, Marker, files_of, folder_of
from qlora_trainer.errors import AdapterRejectedError, CheckpointError, TrainerError, UserError
from qlora_trainer.publish.published_adapter import check_gate, own_manifest
from qlora_trainer.publish.publisher import check_destination, publish, verify_published
from qlora_trainer.storage.authentication import Authenticator

RUN = "3f2a9c01-run"
OWN = Authenticator(secrets.token_bytes(32))
THEIRS = Authenticator(secrets.token_bytes(32))
BEGAN_BEFORE = Authenticator(OWN.key, accepts_unsigned=True)
WITHOUT = Authenticator(None, accepts_unsigned=True)


# ---------------------------------------------------------------------------------------------------------- the key


@pytest.fixture
def make_config(make_facts, job):
    def make(**changes):
        spec = make_facts().spec
        return TrainerConfig(
            job=job,
            spec=spec,
            batch=split_batch(spec, 1),
            device="CPU",
            ranks_per_worker=1,
            gradient_checkpointing=False,
            checkpoint_uri="x",
            cache_dir="x",
            termination_message_path="x",
            **changes,
        )

    return make


def test_a_key_is_read_from_its_file_and_shown_nowhere(tmp_path, make_config):
    text = secrets.token_hex(32)
    (tmp_path / "key").write_text(f"{text}\n")
    read = Authenticator.of(make_config(key_file=str(tmp_path / "key")))
    assert read.key == text.encode()
    assert text not in repr(read)


@pytest.mark.parametrize("content", [None, b"", b"short"])
def test_a_key_that_is_not_there_or_no_key_ends_the_attempt(content, tmp_path, make_config):
    if content is not None:
        (tmp_path / "key").write_bytes(content)
    with pytest.raises(TrainerError, match="keyFile"):
        Authenticator.of(make_config(key_file=str(tmp_path / "key")))


def test_a_signature_for_one_purpose_is_none_for_another():
    body = {"step": 3, "loss": 0.1 + 0.2}
    signature = OWN.sign("checkpoint", body)
    assert OWN.problem("checkpoint", dict(reversed(body.items())), signature) is None
    assert OWN.problem("manifest", body, signature)
    assert OWN.problem("checkpoint", body | {"step": 4}, signature)
    assert THEIRS.problem("checkpoint", body, signature)


@pytest.mark.parametrize("signature", [None, "", "0" * 64, 7, ["a"], "ü"])
def test_what_is_no_signature_is_none(signature):
    assert OWN.problem("checkpoint", {}, signature)


# ------------------------------------------------------------------------------------------------------- the manifest


@pytest.fixture
def plant(place, tmp_path, make_adapter, make_facts, job):
    """Publishes with a key of the attacker's, or with none, what has the job's UID and passes the gate."""

    def planted(authenticator: Authenticator) -> None:
        publish(place, job, 1, make_adapter(tmp_path / "planted"), make_facts(), authenticator=authenticator)

    return planted


@pytest.mark.parametrize("attacker", [WITHOUT, THEIRS], ids=["without a key", "with another key"])
def test_a_planted_manifest_is_refused_before_and_after_the_training(
    attacker, plant, place, tmp_path, make_adapter, make_facts, job
):
    plant(attacker)
    before = open_store(place, "x").get("manifest.json")
    for publishes in (
        lambda: check_destination(place, job.uid, OWN),
        lambda: publish(place, job, 1, make_adapter(tmp_path / "own"), make_facts(), authenticator=OWN),
    ):
        with pytest.raises(UserError, match="somebody else") as refused:
            publishes()
        assert refused.value.exit_code == ExitCode.USER_ERROR
        assert place in str(refused.value)
        assert "delete it and start the job again" in str(refused.value)
    assert open_store(place, "x").get("manifest.json") == before, "nothing is overwritten"


def test_an_own_manifest_that_somebody_changed_is_refused(place, tmp_path, make_adapter, make_facts, job):
    publish(place, job, 1, make_adapter(tmp_path / "own"), make_facts(), authenticator=OWN)
    store = open_store(place, "x")
    manifest = json.loads(store.get("manifest.json"))
    for field, value in (
        ("metrics", manifest["metrics"] | {"evalLoss": 0.01}),
        ("files", manifest["files"][:-1]),
        ("adapter", "elsewhere/adapter"),
        ("attempt", 2),
    ):
        store.put("manifest.json", json.dumps(manifest | {field: value}).encode())
        with pytest.raises(UserError, match="signature"):
            own_manifest(store, job.uid, OWN)


def test_the_runs_own_manifest_is_found_again_and_verified_by_all_without_the_key(
    place, tmp_path, make_adapter, make_facts, job
):
    first = publish(place, job, 1, make_adapter(tmp_path / "1"), make_facts(), authenticator=OWN)
    assert publish(place, job, 2, make_adapter(tmp_path / "2"), make_facts(), authenticator=OWN) == first
    check_destination(place, job.uid, OWN)
    assert verify_published(first.manifest_uri) == []


def test_a_run_that_began_before_there_were_keys_finds_what_it_published_unsigned(plant, place, job):
    plant(WITHOUT)
    check_destination(place, job.uid, BEGAN_BEFORE)


def test_the_gate_looks_at_what_is_adopted(place, tmp_path, make_adapter, make_facts, job):
    """Files that are exactly those of a manifest of the run's own, and no adapter."""
    out = make_adapter(tmp_path / "own")
    publish(place, job, 1, out, make_facts(), authenticator=OWN)
    store = open_store(place, "x")
    manifest, _ = own_manifest(store, job.uid, OWN)
    check_gate(store, manifest, make_facts().spec)
    weights = next(f for f in manifest.files if f.path.endswith("adapter_model.safetensors"))
    store.put(weights.path, b"junk")
    junk = weights.model_copy(update={"size": 4, "sha256": sha256_bytes(b"junk")})
    others = tuple(f for f in manifest.files if f.path != weights.path)
    spoiled = OWN.signed("manifest", manifest.model_copy(update={"files": (*others, junk)}))
    store.put("manifest.json", spoiled.to_bytes())
    with pytest.raises(AdapterRejectedError):
        publish(place, job, 2, make_adapter(tmp_path / "again"), make_facts(), authenticator=OWN)


# --------------------------------------------------------------------------------------------------------- checkpoints


def save(place: str, step: int, authenticator: Authenticator, attempt: int = 1) -> None:
    store = CheckpointStore(place, RUN, keep=9, attempt=attempt, authenticator=authenticator)
    entry = store.write_file(step, "adapter.safetensors", b"weights" * 10)
    store.commit(step, [entry], {"run": {"step": step}}, None)


def plant_checkpoint(place: str, step: int, attacker: Authenticator, attempt: int = 1) -> None:
    """Put down what a run with the attacker's key would."""
    store, data = open_store(place, "x"), b"planted"
    entry = FileEntry("adapter.safetensors", len(data), sha256_bytes(data))
    store.put(f"{folder_of(step)}/{files_of(attempt)}/{entry.name}", data)
    marker = Marker(step=step, run_uid=RUN, attempt=attempt, eval_loss=None, files=(entry,), meta={})
    store.put(f"{folder_of(step)}/{MARKER}", marker.to_bytes(attacker))


def own(place: str, authenticator: Authenticator = OWN, attempt: int = 1) -> CheckpointStore:
    return CheckpointStore(place, RUN, keep=9, attempt=attempt, authenticator=authenticator)


@pytest.mark.parametrize("attacker", [WITHOUT, THEIRS], ids=["without a key", "with another key"])
def test_a_planted_checkpoint_is_passed_over_for_the_one_before(attacker, place, caplog):
    save(place, 10, OWN)
    plant_checkpoint(place, 20, attacker)
    with caplog.at_level(logging.WARNING):
        assert own(place).newest().step == 10
    assert "the checkpoint at step 20 is broken and passed over" in caplog.text
    assert "was not written by this run" in caplog.text


def test_a_run_with_planted_checkpoints_alone_says_so(place):
    plant_checkpoint(place, 20, WITHOUT)
    with pytest.raises(CheckpointError, match="was not written by this run: it has no signature"):
        own(place).newest()


def test_a_planted_checkpoint_of_a_later_attempt_does_not_end_this_one(place):
    plant_checkpoint(place, 20, WITHOUT, attempt=999)
    save(place, 10, OWN)
    assert own(place).newest().step == 10


@pytest.mark.parametrize("change", [{"meta": {"run": {"step": 0}}}, {"files": []}, {"attempt": None}, {"step": 11}])
def test_an_own_checkpoint_that_somebody_changed_is_not_used(change, place):
    save(place, 10, OWN)
    store, key = open_store(place, "x"), f"{folder_of(10)}/{MARKER}"
    file = json.loads(store.get(key))
    body = file["checkpoint"] | change
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    store.put(key, json.dumps(file | {"sha256": sha256_bytes(canonical), "checkpoint": body}).encode())
    with pytest.raises(CheckpointError):
        own(place).newest()


def test_an_amended_checkpoint_is_signed_anew(place):
    save(place, 10, OWN)
    own(place).amend(10, {"evaluated": True}, 1.5)
    assert own(place).newest().meta == {"run": {"step": 10}, "evaluated": True}


def test_a_run_that_began_before_there_were_keys_resumes_from_what_it_saved_and_signs_from_then_on(place):
    save(place, 10, WITHOUT)
    assert own(place, BEGAN_BEFORE, attempt=2).newest().step == 10
    save(place, 20, BEGAN_BEFORE, attempt=2)
    assert own(place).newest().step == 20, "signed"
    plant_checkpoint(place, 30, THEIRS)
    assert own(place, BEGAN_BEFORE).newest().step == 20, "a wrong signature is none of its own"
