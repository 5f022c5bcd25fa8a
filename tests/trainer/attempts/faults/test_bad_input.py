"""Bad input is found before training where it can be, and said in one paragraph; nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_api.contract import ExitCode, JobRef, PrepareReceipt
from qlora_trainer.prepare.command import prepare
from qlora_trainer.reporting.rank_exit import run_with_exit_code

NF4_ON_DISK = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}


def prepared(runner, **changes):
    config = runner.config(**changes)
    runner.write(config)
    return runner.ended(config, run_with_exit_code(config, lambda _: (prepare(config), None)[1]))


def rows_file(runner, rows):
    path = runner.folder / "some.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return {"source": str(path)}


def model_copy(runner, **config):
    folder = shutil.copytree(runner.model, runner.folder / "model")
    if config:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def pickled(runner):
    folder = model_copy(runner)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return {"model": {"source": str(folder)}}


def truncated(runner):
    folder = model_copy(runner)
    os.truncate(folder / "model.safetensors", 5000)
    return {"model": {"source": str(folder)}}


def with_code(runner):
    code = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    return {"model": {"source": str(model_copy(runner, model_type="x", auto_map=code))}}


def no_rows(runner):
    return {"dataset": {"train": rows_file(runner, [])}}


def masked(runner):
    rows = [{"prompt": "x" * 400, "completion": "never seen"}] * 3
    return {"dataset": {"train": rows_file(runner, rows), "eval": None, "maxLength": 16, "longRows": "Truncate"}}


def silent(runner):
    return {"dataset": {"train": rows_file(runner, [{"prompt": "a", "completion": ""}] * 5), "eval": None}}


def too_long(runner):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "x y z " * 200, "completion": "c"}]
    return {"dataset": {"train": rows_file(runner, rows), "eval": None, "longRows": "Fail"}}


def no_column(runner):
    return {"dataset": {"train": rows_file(runner, [{"question": "a", "completion": "b"}])}}


def broken_template(runner):
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}] * 3
    return {
        "dataset": {
            "train": rows_file(runner, rows),
            "eval": None,
            "format": "Messages",
            "chatTemplate": "{{ raise_exception('no system turn') }}",
        }
    }


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        pytest.param(
            lambda w: {"lora": {"targetModules": ["q_prj"]}},
            ['spec.lora.targetModules: "q_prj"', "its linear layers are", "q_proj"],
            id="unknown-target-module",
        ),
        pytest.param(no_column, ["spec.dataset.columns.prompt", "question"], id="missing-column"),
        pytest.param(no_rows, ["spec.dataset.train.source"], id="empty-dataset"),
        pytest.param(masked, ["spec.dataset"], id="all-labels-masked"),
        pytest.param(too_long, ["maxLength", "longRows", "Truncate"], id="row-longer-than-max-length"),
        pytest.param(broken_template, ["spec.dataset.chatTemplate", "no system turn"], id="template-that-fails"),
        pytest.param(
            lambda w: {"model": {"source": str(w.folder / "nothing-here")}}, ["spec.model.source"], id="no-model-folder"
        ),
        pytest.param(truncated, ["spec.model.source", "model.safetensors"], id="unreadable-weights"),
        pytest.param(
            lambda w: {"model": {"source": str(model_copy(w, num_hidden_layers=9))}},
            ["spec.model.source", "lack", "model.layers.2.mlp.down_proj.weight"],
            id="layers-without-weights",
        ),
        pytest.param(pickled, ["spec.model.source", "pytorch_model.bin"], id="pickle-weights"),
        pytest.param(
            lambda w: {"model": {"source": str(model_copy(w, model_type="t5"))}},
            ["spec.model.source", "no causal language model"],
            id="another-kind-of-model",
        ),
        pytest.param(
            lambda w: {"model": {"source": str(model_copy(w, model_type="nonsense"))}},
            ["spec.model.source", "not known here"],
            id="unknown-architecture",
        ),
        pytest.param(silent, ["spec.dataset"], id="empty-completions"),
        pytest.param(
            lambda w: {"model": {"source": str(model_copy(w, quantization_config={"quant_method": "gptq"}))}},
            ["spec.model.source", "gptq"],
            id="base-quantized-by-another-library",
        ),
        pytest.param(
            lambda w: {"quantization": {"skipModules": ["layers.0.*.down_prj"]}},
            ['spec.quantization.skipModules: "layers.0.*.down_prj"', "matches no layer", "down_proj"],
            id="unknown-layer-to-skip",
        ),
        pytest.param(
            lambda w: {"quantization": {"skipModules": ["lm_head"]}},
            ['spec.quantization.skipModules: "lm_head"', "stay in 16 bits"],
            id="layer-to-skip-that-is-not-quantized",
        ),
        pytest.param(
            lambda w: {"quantization": {"skipModules": ["*_proj"]}},
            ["spec.quantization.skipModules", "leaves no layer quantized"],
            id="all-layers-to-skip",
        ),
        pytest.param(
            lambda w: {
                "model": {"source": str(model_copy(w, quantization_config=NF4_ON_DISK))},
                "quantization": {"skipModules": ["down_proj"]},
            },
            ['spec.quantization.skipModules: "down_proj"', "quantized on disk"],
            id="layers-to-skip-of-a-quantized-base",
        ),
        pytest.param(with_code, ["spec.model.source", "auto_map"], id="code-in-the-model-repository"),
        pytest.param(
            lambda w: {"dataset": {"maxLength": 512}},
            ["spec.dataset.maxLength: 512 ", "256 positions"],
            id="longer-than-the-models-positions",
        ),
        pytest.param(
            lambda w: {"dataset": {"train": {"source": str(w.folder / "rows.xlsx")}}},
            ["spec.dataset.train.source"],
            id="no-such-rows",
        ),
    ],
)
def test_prepare_ends_with_a_users_error_that_names_the_field(changes, parts, runner):
    ended = prepared(runner, **changes(runner))
    assert ended.code == ExitCode.USER_ERROR
    for part in parts:
        assert part in ended.text
    assert "\n\n" not in ended.text
    assert "Traceback" not in ended.text
    assert not (runner.folder / "out" / "manifest.json").exists()


def test_prepare_tells_what_it_decided_in_its_termination_message(runner):
    config = runner.config()
    path, _ = runner.write(config)
    done = subprocess.run(
        [sys.executable, "-m", "qlora_trainer.prepare", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == ExitCode.DONE, done.stderr[-2000:]
    result = runner.ended(config, 0).message.prepared
    receipt = PrepareReceipt.model_validate_json(done.stdout.splitlines()[-1])
    assert (result.data_hash, result.train_rows, result.batch) == (receipt.data_hash, receipt.train_rows, config.batch)
    assert len(result.model_revision) == 64
    assert float(result.seconds) > 0


@pytest.mark.parametrize(
    ("name", "text", "code"),
    [
        pytest.param("a.jsonl", '{"prompt": "Zebra", "completion": "Zebra"}\n' * 3, ExitCode.DONE, id="all-well"),
        pytest.param("a.csv", "prompt,completion\nZebra,1,2\n", ExitCode.USER_ERROR, id="csv"),
        pytest.param("a.jsonl", '{"prompt": "Zebra", "completion": ["Zebra"]}\n', ExitCode.USER_ERROR, id="json"),
    ],
)
def test_no_text_of_a_row_is_in_what_prepare_says(name, text, code, runner):
    (runner.folder / name).write_text(text)
    config = runner.config(dataset={"train": {"source": str(runner.folder / name)}, "eval": None})
    path, _ = runner.write(config)
    done = subprocess.run(
        [sys.executable, "-m", "qlora_trainer.prepare", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr[-2000:]
    said = done.stdout + done.stderr + Path(config.termination_message_path).read_text()
    assert "Zebra" not in said
    if code == ExitCode.DONE:
        assert PrepareReceipt.model_validate_json(done.stdout.splitlines()[-1]).samples == []
        (kept,) = (runner.cache / "data").glob("*/receipt.json")
        assert "Zebra" in kept.read_text()


def run_prepare(runner, config):
    path, _ = runner.write(config)
    command = [sys.executable, "-m", "qlora_trainer.prepare", str(path)]
    return runner.ended(config, subprocess.run(command, capture_output=True, check=False).returncode)


def test_of_two_jobs_with_one_destination_the_second_ends_in_prepare(runner):
    assert runner.prepare(runner.config()) == 0
    other = JobRef(name="other", uid="ffffffff-other")
    ended = run_prepare(runner, runner.config(attempt=2).model_copy(update={"job": other}))
    assert ended.code == ExitCode.USER_ERROR
    assert "spec.output.destination" in ended.text
    assert "is claimed by job default/tiny (run 0a1b2c3d-run)" in ended.text


def test_a_job_that_ends_in_prepare_leaves_its_destination_to_others(runner):
    failed = runner.config(attempt=2, dataset={"train": {"source": "/nowhere"}})
    failed = failed.model_copy(update={"job": JobRef(name="other", uid="ffffffff-other")})
    assert run_prepare(runner, failed).code == ExitCode.USER_ERROR
    assert runner.prepare(runner.config()) == 0


def test_a_destination_that_holds_another_runs_adapter_is_refused_before_training(runner):
    (runner.folder / "out").mkdir()
    changes = {"training": {"epochs": None, "maxSteps": 1}}
    assert runner.run(runner.config(ranks=1, **changes)).code == ExitCode.DONE
    before = (runner.folder / "out" / "manifest.json").read_bytes()
    ended = prepared(runner, uid="ffffffff-other", attempt=2, **changes)
    assert ended.code == ExitCode.USER_ERROR
    assert "spec.output.destination" in ended.text
    assert "0a1b2c3d-run" in ended.text
    assert (runner.folder / "out" / "manifest.json").read_bytes() == before


@pytest.mark.ranks
def test_a_run_does_not_go_on_from_a_base_that_was_exchanged(runner):
    model = model_copy(runner)
    changes = {"model": {"source": str(model)}, "training": {"epochs": None, "maxSteps": 2}}
    assert runner.run(runner.config(ranks=1, **changes)).code == ExitCode.DONE
    shutil.rmtree(runner.folder / "out")
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_theta": 5000.0}))
    ended = runner.run(runner.config(ranks=1, attempt=2, **changes))
    assert ended.code == ExitCode.USER_ERROR
    assert "spec.model.source" in ended.text
    assert "the run began on" in ended.text


def test_what_prepare_found_once_is_found_again_without_tokenizing(runner):
    config = runner.config()
    first = prepare(config)
    files = {p: p.stat().st_mtime_ns for p in (runner.cache / "data").rglob("*.npy")}
    assert prepare(config) == first
    assert {p: p.stat().st_mtime_ns for p in (runner.cache / "data").rglob("*.npy")} == files


@pytest.mark.ranks
def test_a_disk_that_is_full_while_checkpointing_keeps_the_checkpoint_before(runner):
    disk = runner.folder / "checkpoints"
    disk.mkdir()
    changes = {"training": {"epochs": None, "maxSteps": 4}, "checkpoint": {"everySteps": 1, "keep": 9}}
    # room for two checkpoints of this job, not for four
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], check=True)
    try:
        ended = runner.run(runner.config(ranks=1, **changes))
        assert ended.code == ExitCode.STORAGE_FAILED, ended.log[-2000:]
        assert "spec.output" in ended.text or str(disk) in ended.text
        kept = sorted(p.parent.name for p in disk.glob("*/COMPLETE.json"))
        assert kept
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        again = runner.run(runner.config(ranks=1, attempt=2, **changes))
        assert again.code == ExitCode.DONE, again.log[-2000:]
        assert min(again.losses) == len(kept) + 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)
