"""Published adapters: fetched and verified byte by byte, from a folder and from a real S3 server."""

import hashlib
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli_builders import job, run_record, succeeded
from fake_server import FakeServer
from published_folders import FILES, manifest, publish
from qlora_cli import app
from qlora_cli.artifacts import adapters, storage
from qlora_cli.commands.exit_codes import UNREACHABLE, USER_ERROR
from qlora_cli.kube.errors import ClusterError


@pytest.fixture
def call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app.app, [str(a) for a in arguments])


@pytest.fixture
def published(tmp_path):
    return publish(tmp_path / "out")


def test_what_was_published_is_verified(call, published):
    result = call("verify", f"{published}/")
    assert result.exit_code == 0
    assert result.stdout == f"{published}/manifest.json: all 3 files are what was published\n"


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        pytest.param(lambda path: path.unlink(), "is missing", id="missing"),
        pytest.param(lambda path: path.write_bytes(b"{"), "has 1 bytes where 2 were published", id="cut"),
        pytest.param(lambda path: path.write_bytes(b"[]"), "its SHA-256 differs", id="changed"),
    ],
)
def test_every_difference_is_named(call, published, damage, problem):
    damage(published / "3f2a-attempt-1/adapter/adapter_config.json")
    result = call("verify", f"{published}/")
    assert result.exit_code == 1
    assert result.stdout.startswith("3f2a-attempt-1/adapter/adapter_config.json ")
    assert problem in result.stdout
    plain = json.loads(call("verify", f"{published}/", "-o", "json").stdout)
    assert (plain["verified"], len(plain["problems"]), plain["files"]) == (False, 1, 3)


def test_a_download_is_the_adapter_without_the_attempts_folder_and_verifies(call, published, tmp_path):
    result = call("download", f"{published}/manifest.json", "--to", "here")
    assert result.exit_code == 0, result.output
    assert "here/adapter: 3 files" in result.stdout
    assert (tmp_path / "here/adapter/adapter_model.safetensors").read_bytes() == FILES[
        "3f2a-attempt-1/adapter/adapter_model.safetensors"
    ]
    assert call("verify", "here/").exit_code == 0
    assert "0 files" in call("download", f"{published}/manifest.json", "--to", "here").stdout


@pytest.mark.parametrize("command", ["download {0}/ --to", "merge {0}/ --out", "report {0}/ --out", "list --runs-dir"])
def test_an_empty_path_is_none(call, published, tmp_path, command):
    result = call(*command.format(published).split(), "")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "is empty; name a file or folder" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_home_that_no_shell_has_expanded_is_the_users(call, published, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert call("download", f"{published}/", "--to=~/mine").exit_code == 0
    assert (tmp_path / "home" / "mine" / "manifest.json").exists()


def test_a_download_may_leave_the_merged_model(call, published, tmp_path):
    assert call("download", f"{published}/", "--adapter-only").exit_code == 0
    assert sorted(p.name for p in (tmp_path / "tune").iterdir()) == ["adapter", "manifest.json"]


def test_what_differs_is_never_laid_down(call, published, tmp_path):
    (published / "3f2a-attempt-1/adapter/adapter_model.safetensors").write_bytes(b"evil")
    result = call("download", f"{published}/", "--to", "here")
    assert result.exit_code == 40
    assert "is not what was published; the adapter must not be used" in result.stderr
    assert [p.name for p in (tmp_path / "here").rglob("*") if p.is_file()] == ["adapter_config.json"]


CONFIG = "3f2a-attempt-1/adapter/adapter_config.json"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "is no manifest of this operator"),
        (b'{"schema": "other/v9", "files": []}', 'schema "other/v9" is not known here'),
        (manifest({"a/../../evil": b""}), "leaves its folder"),
        (manifest({"/etc/evil": b""}), "leaves its folder"),
        (
            manifest({"a/.git/hooks/post-commit": b""}),
            "which is in neither of 3f2a-attempt-1/adapter, 3f2a-attempt-1/merged",
        ),
        (manifest({"a/json.py": b""}), "which is in neither of 3f2a-attempt-1/adapter, 3f2a-attempt-1/merged"),
        (manifest(adapter="../evil"), 'adapter must be the folder "adapter" of an attempt'),
        (manifest(adapter="3f2a-attempt-1/merged"), 'adapter must be the folder "adapter" of an attempt'),
        (manifest(adapter=3), "adapter: 3 must be a text"),
        (json.dumps({"schema": adapters.SCHEMA, "files": []}).encode(), "adapter: is required"),
        (manifest({}), "names no 3f2a-attempt-1/adapter/adapter_config.json, without which there is no adapter"),
        (manifest({CONFIG: b"{}"}), "names no 3f2a-attempt-1/adapter/adapter_model.safetensors"),
        (manifest(adapter="b-attempt-2/adapter"), "which is in neither of b-attempt-2/adapter, b-attempt-2/merged"),
        (manifest(listed=[{"path": CONFIG, "size": 2, "sha256": "ab"}] * 2), f'names "{CONFIG}" twice'),
        (manifest(listed=[{"path": CONFIG, "size": -1, "sha256": "ab"}]), r"files\[0\].size: -1 must be at least 0"),
        (manifest(listed=[{"path": CONFIG, "size": "2", "sha256": "ab"}]), r"files\[0\].size: \"2\" must be a whole"),
        (manifest(base="x"), 'base: "x" must be a group of fields'),
        (manifest(listed="x"), 'files: "x" is not allowed'),
        (b"[" * 2_000_000, "is no manifest of this operator"),
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path, data, message):
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(storage.ArtifactError, match=message):
        adapters.read(adapters.Source(str(tmp_path)))


