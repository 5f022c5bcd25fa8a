"""Commands that take local runs as they take jobs."""

import json
import os

import pytest
from typer.testing import CliRunner

from cli_builders import run_record
from qlora_cli import app
from qlora_cli.kube.target import program


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name, **more):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        record = run_record(name, **more)
        (folder / "run.json").write_text(json.dumps({k: v for k, v in record.items() if v is not None}))
        return folder

    return write


def call(*arguments):
    return CliRunner().invoke(app.app, list(arguments))


FAILED = {"number": 1, "worldSize": 2, "startTime": "2026-01-02T10:00:00Z", "endTime": "2026-01-02T10:01:00Z"}
FAILED |= {
    "microBatchSize": 1,
    "gradientAccumulationSteps": 8,
    "reason": "UserError",
    "message": "no rows",
    "exitCode": 40,
}


def test_where_no_cluster_is_configured_runs_are_listed(runs):
    runs("quick")
    runs("wrong", result=None, attempts=[FAILED])
    runs("quick.old-20260101-000000")
    listed = call("list")
    assert listed.exit_code == 0, listed.output
    rows = [line.split() for line in listed.stdout.splitlines()]
    assert rows[0][:2] == ["NAME", "STATE"]
    assert [row[:3] for row in rows[1:]] == [
        ["runs/quick", "Succeeded", "Completed"],
        ["runs/wrong", "Failed", "UserError"],
    ]
    assert listed.stderr == "Next: qlora show runs/wrong\n"
    assert call("list", "--local", "-o", "name").stdout == "runs/quick\nruns/wrong\n"
    assert [r["name"] for r in json.loads(call("list", "-o", "json").stdout)["items"]] == ["quick", "wrong"]


@pytest.mark.parametrize(
    ("attempt", "state"),
    [
        ({"reason": "Preempted"}, "Suspended"),
        ({"reason": "Stalled"}, "Failed"),
        ({"reason": None, "endTime": None}, "Suspended"),
    ],
    ids=["interrupted", "failed", "killed"],
)
def test_states_of_a_run_that_is_not_done(runs, attempt, state):
    kept = {k: v for k, v in {**FAILED, **attempt}.items() if v is not None}
    runs("quick", result=None, attempts=[kept])
    assert call("list", "--local").stdout.splitlines()[1].split()[1] == state


def test_a_run_whose_process_lives_is_running(runs, tmp_path):
    runs("quick", result=None, attempts=[{k: v for k, v in FAILED.items() if k not in ("endTime", "reason")}])
    (tmp_path / "runs" / ".quick.lock").write_text(str(os.getpid()))
    assert call("list", "--local").stdout.splitlines()[1].split()[1:3] == ["Running", "Training"]


def prepare_left(tmp_path, **message):
    folder = tmp_path / "runs" / "quick" / "prepare"
    folder.mkdir()
    (folder / "termination.json").write_text(json.dumps(message))


def test_a_run_whose_prepare_failed_is_failed_and_says_why(runs, tmp_path):
    runs("quick", result=None, attempts=[])
    assert call("list", "--local").stdout.splitlines()[1].split()[1] == "Pending"
    prepare_left(tmp_path, exitCode=40, reason="UserError", message="dataset.train.source: there are no rows")
    row = call("list", "--local").stdout.splitlines()[1]
    assert row.split()[1:3] == ["Failed", "UserError"]
    assert "there are no rows" in row
    assert call("show", "runs/quick").stdout.startswith("runs/quick  Failed (UserError)")


def test_a_run_that_was_stopped_after_its_prepare_is_pending(runs, tmp_path):
    runs("quick", result=None, attempts=[])
    prepare_left(tmp_path, exitCode=0, reason="Completed", message="")
    assert call("list", "--local").stdout.splitlines()[1].split()[1:3] == ["Pending", "Prepared"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"name": 1}',
        '{"name": "x", "attempts": 3}',
        '{"name": "x", "result": "done"}',
        "[" * 100000,
    ],
    ids=["empty", "half", "list", "nothing", "number", "attempts", "result", "deep"],
)
def test_a_damaged_record_hides_no_other_run(runs, tmp_path, text):
    runs("quick")
    runs("wrong", result=None, attempts=[FAILED])
    (tmp_path / "runs" / "quick" / "run.json").write_text(text)
    listed = call("list", "--local")
    assert listed.exit_code == 0, listed.output
    states = {row.split()[0]: row.split()[1:3] for row in listed.stdout.splitlines()[1:]}
    assert states == {"runs/wrong": ["Failed", "UserError"], "runs/quick": ["Unknown", "Damaged"]}
    shown = call("show", "runs/quick")
    assert (shown.exit_code, shown.stdout) == (40, "")
    assert shown.stderr.startswith("runs/quick/run.json: ")


