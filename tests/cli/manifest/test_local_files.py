"""Manifests compared with model folders and rows on this machine."""

import gzip
import json

import pytest
import yaml
from typer.testing import CliRunner

from qlora_cli import app
from qlora_cli.manifest import local_model, local_rows


@pytest.fixture
def validate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def check(source="hf://org/base@main", rows="s3://bucket/rows.jsonl", **dataset):
        spec = {
            "model": {"source": source},
            "dataset": {"train": {"source": rows}, "format": "Text", **dataset},
            "training": {"epochs": 1},
            "output": {"destination": "s3://bucket/out"},
        }
        job = {"apiVersion": "qlora.dev/v1alpha1", "kind": "QLoRAJob", "metadata": {"name": "tune"}, "spec": spec}
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
        done = CliRunner().invoke(app.app, ["validate", "job.yaml"])
        return done.exit_code, done.stdout

    return check


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"text_config": {"max_position_embeddings": 1024}}))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def test_every_error_about_local_files_is_told_at_once(validate, base, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"message": 1}\n')
    code, said = validate("./base", "rows.jsonl", format="Messages", maxLength=2048)
    assert code == 40
    assert "spec.dataset.maxLength: 2048 is more than the 1024 positions of ./base\n" in said
    assert "spec.dataset.chatTemplate: is needed: the model's tokenizer has no chat template. " in said
    assert '"messages" is not a column of rows.jsonl; its columns are message; did you mean message?' in said
    assert said.endswith("3 errors\n")


@pytest.mark.parametrize("template", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_model_folder_with_a_chat_template_and_room_is_valid(template, validate, base):
    (base / template).write_text('{"chat_template": "x"}')
    assert validate("./base", format="Messages", maxLength=1024)[0] == 0


def test_a_model_folder_without_a_configuration_is_named(validate, tmp_path):
    (tmp_path / "empty").mkdir()
    assert 'spec.model.source: "./empty" has no config.json that can be read' in validate("./empty")[1]


@pytest.mark.parametrize("name", ["rows.txt", "rows.xlsx", "rows"])
def test_a_file_of_another_kind_is_named(validate, tmp_path, name):
    (tmp_path / name).write_text("text")
    code, said = validate(rows=f"./{name}")
    assert code == 40
    assert f'spec.dataset.train.source: "./{name}" must be a file that ends in .jsonl, ' in said


def test_columns_of_csv_and_of_compressed_files_are_read(validate, tmp_path):
    (tmp_path / "rows.csv").write_text("\ufeffbody,title\n1,2\n")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b'{"body": 1}\n'))
    assert "its columns are body, title" in validate(rows="rows.csv")[1]
    assert "its columns are body" in validate(rows="rows.jsonl.gz")[1]
    assert validate(rows="rows.csv", columns={"text": "body"})[0] == 0


GZIPPED = gzip.compress(b'{"body": 1}\n' * 1000)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(GZIPPED[:20], id="cut"),
        pytest.param(GZIPPED[:12] + b"\xff" * 20, id="damaged"),
        pytest.param(b"text", id="not-gzip"),
    ],
)
def test_compressed_rows_that_cannot_be_read_are_left_to_prepare(validate, tmp_path, data):
    (tmp_path / "rows.jsonl.gz").write_bytes(data)
    assert validate(rows="rows.jsonl.gz")[0] == 0


@pytest.mark.parametrize("place", ["file://~nosuchuser/x", "s3:/bucket/x", "$HOME/x", "s3://me:hunter2@bucket/x"])
def test_a_place_that_would_be_another_one_is_an_error(place, validate):
    code, said = validate(place, place)
    assert code == 40
    for field in ("spec.model.source", "spec.dataset.train.source"):
        assert f"{field}: " in said
    assert said.endswith("2 errors\n")
    assert "hunter2" not in said


@pytest.mark.parametrize(
    "source",
    [
        pytest.param("~nosuchuser/x", id="unknown-user"),
        pytest.param(f"./{'n' * 300}", id="long-name"),
        pytest.param(f"{'n' * 300}/x.jsonl", id="long-folder"),
        pytest.param("./\0", id="null-byte"),
    ],
)
def test_a_path_that_names_nothing_here_is_left_to_others(source, validate):
    assert validate(source, source) == (0, "job.yaml: tune is valid\n")


def test_the_first_folder_of_a_name_of_the_hub_may_be_too_long_for_one(validate):
    code, said = validate(f"{'n' * 300}/x")
    assert code == 40
    assert "is no path here; from the Hub it is hf://nnn" in said


def test_words_and_suffixes_are_those_of_the_trainer():
    row_files = pytest.importorskip("qlora_trainer.row_files")
    assert (tuple(row_files.KINDS), row_files.COMPRESSIONS) == (local_rows.SUFFIXES, local_rows.COMPRESSIONS)
    assert row_files.ALLOWED == local_rows.ALLOWED