@pytest.mark.parametrize("command", ["verify", "download", "merge --out merged"])
@pytest.mark.parametrize("data", [manifest({}), manifest({CONFIG: b"{}"})], ids=["no files", "no weights"])
def test_a_manifest_without_an_adapter_is_neither_verified_nor_used(call, tmp_path, command, data):
    (tmp_path / "manifest.json").write_bytes(data)
    name, *options = command.split()
    result = call(name, f"{tmp_path}/", *options)
    assert (result.exit_code, result.stdout) == (40, "")
    assert "without which there is no adapter" in result.stderr


def test_a_manifest_that_is_not_the_jobs_is_refused(published):
    with pytest.raises(
        storage.ArtifactError, match=r"is not the manifest that the job published: its SHA-256 is \w+…, and"
    ):
        adapters.read(adapters.Source(str(published), "ab" * 32))


def test_a_job_vouches_for_its_manifest(published):
    adapter = {
        "uri": "",
        "manifestUri": f"{published}/manifest.json",
        "manifestSha256": hashlib.sha256(manifest()).hexdigest(),
    }
    source = adapters.source_of("done", succeeded(adapter=adapter))
    assert len(adapters.read(source).files) == 3


def test_a_local_run_is_named_by_its_folder(call, published, tmp_path):
    run = tmp_path / "runs" / "quick"
    run.mkdir(parents=True)
    record = run_record()
    record["result"]["adapter"] = {"uri": "", "manifestUri": f"{published}/manifest.json", "manifestSha256": ""}
    (run / "run.json").write_text(json.dumps(record))
    assert call("verify", "runs/quick").exit_code == 0


@pytest.mark.parametrize("command", ["verify", "download", "show", "logs", "compare other"])
def test_a_folder_that_is_named_like_a_job_is_told(call, tmp_path, command):
    publish(tmp_path / "quick")
    result = call(*command.split(), "quick")
    assert (result.exit_code, result.stdout) == (UNREACHABLE, "")
    assert result.stderr.startswith("no cluster is configured: ")
    assert result.stderr.endswith('; "quick" names a job; the folder here is ./quick\n')
    assert "names a job" not in call(*command.split(), "slow").stderr