WRONG_FIELDS = (
    ("created", 7, "created: 7 must be a text"),
    ("spec.dataset.train", "x", 'spec.dataset.train: "x" must be a group of fields'),
    ("spec.lora", [8], "spec.lora: must be a group of fields"),
    ("attempts.0.number", "1", 'attempts[0].number: "1" must be a whole number'),
    ("attempts.0.startTime", 5, "attempts[0].startTime: 5 must be a text"),
    ("result.progress.loss", "low", 'result.progress.loss: "low" must match'),
    ("result.progress.step", 10**30, "result.progress.step: 1000000000000000000000000000000 must be at most"),
    ("result.memory.measured.peak", "1Gi", 'result.memory.measured.peak: "1Gi" must be a whole number'),
    ("result.adapter", "out", 'result.adapter: "out" must be a group of fields'),
    ("receipt", {"trainRows": "5"}, 'receipt.trainRows: "5" must be a whole number'),
)


@pytest.mark.parametrize(("path", "value", "said"), WRONG_FIELDS, ids=[path for path, _, _ in WRONG_FIELDS])
def test_a_field_that_cannot_be_shown_is_named(runs, tmp_path, path, value, said):
    runs("other")
    file = runs("quick") / "run.json"
    record = json.loads(file.read_text())
    *parents, last = (int(part) if part.isdecimal() else part for part in path.split("."))
    at = record
    for part in parents:
        at = at[part]
    at[last] = value
    file.write_text(json.dumps(record))
    listed = call("list", "--local", "-o", "json")
    assert listed.exit_code == 0, listed.output
    assert {row.split()[0]: row.split()[1] for row in call("list", "--local").stdout.splitlines()[1:]} == {
        "runs/other": "Succeeded",
        "runs/quick": "Unknown",
    }
    for command in (["show", "runs/quick"], ["compare", "runs/quick", "runs/other"], ["logs", "runs/quick"]):
        shown = call(*command)
        assert (shown.exit_code, shown.stdout) == (40, "")
        assert shown.stderr.startswith(f"runs/quick/run.json: {said}"), shown.stderr


def test_a_time_without_a_zone_is_one_of_utc(runs):
    runs("quick", created="2026-01-02T09:59:00")
    naive = {**FAILED, "startTime": "2026-01-02T10:00:00"}
    runs("wrong", result=None, attempts=[naive])
    assert call("list", "--local", "-o", "name").stdout == "runs/quick\nruns/wrong\n"
    assert call("list", "--local").exit_code == 0
    assert "created" in call("show", "runs/wrong").stdout


@pytest.mark.parametrize("file", ["run.json", "attempt-1/log.txt", "prepare/termination.json"])
def test_no_command_waits_for_a_pipe(runs, tmp_path, file):
    runs("other")
    folder = runs("quick", result=None, attempts=[]) if "prepare" in file else runs("quick")
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    assert "runs/other  Succeeded" in call("list", "--local").stdout
    for command in (["show", "runs/quick"], ["logs", "runs/quick"], ["report", "quick"], ["verify", "runs/quick"]):
        assert call(*command).exit_code in (0, 40)


@pytest.mark.parametrize("options", [[], ["-o", "name"]], ids=["table", "names"])
def test_a_folder_whose_name_has_lines_is_one_row(runs, options):
    runs("a\nruns/forged")
    rows = call("list", "--local", *options).stdout.splitlines()
    assert [row for row in rows if row.startswith("runs/forged")] == []


