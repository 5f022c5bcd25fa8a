"""The commands as they are typed."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest
from typer.testing import CliRunner

from qlora_api.crd import crd, sweep_crd
from qlora_cli import app
from qlora_cli.commands.command_group import INSTEAD
from qlora_cli.kube import target
from qlora_cli.manifest import crd_schema, explain
from qlora_cli.text import kubernetes_yaml
from testing.timeouts import PATIENCE_SECONDS

GOOD = """\
apiVersion: qlora.dev/v1alpha1
kind: QLoRAJob
metadata:
  name: quick
spec:
  model: {source: hf://org/name@main}
  dataset:
    train: {source: s3://bucket/rows}
    format: Text
  lora:
  training:
    epochs: 1
  output: {destination: s3://bucket/out}
"""


@pytest.fixture
def call():
    def invoke(*arguments, **options):
        return CliRunner().invoke(app.app, list(arguments), **options)

    return invoke


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text):
        (tmp_path / "job.yaml").write_text(text)

    write(GOOD)
    return write


# ------------------------------------------------------------------------------------------------------------- validate


def test_a_good_manifest_is_valid(call, job):
    result = call("validate", "job.yaml")
    assert (result.exit_code, result.stdout) == (0, "job.yaml: quick is valid\n")


def test_every_error_is_named_with_its_line(call, job):
    job(GOOD.replace("  lora:\n", "  lora: {rank: 0}\n").replace("epochs: 1", "learningRate: 2e-4\n    epoch: 1"))
    result = call("validate", "job.yaml")
    assert result.exit_code == 40
    assert "job.yaml:10: spec.lora.rank: 0 must be at least 1" in result.stdout
    assert "job.yaml:12: spec.training.learningRate: " in result.stdout
    assert 'is a YAML number: write "0.0002"' in result.stdout
    assert "job.yaml:13: spec.training.epoch: " in result.stdout
    assert "did you mean epochs?" in result.stdout
    assert "3 errors" in result.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(("kind: QLoRAJob\n", ""), "kind: is required: QLoRAJob", id="no-kind"),
        pytest.param(("kind: QLoRAJob", "kind: QloraJob"), "job.yaml:2: kind: ", id="misspelled-kind"),
        pytest.param(("v1alpha1", "v2"), "job.yaml:1: apiVersion: ", id="other-version"),
        pytest.param(("  name: quick\n", "  name: Quick\n"), "job.yaml:4: metadata.name: ", id="name"),
        pytest.param(
            ("    epochs: 1\n", "    epochs: 1\n    epochs: 2\n"), "is given twice, in lines 12 and 13", id="twice"
        ),
        pytest.param(
            ("    epochs: 1\n", "    epochs: '1'\n"), "job.yaml:12: spec.training.epochs: ", id="quoted-number"
        ),
        pytest.param(("    epochs: 1\n", "    seed: 1\n"), "exactly one of epochs and maxSteps", id="rule"),
        pytest.param(
            ("{destination: s3://bucket/out}", "{}"), "job.yaml:13: spec.output.destination: is required", id="missing"
        ),
        pytest.param(
            ("    epochs: 1\n", "    max_steps: 1\n"), "job.yaml:12: spec.training.max_steps: ", id="snake-case"
        ),
        pytest.param(
            ("s3://bucket/out", "hf://org/out"), "job.yaml:13: spec.output.destination: ", id="hub-as-destination"
        ),
        pytest.param(
            ("training:\n", "scheduling: {tolerations: [{key: gpu, tolerationSeconds: -1}]}\n  training:\n"),
            "job.yaml:11: spec.scheduling.tolerations[0].tolerationSeconds: ",
            id="in-a-list",
        ),
    ],
)
def test_errors(call, job, change, message):
    job(GOOD.replace(*change))
    result = call("validate", "job.yaml")
    assert result.exit_code == 40
    assert message in result.stdout


@pytest.mark.parametrize("command", ["validate", "run", "submit", "plan"])
@pytest.mark.parametrize(
    ("field", "change", "line"),
    [
        pytest.param("spec.model.source", ("hf://org/name@main", "org/name@main"), 6, id="model"),
        pytest.param("spec.dataset.train.source", ("s3://bucket/rows", "org/name"), 8, id="rows"),
        pytest.param(
            "spec.dataset.eval.source", ("format: Text", "eval: {source: org/name-1.5}\n    format: Text"), 9, id="eval"
        ),
    ],
)
def test_a_bare_name_of_the_hub_is_answered_with_its_address(call, job, command, field, change, line):
    job(GOOD.replace(*change))
    result = call(command, "job.yaml")
    assert result.exit_code == 40
    assert f'job.yaml:{line}: {field}: "org/name' in result.output
    assert "is no path here; from the Hub it is hf://org/name" in result.output


@pytest.mark.parametrize("source", ["./org/name", "here/name", "org/rows.jsonl", "name", "org/folder/name"])
def test_a_path_is_not_taken_for_a_name_of_the_hub(call, job, tmp_path, source):
    (tmp_path / "here").mkdir()
    job(GOOD.replace("s3://bucket/rows", source))
    assert call("validate", "job.yaml").exit_code == 0


@pytest.mark.parametrize("command", ["run", "submit", "plan --gpu h100-80gb"])
def test_the_home_of_a_user_that_is_not_known_is_a_path_that_is_not_there(call, job, command):
    job(GOOD.replace("hf://org/name@main", "~nosuchuser/base"))
    result = call(*command.split(), "job.yaml")
    assert result.exit_code == 40
    assert "~nosuchuser/base" in result.stderr


MESSAGES = GOOD.replace("s3://bucket/rows", "rows.jsonl").replace("format: Text", "format: Messages")


def test_columns_of_a_local_file_are_compared_with_every_other_error(call, job, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"conversations": [], "message": []}\n')
    job(MESSAGES.replace("epochs: 1", "epochs: 0"))
    result = call("validate", "job.yaml")
    assert result.exit_code == 40
    assert 'job.yaml:7: spec.dataset.columns.messages: "messages" is not a column of rows.jsonl; ' in result.stdout
    assert "its columns are conversations, message; did you mean message?" in result.stdout
    assert "job.yaml:12: spec.training.epochs: " in result.stdout
    assert "2 errors" in result.stdout


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param('{"messages": []}\n', id="there"),
        pytest.param('{\n"a": 1}', id="over-lines"),
        pytest.param("[]", id="array"),
        pytest.param("", id="empty"),
        pytest.param(None, id="no-file"),
    ],
)
def test_rows_that_validation_does_not_judge(call, job, tmp_path, rows):
    if rows is not None:
        (tmp_path / "rows.jsonl").write_text(rows)
    job(MESSAGES)
    assert call("validate", "job.yaml").exit_code == 0


def test_all_documents_are_validated_and_other_kinds_passed_over(call, job):
    secret = "apiVersion: v1\nkind: Secret\nmetadata: {name: s}\n"
    job("---\n".join([GOOD, secret, GOOD.replace("quick", "other")]))
    assert call("validate", "job.yaml").stdout == (
        "job.yaml: 2 jobs are valid: quick, other; ignored: Secret (line 15)\n"
    )
    job("---\n".join([GOOD, GOOD.replace("epochs: 1", "epochs: 0")]))
    result = call("validate", "job.yaml")
    assert (result.exit_code, "job.yaml:26: spec.training.epochs" in result.stdout) == (40, True)


def test_files_that_hold_no_job_are_refused(call, job, tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe4")
    (tmp_path / "secret.yaml").write_text("apiVersion: v1\nkind: Secret\n")
    result = call("validate", "job.yaml", "no.yaml", "empty.yaml", "latin.yaml", "secret.yaml")
    assert result.exit_code == 40
    for line in (
        "job.yaml: quick is valid",
        "no.yaml: cannot be read: No such file or directory",
        "empty.yaml: holds no document",
        "latin.yaml: is not UTF-8 text",
        "secret.yaml: holds no QLoRAJob, only Secret (line 1)",
        "4 errors",
    ):
        assert line in result.stdout.splitlines()


def test_validate_for_programs(call, job):
    job(GOOD.replace("epochs: 1", "epochs: 0"))
    (report,) = json.loads(call("validate", "-o", "json", "job.yaml").stdout)
    assert report["mistakes"][0] == {
        "place": "job.yaml:12",
        "field": "spec.training.epochs",
        "allowed": "must be at least 1",
        "message": "spec.training.epochs: 0 must be at least 1",
    }


def test_standard_input_is_a_file_too(call):
    assert call("validate", "-", input=GOOD).exit_code == 0


# -------------------------------------------------------------------------------------------------------------- explain


@pytest.mark.parametrize("path", ["spec.lora.rank", "lora.rank"])
def test_a_field_is_explained(call, path):
    out = call("explain", path).stdout
    for part in (
        "spec.lora.rank",
        "Rank r of the update",
        "whole number",
        "16",
        "1 to 1024",
        "immutable: a resumed run",
    ):
        assert part in out


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        pytest.param("", ["model", "required", "scheduling", "suspend"], id="the-spec"),
        pytest.param(
            "quantization", ["spec.quantization", "one of NF4, FP4, INT8, None", "doubleQuantization"], id="group"
        ),
        pytest.param(
            "training.learningRate", ["decimal in quotes", "2e-4", "greater than 0 and at most 1"], id="decimal"
        ),
        pytest.param("policy.maxRestarts", ["may change while the job runs"], id="mutable"),
        pytest.param("training.maxSteps", ["set exactly one of epochs and maxSteps"], id="rule-that-names-it"),
        pytest.param("dataset.eval.fraction", ["set exactly one of source", "at most 0.5"], id="rule-of-its-group"),
        pytest.param("lora.targetModules", ["list of texts", "1 to 64 items"], id="list"),
        pytest.param(
            "scheduling.tolerations.effect", ["one of NoSchedule, PreferNoSchedule, NoExecute"], id="in-a-list"
        ),
        pytest.param("scheduling.nodeSelector", ["map of texts"], id="map"),
        pytest.param("status.progress.loss", ["status.progress.loss"], id="status"),
    ],
)
def test_explanations(call, path, parts):
    result = call("explain", *([path] if path else []))
    assert result.exit_code == 0
    for part in parts:
        assert part in result.stdout


def test_rules_are_explained_only_where_they_belong(call):
    assert "Rule" not in call("explain", "lora.rank").stdout
    assert "Rule" not in call("explain", "training.seed").stdout


@pytest.mark.parametrize(("path", "close"), [("lora.rnk", "spec.lora.rank"), ("spec.training.batchSize", "BatchSize")])
def test_an_unknown_field_is_answered_with_the_closest(call, path, close):
    result = call("explain", path)
    assert result.exit_code == 40
    assert close in result.stderr


def test_every_field_can_be_explained(call):
    paths = list(crd_schema._paths("", crd_schema.root()))
    assert len(paths) > 80
    for path in paths:
        assert explain.describe(path).path
        json.loads(explain.as_json(explain.describe(path)))


# ----------------------------------------------------------------------------------------------------- the small things


def test_crds_are_the_generated_ones(call):
    out = call("crds").stdout
    assert out.splitlines()[0] == "# Generated by 'make crds' from api/qlora_api. Do not edit."
    documents = kubernetes_yaml.read(out, "crd.yaml")  # as the API server will: a default of 2e-4 must stay a text
    assert [document.value for document in documents] == [crd(), sweep_crd()]
    (document,) = kubernetes_yaml.read(call("crds", "qlorasweeps").stdout, "crd.yaml")
    assert document.value == sweep_crd()
    assert '"jobs" must be one of qlorajobs, qlorasweeps' in call("crds", "jobs").stderr


def test_version(call):
    assert call("--version").stdout.startswith("qlora 0.")


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        pytest.param(["get", "qlorajobs"], "Did you mean 'qlora list' or 'qlora show JOB'?", id="get"),
        pytest.param(["apply", "-f", "job.yaml"], "Did you mean 'qlora submit JOB.yaml'?", id="apply"),
        pytest.param(
            ["create", "-f", "job.yaml"], "Did you mean 'qlora init' or 'qlora submit JOB.yaml'?", id="create"
        ),
        pytest.param(["delete", "tune"], "Did you mean 'qlora cancel JOB'?", id="delete"),
        pytest.param(["describe", "tune"], "Did you mean 'qlora show JOB' or 'qlora events JOB'?", id="describe"),
        pytest.param(["status"], "Did you mean 'qlora show JOB' or 'qlora watch'?", id="status"),
        pytest.param(["log", "tune"], "Did you mean 'logs'?", id="misspelled"),
    ],
)
def test_a_command_that_is_not_known_is_answered_with_the_one_to_use(call, monkeypatch, typed, answer):
    monkeypatch.setattr(target, "program", lambda: "qlora")
    result = call(*typed)
    assert result.exit_code == 2
    assert answer in result.stderr


def test_commands_that_are_suggested_exist():
    known = {command.name or command.callback.__name__ for command in app.app.registered_commands}
    assert {command.split()[0] for commands in INSTEAD.values() for command in commands} <= known
    assert not INSTEAD.keys() & known


def test_run_answers_an_error_in_words(call, job):
    result = call("run", "job.yaml", "--set", "training.epochs=0")
    assert result.exit_code == 40
    assert "--set: spec.training.epochs: 0 must be at least 1" in result.stderr


@pytest.mark.parametrize("command", ["validate", "submit"])
def test_ctrl_c_ends_a_command_with_exit_code_130(command, tmp_path, helpers):
    pipe, program = tmp_path / "job.yaml", "import signal; from qlora_cli.app import app; "
    program += "signal.signal(signal.SIGINT, signal.default_int_handler); app()"  # a shell's background job ignores it
    os.mkfifo(pipe)
    writers = []

    def is_read():
        with suppress(OSError):  # as long as nobody reads
            writers.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        return bool(writers)

    with subprocess.Popen([sys.executable, "-c", program, command, pipe], stderr=subprocess.PIPE, text=True) as process:
        try:
            helpers.wait_until(is_read)
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=PATIENCE_SECONDS)[1]
        finally:
            process.kill()
    os.close(*writers)
    assert (process.returncode, said) == (130, "")


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        pytest.param("import qlora_api, qlora_cli", ["torch", "yaml", "rich", "httpx", "typer"], id="packages"),
        pytest.param("import qlora_cli.app", ["torch", "yaml", "rich", "httpx", "pydantic"], id="main"),
        pytest.param(
            "import qlora_cli.local.run, qlora_cli.artifacts.generate",
            ["torch", "transformers", "qlora_trainer"],
            id="commands",
        ),
    ],
)
def test_imports_stay_light(statement, absent):
    code = f"{statement}; import sys; print([m for m in {absent} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