def test_a_folder_that_is_named_like_a_job_that_is_not_there_is_told(call, tmp_path):
    publish(tmp_path / "quick")
    missing = {"reason": "NotFound", "message": 'qlorajobs.qlora.dev "quick" not found', "details": {"name": "quick"}}
    with FakeServer((404, missing), (200, {"metadata": {}, "items": []})) as server:
        (tmp_path / "kubeconfig").write_text(server.kubeconfig())
        result = call("verify", "quick", "--kubeconfig", "kubeconfig")
    assert result.exit_code == USER_ERROR
    assert result.stderr.startswith('no job "quick" in namespace default; ')
    assert result.stderr.endswith('; "quick" names a job; the folder here is ./quick\n')
    assert call("verify", "./quick").exit_code == 0


def test_a_job_without_an_adapter_says_where_to_look():
    with pytest.raises(
        ClusterError, match=r'"wide" has published no adapter, it is Pending \(Queued\); see .* watch wide'
    ):
        adapters.source_of("wide", job("wide", "Pending", "Queued"))


# ----------------------------------------------------------------------------------------------------- object storage


def test_object_storage_is_written_read_and_verified(call, published, s3):
    result = call("upload", published, f"{s3}/folder")
    assert result.exit_code == 0, result.output
    assert f"{s3}/folder/manifest.json" in result.stdout.splitlines()
    assert call("verify", f"{s3}/folder/").exit_code == 0
    assert call("download", f"{s3}/folder/manifest.json", "--to", "here").exit_code == 0
    assert call("verify", "here/").exit_code == 0


def test_a_file_is_uploaded_under_its_name(call, tmp_path, s3):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    assert call("upload", "rows.jsonl", s3).stdout == f"{s3}/rows.jsonl\n"
    assert call("upload", "rows.jsonl", f"{s3}/a/b").stdout == f"{s3}/a/b\n"


def test_what_is_not_there_and_what_is_not_let_in_is_said(call, s3, monkeypatch):
    missing = call("verify", f"{s3}/nothing/manifest.json")
    assert (missing.exit_code, missing.stderr) == (40, f"{s3}/nothing/manifest.json: is not there\n")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    denied = call("verify", f"{s3}/nothing/manifest.json")
    assert denied.exit_code == 40
    assert "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY" in denied.stderr
    assert len(denied.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("uri", "message"), [("pvc://c/x", "kubectl cp"), ("ftp://x", "must be a folder, or start with s3")]
)
def test_places_that_are_out_of_reach(uri, message):
    with pytest.raises(storage.ArtifactError, match=message):
        storage.open_folder(uri)


def test_uploads_that_cannot_be(call, tmp_path):
    assert "must start with s3://, gs:// or az://" in call("upload", tmp_path, "/elsewhere").stderr
    assert "must name a folder" in call("upload", tmp_path, "s3://b//k").stderr
    assert "there is no such file or folder" in call("upload", "nothing", "s3://b/k").stderr


