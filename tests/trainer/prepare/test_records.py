"""A run finds the record that it began with, whichever version of Prepare wrote it."""

from __future__ import annotations

import json

import pytest

from qlora_api.batch import split_batch
from qlora_api.contract import PrepareReceipt, TrainerConfig
from qlora_trainer.prepare.records import Record, Records
from qlora_trainer.storage.authentication import Authenticator

NEWER = ("tasksHash", "tasksFilesSha256")
"""Fields that version 0.1.0 did not have."""
REVISION = "8f31c9"


@pytest.fixture
def config(tmp_path, make_facts, job):
    spec = make_facts().spec
    (tmp_path / "key").write_text("k" * 64)
    return TrainerConfig(
        job=job,
        spec=spec,
        batch=split_batch(spec, 1),
        device="CPU",
        ranks_per_worker=1,
        gradient_checkpointing=False,
        checkpoint_uri="x",
        cache_dir=str(tmp_path / "cache"),
        termination_message_path="x",
        key_file=str(tmp_path / "key"),
    )


@pytest.fixture
def record():
    receipt = PrepareReceipt(
        data_hash="d" * 64,
        train_rows=2,
        train_tokens=20,
        train_target_tokens=10,
        train_sequences=1,
        **dict.fromkeys(
            ("eval_rows", "eval_tokens", "truncated", "dropped", "fully_masked", "duplicates", "eval_in_train"), 0
        ),
        packing_efficiency=0.1 + 0.2,
        longest=10,
        lengths={16: 2},
        samples=[],
    )
    return Record(key="a" * 64, model_source="hf://org/base@main", model_revision=REVISION, receipt=receipt, shape=None)


def leave(config, record, without=(), **changes):
    """Write the record that a run began with: signed as it was by a version without some fields, and then changed."""
    plain = record.model_dump(mode="json", by_alias=True, exclude={"signature"})
    body = {name: value for name, value in plain.items() if name not in without}
    signature = Authenticator.of(config).sign("record", body)
    Records(config)._store.put(
        f"jobs/{config.job.uid}.json", json.dumps(body | {"signature": signature} | changes).encode()
    )


@pytest.mark.parametrize("without", [(), NEWER], ids=["this-version", "0.1.0"])
def test_a_run_stays_at_the_revision_that_an_earlier_version_began_it_with(without, config, record):
    leave(config, record, without)
    assert Records(config).of_run().model_revision == REVISION


@pytest.mark.parametrize("without", [(), NEWER], ids=["this-version", "0.1.0"])
@pytest.mark.parametrize("changes", [{"modelRevision": "other"}, {"tasksHash": "e" * 64}], ids=["a-field", "a-newer"])
def test_a_record_that_somebody_changed_is_not_used(changes, without, config, record):
    leave(config, record, without, **changes)
    assert Records(config).of_run() is None


def test_a_record_that_is_begun_with_again_is_found(config, record):
    began = Records(config).begin(record)
    assert Records(config).of_run() == began