def test_a_record_that_is_a_folder_is_named(runs, tmp_path):
    runs("quick")
    (tmp_path / "runs" / "quick" / "run.json").unlink()
    (tmp_path / "runs" / "quick" / "run.json").mkdir()
    assert call("show", "runs/quick").stderr == "runs/quick/run.json: cannot be read: Is a directory\n"
    assert "Unknown" in call("list", "--local").stdout


@pytest.mark.parametrize(
    "command", [["list", "--local"], ["show", "runs/quick"], ["compare", "runs/quick", "runs/wrong"]]
)
@pytest.mark.parametrize(
    "variables", [{"NO_COLOR": "1", "FORCE_COLOR": ""}, {"TERM": "dumb"}, {}], ids=["no-color", "dumb", "pipe"]
)
def test_no_escape_codes_where_no_terminal_or_no_color_is_wanted(runs, command, variables, monkeypatch):
    runs("quick")
    runs("wrong", result=None, attempts=[FAILED])
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = call(*command)
    assert "\x1b" not in done.stdout + done.stderr


def test_show_and_compare(runs):
    runs("quick")
    runs("other", spec={**run_record()["spec"], "lora": {"rank": 4, "alpha": 32}})
    shown = call("show", "runs/quick")
    assert shown.stdout.splitlines()[0] == "runs/quick  Succeeded (Completed)"
    assert "qlora generate --run quick" in shown.stderr
    assert json.loads(call("show", "runs/quick", "-o", "json").stdout)["name"] == "quick"
    compared = json.loads(call("compare", "runs/quick", "runs/other", "-o", "json").stdout)
    assert compared["differences"] == {"spec.lora.rank": [8, 4]}


def test_a_run_that_is_not_there(runs):
    runs("quick")
    missing = call("show", "runs/quck")
    assert (missing.exit_code, missing.stderr) == (40, "runs/quck: is no folder of a local run; there are runs/quick\n")
    assert call("compare", "runs/quick").stderr.startswith("JOB: give at least two")


def test_nothing_there_yet_suggests_a_beginning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    empty = call("list")
    assert (empty.exit_code, empty.stdout) == (0, "")
    assert empty.stderr.splitlines()[:2] == [
        "No runs in folder runs, and no cluster is configured.",
        "Next: qlora init",
    ]
    assert call("list", "--local").stderr.startswith("No runs in folder runs.\n")


# ---------------------------------------------------------------------------------------------------------------- init


def test_init_writes_a_file_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    flags = ("--model", "models/base", "--data", "rows.jsonl", "--destination", "out/mine", "--format", "Text")
    done = call("init", *flags)
    assert (done.exit_code, done.stdout) == (0, "job.yaml written\n")
    assert "Next: qlora run job.yaml" in done.stderr
    assert "  name: mine\n" in (tmp_path / "job.yaml").read_text()
    again = call("init", *flags)
    assert (again.exit_code, again.stderr) == (
        40,
        "--file job.yaml: is there already; --force replaces it, --file names another\n",
    )
    assert call("init", *flags, "--force").exit_code == 0
    assert call("validate", "job.yaml").exit_code == 0


def test_init_asks_nobody_where_there_is_no_terminal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call("init", "--model", "m")
    assert (result.exit_code, result.stderr) == (
        40,
        "--data, --destination: needed where there is no terminal to ask on\n",
    )


# ---------------------------------------------------------------------------------------------------------- completion


def test_completion_is_silent_without_a_cluster():
    environment = {"_QLORA_COMPLETE": "complete_bash", "COMP_WORDS": "qlora show a", "COMP_CWORD": "2"}
    result = CliRunner().invoke(app.app, [], env=environment, prog_name="qlora")
    assert (result.stdout.strip(), result.stderr) == ("", "")


@pytest.mark.parametrize(
    ("called", "on_path", "said"),
    [
        (".venv/bin/qlora", None, ".venv/bin/qlora"),
        (".venv/bin/qlora", "/usr/bin/qlora", "qlora"),
        ("/usr/bin/kubectl-qlora", None, "kubectl qlora"),
        ("/usr/bin/pytest", None, "qlora"),
    ],
)
def test_the_next_command_is_one_that_can_be_typed(called, on_path, said, monkeypatch):
    monkeypatch.setattr("sys.argv", [called])
    monkeypatch.setattr("shutil.which", lambda name: on_path)
    assert program() == said