def test_torch_is_never_loaded(published):
    import subprocess
    import sys

    code = (
        "import sys; from qlora_cli.app import app\n"
        f"try: app(['verify', '{published}/'])\nexcept SystemExit as e: assert not e.code\n"
        "loaded = {'torch', 'qlora_trainer', 'qlora_api.job', 'qlora_api.spec'} & sys.modules.keys()\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path("/"))


# -------------------------------------------------------------------------------------------------------- foreign files


FOREIGN = {
    "chat-template": "adapter/chat_template.jinja",
    "pickle": "adapter/adapter_model.bin",
    "weights": "merged/model-00001-of-00002.safetensors",
    "folder-of-templates": "adapter/additional_chat_templates/tool.jinja",
    "hidden": "adapter/.config.json",
}


@pytest.mark.parametrize("name", FOREIGN.values(), ids=FOREIGN)
def test_a_file_that_was_not_published_is_named(call, published, name):
    assert call("download", f"{published}/", "--to", "here").exit_code == 0
    for folder in (published / "3f2a-attempt-1", Path("here")):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    for place, path in (("here/", name), (f"{published}/", f"3f2a-attempt-1/{name}")):
        result = call("verify", place)
        assert (result.exit_code, result.stdout) == (1, f"{path} is not in the manifest\n")


def test_a_link_to_a_folder_was_not_published(call, published, tmp_path):
    (tmp_path / "templates").mkdir()
    (published / "3f2a-attempt-1/adapter/additional_chat_templates").symlink_to(tmp_path / "templates")
    result = call("verify", f"{published}/")
    assert result.stdout == "3f2a-attempt-1/adapter/additional_chat_templates is not in the manifest\n"


def test_both_copies_are_looked_at_where_there_are_two(call, published):
    """A copy that is right does not vouch for the one beside it."""
    assert call("download", f"{published}/", "--to", f"{published}").exit_code == 0
    (published / "adapter" / "adapter_config.json").write_bytes(b"[]")
    result = call("verify", f"{published}/")
    assert result.stdout == "adapter/adapter_config.json is not what was published: its SHA-256 differs\n"


def test_a_download_without_the_merged_model_verifies(call, published):
    assert call("download", f"{published}/", "--adapter-only", "--to", "here").exit_code == 0
    assert call("verify", "here/").exit_code == 0


def test_a_download_into_a_folder_with_other_files_says_so(call, published):
    Path("here/adapter").mkdir(parents=True)
    Path("here/adapter/chat_template.jinja").write_text("x")
    result = call("download", f"{published}/", "--to", "here")
    assert result.exit_code == 40
    assert "adapter/chat_template.jinja is not in the manifest; download into an empty folder" in result.stderr


def test_the_trainers_verifier_and_the_command_lines_say_the_same(call, published, capsys):
    from qlora_trainer.verify import main

    body = json.loads(manifest())
    more = {"namespace": "team", "runUid": "u", "attempt": 1, "created": "2026-01-01T00:00:00Z", "metrics": {}}
    data = {**body, **more, "merged": None, "packages": {}, "config": {}}
    (published / "manifest.json").write_text(json.dumps(data))
    (published / "3f2a-attempt-1/adapter/chat_template.jinja").write_text("x")
    (published / "3f2a-attempt-1/merged/model.safetensors").write_text("other")
    told = call("verify", f"{published}/").stdout
    assert main([f"{published}/manifest.json"]) == 1
    assert capsys.readouterr().out == told
    assert len(told.splitlines()) == 2


@pytest.mark.parametrize("inside", ["3f2a-attempt-1/adapter", "3f2a-attempt-1/adapter/deep/er", "adapter", "link"])
@pytest.mark.parametrize("command", ["download {source}/ --to {path}", "merge {source}/ --out {path}"])
def test_nothing_is_written_into_a_published_adapter(call, published, tmp_path, command, inside):
    (tmp_path / "out" / "link").symlink_to(published / "3f2a-attempt-1")
    other = publish(tmp_path / "other")
    result = call(*command.format(source=other, path=published / inside).split())
    assert result.exit_code == 40
    assert f"is in a folder of the adapter that {published}/manifest.json lists" in result.stderr
    (tmp_path / "out" / "link").unlink()
    assert call("verify", f"{published}/").exit_code == 0
    assert call("download", f"{other}/", "--to", f"{published}/beside").exit_code == 0
    assert call("verify", f"{published}/").exit_code == 0


def test_nothing_is_uploaded_into_a_published_adapter(call, published, tmp_path, s3):
    (tmp_path / "rows.jsonl").write_text("{}")
    assert call("upload", published, f"{s3}/folder").exit_code == 0
    assert call("upload", published, f"{s3}/folder").exit_code == 0
    result = call("upload", "rows.jsonl", f"{s3}/folder/3f2a-attempt-1/adapter/")
    assert result.exit_code == 40
    assert f"is in a folder of the adapter that {s3}/folder/manifest.json lists" in result.stderr
    assert call("verify", f"{s3}/folder/").exit_code == 0
