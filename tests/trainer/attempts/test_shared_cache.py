"""Shared cache of Prepare: used by a second Prepare at once, and by trainers elsewhere instead of tokenizing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from qlora_api.contract import ExitCode
from qlora_storage.object_store import open_store, sha256_bytes
from qlora_trainer.__main__ import ready
from qlora_trainer.errors import UserError
from qlora_trainer.prepare.command import prepare
from qlora_trainer.prepare.local_copy import PreparedInputs
from qlora_trainer.prepare.records import Records, find

SHORT = {"training": {"epochs": None, "maxSteps": 2}}
LIGHTLY = """
import sys
from qlora_trainer.prepare.command import main
code = main()
heavy = {"torch", "transformers", "numpy", "pyarrow", "peft"} & sys.modules.keys()
sys.exit(code or (f"imported {heavy}" if heavy else 0))
"""


@pytest.fixture(params=["folder", "s3"])
def shared(request, runner):
    """URI of an empty shared cache."""
    return str(runner.folder / "shared") if request.param == "folder" else request.getfixturevalue("s3") + "/shared"


def on(runner, shared, machine="a", **changes):
    """A config as a pod gets it whose disk is its own."""
    config = runner.config(**changes)
    return config.model_copy(update={"shared_cache_uri": shared, "cache_dir": str(runner.folder / machine)})


def another_job(runner):
    """Return what tells another job with the same content."""
    return {"uid": "another-job", "output": {"destination": str(runner.folder / "another")}}


def lightly(runner, config):
    """Prepare in a process that may import nothing large."""
    path, _ = runner.write(config)
    return subprocess.run([sys.executable, "-c", LIGHTLY, str(path)], capture_output=True, text=True, check=False)


@pytest.mark.ranks
def test_trainers_on_another_machine_take_the_rows_from_the_shared_cache(runner, shared):
    receipt = prepare(on(runner, shared))
    rows = runner.folder / "rows.jsonl"
    moved = on(runner, shared, machine="b", **SHORT)
    began = {"dataset": {**moved.spec.to_json_dict()["dataset"], "train": {"source": str(rows)}}}
    config = on(runner, shared, machine="b", **SHORT, **began)  # rows.jsonl is not on this machine
    path, _ = runner.write(config)
    assert ready(config, path) == ExitCode.DONE
    assert PreparedInputs.read(config).data_dir == runner.folder / "b" / "data" / receipt.data_hash
    ended = runner.train(config)
    assert ended.code == ExitCode.DONE, ended.log[-2000:]


def test_a_second_prepare_of_the_same_content_imports_nothing_large(runner, shared):
    first = prepare(on(runner, shared))
    again = on(runner, shared, machine="b", attempt=2, **another_job(runner))
    done = lightly(runner, again)
    assert done.returncode == 0, done.stderr
    word = runner.ended(again, 0).message
    assert word.prepared.data_hash == first.data_hash
    assert json.loads(done.stdout)["trainTokens"] == first.train_tokens
    assert not (runner.folder / "b" / "models").exists()


def test_trainers_on_another_machine_take_the_tasks_from_the_shared_cache(runner, shared, tmp_path):
    (tmp_path / "quiz.jsonl").write_text('{"q": "def read(self):", "label": 1}\n' * 2)
    definition = {
        "task": "quiz",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "quiz.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_target": "label",
        "doc_to_choice": ["no", "yes"],
    }
    (tmp_path / "quiz.yaml").write_text(json.dumps(definition))
    evaluate = {"folder": str(tmp_path), "tasks": [{"name": "quiz"}]}
    prepare(on(runner, shared, evaluate=evaluate))
    moved = on(runner, shared, machine="b", evaluate=evaluate)
    path, _ = runner.write(moved)
    assert ready(moved, path) == ExitCode.DONE
    there, here = (PreparedInputs.read(on(runner, shared, machine=name, evaluate=evaluate)) for name in "ab")
    assert there is None  # the pod of Prepare trains nothing
    asked = json.loads((here.tasks_dir / "requests.json").read_text())
    assert asked == [["def read(self):", " no"], ["def read(self):", " yes"]]
    order = json.loads((here.tasks_dir / "order.json").read_text())
    assert str(tmp_path) not in json.dumps(order)


def test_without_a_shared_cache_a_second_prepare_finds_it_on_this_machine(runner):
    prepare(runner.config())
    again = runner.config(**another_job(runner))
    assert lightly(runner, again).returncode == 0
    assert PreparedInputs.read(again) == PreparedInputs.read(runner.config())


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"lora": {"targetModules": ["q_proj"]}}, id="other-targets-are-checked-anew"),
        pytest.param({"dataset": {"maxLength": 64}}, id="another-length"),
        pytest.param({"dataset": {"eval": {"fraction": "0.1"}}}, id="other-rows-held-out"),
        pytest.param({"training": {"seed": 7}}, id="another-seed-of-the-held-out-rows"),
        pytest.param({"quantization": {"type": "INT8"}}, id="another-quantization"),
    ],
)
def test_what_prepare_looks_at_makes_another_record(runner, changes):
    config = runner.config()
    prepare(config)
    assert find(config, Records(config)) is not None
    other = runner.config(**changes)
    assert find(other, Records(other)) is None


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"output": {"destination": "/elsewhere"}}, id="destination"),
        pytest.param({"training": {"learningRate": "1e-3", "epochs": 9}}, id="learning-rate"),
        pytest.param({"dataset": {"train": {"source": "ROWS", "credentials": "another"}}}, id="credentials"),
    ],
)
def test_what_prepare_does_not_look_at_makes_none(runner, changes):
    config = runner.config()
    prepare(config)
    rows = {"source": str(runner.rows), "credentials": "another"}
    if "dataset" in changes:
        changes = {"dataset": {"train": rows}}
    other = runner.config(**changes)
    assert find(other, Records(other)) is not None


def test_rows_that_changed_are_tokenized_anew(runner):
    rows = runner.folder / "rows.jsonl"
    shutil.copy(runner.rows, rows)
    config = runner.config(dataset={"train": {"source": str(rows)}})
    first = prepare(config)
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(lines[:-1]) + lines[0])
    assert prepare(config).data_hash != first.data_hash


def test_damaged_rows_in_the_shared_cache_are_made_anew(runner):
    shared = runner.folder / "shared"
    first = prepare(on(runner, str(shared)))
    (shared / "data" / first.data_hash / "train" / "tokens.npy").write_bytes(b"rotten")
    config = on(runner, str(shared), machine="b")
    path, _ = runner.write(config)
    assert ready(config, path) == ExitCode.DONE
    good = (shared / "data" / first.data_hash / "train" / "tokens.npy").read_bytes()
    assert good == (PreparedInputs.read(config).data_dir / "train" / "tokens.npy").read_bytes()


def test_a_model_that_is_another_one_on_the_trainers_machine_is_refused(runner):
    model = shutil.copytree(runner.model, runner.folder / "model")
    shared = str(runner.folder / "shared")
    prepare(on(runner, shared, model={"source": str(model)}))
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_theta": 5000.0}))
    config = on(runner, shared, machine="b", model={"source": str(model)})
    path, _ = runner.write(config)
    with pytest.raises(UserError, match=r"spec\.model\.source.*the run began on"):
        ready(config, path)


# ------------------------------------------------------------------------------- somebody else may write to the bucket


def plant(store, key, **changes):
    """Change a record's fields, as somebody does who may write there and has not the run's key."""
    record = json.loads(store.get(key))
    store.put(key, json.dumps(record | changes).encode())


def cache_below_its_destination(runner, machine="a"):
    config = runner.config()
    return on(runner, f"{config.spec.output.destination}/.prepared", machine)


def test_a_run_begins_with_what_its_own_prepare_left_and_nothing_that_was_planted(runner, caplog):
    config = cache_below_its_destination(runner)
    prepare(config)
    began = Records(config).of_run()
    store = open_store(config.shared_cache_uri, "x")
    plant(store, f"jobs/{config.job.uid}.json", modelRevision="0" * 40)
    plant(store, f"prepared/{began.key}.json", modelRevision="0" * 40)
    later = cache_below_its_destination(runner, machine="b")
    assert Records(later).of_run() is None
    assert find(later, Records(later)) is None
    assert "was not written by this run: its signature is not of this run's key" in caplog.text
    prepare(later)
    assert Records(later).of_run() == began, "made anew, over what was planted"


def test_rows_that_somebody_exchanged_with_their_list_are_not_trained_on(runner, shared):
    config = on(runner, shared)
    receipt = prepare(config)
    store = open_store(shared, "x")
    place = f"data/{receipt.data_hash}"
    files = json.loads(store.get(f"{place}/files.json"))
    tokens = next(file for file in files if file["path"].endswith(".npy"))
    planted = store.get(f"{place}/{tokens['path']}")[:-1] + b"\x01"
    store.put(f"{place}/{tokens['path']}", planted)
    tokens |= {"sha256": sha256_bytes(planted)}
    store.put(f"{place}/files.json", json.dumps(files).encode())
    later = on(runner, shared, machine="b")
    records = Records(later)
    assert records.bring_rows(records.of_run()) is None
    path, _ = runner.write(later)
    assert ready(later, path) == ExitCode.DONE
    rows = PreparedInputs.read(later).data_dir / tokens["path"]
    assert rows.read_bytes() != planted


def test_in_a_cache_for_all_another_jobs_record_is_taken_and_signed_by_the_run_that_begins_with_it(runner, shared):
    prepare(on(runner, shared))
    (runner.folder / "key").unlink()  # the next job has a key of its own
    other = on(runner, shared, machine="b", **another_job(runner))
    prepare(other)
    assert Records(other).of_run() is not None
    assert not (runner.folder / "b" / "models").exists()