@pytest.mark.parametrize(
    ("columns", "form"),
    [
        (["messages", "id"], "Messages"),
        (["prompt", "completion"], "PromptCompletion"),
        (["instruction", "input", "output"], "Instruction"),
        (["text"], "Text"),
        (["other"], "Messages"),
    ],
)
def test_init_proposes_what_rows_and_model_have(tmp_path, monkeypatch, base, columns, form):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps(dict.fromkeys(columns, "")) + "\n")
    options = ["--model", "./base", "--data", "rows.jsonl", "--destination", "out", "-f", "-"]
    written = yaml.safe_load(CliRunner().invoke(app.app, ["init", *options]).stdout)
    assert written["spec"]["dataset"]["format"] == form
    assert written["spec"]["dataset"]["maxLength"] == 1024
    asked = CliRunner().invoke(app.app, ["init", *options, "--format", "Text"])
    assert yaml.safe_load(asked.stdout)["spec"]["dataset"]["format"] == "Text"


def init(*options):
    done = CliRunner().invoke(app.app, ["init", "--model", "./base", "--destination", "out", *options])
    assert done.exit_code == 0
    return done.stderr


def test_init_proposes_the_format_of_a_folder_of_rows(tmp_path, monkeypatch, base):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "README.md").write_text("text")
    (tmp_path / "rows" / "a.jsonl").write_text('{"prompt": "", "completion": ""}\n')
    assert init("--data", "rows").startswith("Next: qlora run job.yaml\n")
    assert yaml.safe_load((tmp_path / "job.yaml").read_text())["spec"]["dataset"]["format"] == "PromptCompletion"


def test_init_says_what_model_and_rows_here_do_not_suit(tmp_path, monkeypatch, base):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("question,answer\n")
    said = init("--data", "rows.csv")
    assert "note: spec.dataset.chatTemplate: is needed: " in said
    assert (
        'note: spec.dataset.columns.messages: "messages" is not a column of rows.csv; its columns are question' in said
    )
    assert "Next: qlora validate job.yaml\n" in said


def test_init_says_which_paths_are_not_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = init("--data", "rows.csv", "--format", "Text")
    assert said.startswith(
        'note: spec.model.source: "./base" is not on this machine\n'
        'note: spec.dataset.train.source: "rows.csv" is not on this machine\n'
        "Next: qlora run job.yaml\n"
    )


def test_a_column_that_no_file_of_a_folder_has_is_named(validate, tmp_path):
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "a.jsonl").write_text('{"body": 1}\n')
    (rows / "b.jsonl").write_text('{"title": 1}\n')
    code, said = validate(rows="./rows")
    assert code == 40
    assert '"text" is not a column of ./rows; its columns are body, title' in said
    assert validate(rows="./rows", columns={"text": "title"})[0] == 0
    (rows / "_SUCCESS.jsonl").write_text('{"text": 1}\n')
    assert validate(rows="./rows")[0] == 40
    (rows / "c.parquet").write_bytes(b"PAR1")
    assert validate(rows="./rows")[0] == 0, "a file that cannot be read here may have it"


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        pytest.param({"max_position_embeddings": 1}, 1, id="text-alone"),
        pytest.param({"max_position_embeddings": 1, "text_config": {"max_position_embeddings": 2}}, 2, id="text-part"),
        pytest.param({"max_position_embeddings": 1, "llm_config": {"max_position_embeddings": 2}}, 2, id="llm-part"),
        pytest.param({"max_position_embeddings": 1, "text_config": {}}, 1, id="of-the-whole"),
        pytest.param({}, None, id="unknown"),
    ],
)
def test_positions_are_those_of_the_language_model(config, positions):
    assert local_model.positions_of(config) == positions


def test_the_default_length_of_rows_is_compared_with_the_positions(validate, base):
    code, said = validate("./base")
    assert code == 40
    assert "spec.dataset.maxLength: 2048 is more than the 1024 positions of ./base" in said


def test_errors_are_told_in_the_order_of_the_files_lines(tmp_path, base, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"message": 1}\n')
    (tmp_path / "job.yaml").write_text(IN_DISORDER)
    lines = CliRunner().invoke(app.app, ["validate", "job.yaml"]).stdout.splitlines()
    numbers = [int(line.split(":")[1]) for line in lines[:-1]]
    assert numbers == sorted(numbers)
    assert {6, 8, 9, 16} <= set(numbers)


IN_DISORDER = """\
apiVersion: qlora.dev/v1alpha1
kind: QLoRAJob
metadata: {name: tune}
spec:
  training:
    epoch: 1
  model: {source: ./base}
  dataset:
    maxLength: 2048
    format: Messages
    train: {source: rows.jsonl}
  output: {destination: "s3://bucket/out"}
  lora:
    rank: 8
  policy:
    maxRestarts: many
"""
