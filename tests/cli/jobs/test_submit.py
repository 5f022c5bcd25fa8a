"""From a manifest to what is sent: errors with their lines, local paths with the way to a cluster."""

import contextlib
import os
import pty
import re
import subprocess
import sys

import pytest
import yaml
from typer.testing import CliRunner

from cli_builders import failed, running, succeeded
from fake_server import FakeServer
from qlora_cli import app
from qlora_cli.jobs import submit
from qlora_cli.kube.errors import ClusterError, KubeApiError
from qlora_cli.kube.target import Cluster
from qlora_cli.manifest.job_manifest import RefusedError

GOOD = """\
apiVersion: qlora.dev/v1alpha1
kind: QLoRAJob
metadata:
  name: tune
  labels: {team: nlp}
spec:
  model: {source: hf://org/name@main}
  dataset:
    train: {source: s3://bucket/rows.jsonl}
    format: Text
  lora:
  training: {epochs: 1, globalBatchSize: 16}
  output: {destination: s3://adapters/tune}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def file(text, name="job.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path.relative_to(tmp_path)

    return file


def test_what_is_sent_is_what_is_written_and_no_default(write):
    (found,) = submit.read_manifest(write(GOOD), ["training.maxSteps=5", "training.epochs=null"]).jobs
    assert found.body["metadata"] == {"name": "tune", "labels": {"team": "nlp"}}
    assert found.body["spec"]["training"] == {"globalBatchSize": 16, "maxSteps": 5}
    assert "policy" not in found.body["spec"]
    assert found.origin == "job.yaml:1"


def test_other_kinds_are_passed_over_and_named(write):
    secret = "---\napiVersion: v1\nkind: Secret\nmetadata: {name: s3}\n---\n"
    read = submit.read_manifest(write(f"{secret}{GOOD}"))
    assert ([s.body["metadata"]["name"] for s in read.jobs], read.ignored) == (["tune"], ("Secret s3",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            ("s3://bucket/rows.jsonl", "data/rows.jsonl"),
            'job.yaml:9: spec.dataset.train.source: "data/rows.jsonl" is a path on this machine, where no pod '
            "can read it; upload it (qlora upload data/rows.jsonl s3://adapters/rows.jsonl) and name "
            "s3://adapters/rows.jsonl, or use 'qlora run'",
            id="rows",
        ),
        pytest.param(
            ("hf://org/name@main", "/models/base"),
            'job.yaml:7: spec.model.source: "/models/base" is a path on this machine, where no pod can read it; '
            "upload it (qlora upload /models/base s3://adapters/base) and name s3://adapters/base, or use 'qlora run'",
            id="model",
        ),
        pytest.param(
            ("s3://adapters/tune", "file:///out/tune"),
            'job.yaml:13: spec.output.destination: "file:///out/tune" is a path on this machine, where no pod '
            "can read it; name a folder in object storage, such as s3://BUCKET/tune, or use 'qlora run'",
            id="destination",
        ),
        pytest.param(
            ("s3://adapters/tune", "s3://$BUCKET/tune"),
            'job.yaml:13: spec.output.destination: "s3://$BUCKET/tune" must not have variables: they are not replaced '
            "here; write the value",
            id="variable",
        ),
        pytest.param(
            ("epochs: 1", "epochs: 0"), "job.yaml:12: spec.training.epochs: 0 must be at least 1", id="bounds"
        ),
    ],
)
def test_an_error_is_one_line_with_field_value_and_remedy(write, monkeypatch, change, message):
    monkeypatch.setattr("sys.argv", ["qlora"])
    with pytest.raises(RefusedError) as caught:
        submit.read_manifest(write(GOOD.replace(*change)))
    assert str(caught.value) == message


def test_as_a_plugin_of_kubectl_it_suggests_itself(write, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/local/bin/kubectl-qlora"])
    with pytest.raises(RefusedError, match="kubectl qlora upload rows s3://adapters/rows"):
        submit.read_manifest(write(GOOD.replace("s3://bucket/rows.jsonl", "rows")))


def test_a_dry_run_by_the_client_needs_no_cluster(write):
    result = CliRunner().invoke(app.app, ["submit", str(write(GOOD)), "--dry-run", "client", "-o", "yaml"])
    assert result.exit_code == 0, result.output
    assert yaml.safe_load(result.stdout)["spec"]["model"] == {"source": "hf://org/name@main"}


def test_without_a_cluster_it_ends_with_its_own_exit_code(write):
    result = CliRunner().invoke(app.app, ["submit", str(write(GOOD))])
    assert result.exit_code == 3
    assert re.match(r"no cluster is configured: .* name one with --kubeconfig or \$KUBECONFIG\n", result.stderr)


def test_a_namespace_is_said_once(write):
    path = write(GOOD.replace("  name: tune", "  name: tune\n  namespace: nlp"))
    result = CliRunner().invoke(app.app, ["submit", str(path), "-n", "vision", "--dry-run", "client"])
    assert (result.exit_code, result.stderr.splitlines()) == (
        40,
        ['job.yaml:1: metadata.namespace: "nlp" is not --namespace vision; give one of the two'],
    )


# -------------------------------------------------------------------------------------------------------- on a terminal


@pytest.fixture
def on_terminal(write):
    """Submit on a pseudo-terminal to a server with prepared answers: exit code, screen, requests."""

    def submit_there(answer, *options, jobs=()):
        listed = (200, {"metadata": {"resourceVersion": "2"}, "items": list(jobs)})
        nodes = [] if {"-y", "--yes"} & {*options} else [(200, {"metadata": {}, "items": []})]
        created = {"metadata": {"name": "tune", "namespace": "default"}}
        path = write(GOOD.replace("hf://org/name@main", "pvc://models/base"))
        with FakeServer(*nodes, (201, created), *[(200, job) for job in jobs], listed) as server:
            kubeconfig = write(server.kubeconfig(), "config")
            master, slave = pty.openpty()
            command = [sys.executable, "-m", "qlora_cli", "submit", path, "--kubeconfig", kubeconfig, *options]
            process = subprocess.Popen([*map(str, command)], stdin=slave, stdout=slave, stderr=slave)
            os.write(master, answer.encode())
            os.close(slave)
            screen = b""
            with contextlib.suppress(OSError):  # the other end is closed
                while data := os.read(master, 65536):
                    screen += data
            os.close(master)
            return process.wait(60), screen.decode(), [(verb, path) for verb, path, *_ in server.asked]

    return submit_there


JOBS = "/apis/qlora.dev/v1alpha1/namespaces/default/qlorajobs"


def test_on_a_terminal_the_plan_is_shown_and_nothing_is_created_without_a_yes(on_terminal):
    code, screen, asked = on_terminal("n\n")
    assert (code, asked) == (1, [("GET", "/api/v1/nodes")])
    for part in ("pvc://models/base", "not planned", "Create it in namespace default, context here? [y/N]"):
        assert part in screen


def test_on_a_terminal_a_created_job_is_watched_unless_told_not_to(on_terminal):
    done = succeeded("tune")
    done["metadata"]["namespace"] = "default"
    code, _, asked = on_terminal("y\n", jobs=[done])
    assert code == 0
    assert asked[:4] == [("GET", "/api/v1/nodes"), ("POST", JOBS), ("GET", f"{JOBS}/tune"), ("GET", JOBS)]
    code, screen, asked = on_terminal("", "--yes", "--no-watch")
    assert (code, asked) == (0, [("POST", JOBS)])
    assert "qlorajob.qlora.dev/tune created" in screen


def test_without_a_terminal_nothing_is_asked_and_nothing_is_watched(write):
    path = write(GOOD)
    with FakeServer((201, {"metadata": {"name": "tune", "namespace": "default"}})) as server:
        kubeconfig = write(server.kubeconfig(), "config")
        result = CliRunner().invoke(app.app, ["submit", str(path), "--kubeconfig", str(kubeconfig)])
    assert (result.exit_code, result.stdout) == (0, "qlorajob.qlora.dev/tune created\n")
    assert [verb for verb, *_ in server.asked] == ["POST"]


# --------------------------------------------------------------------------------------------------------------- retry


class FakeApi:
    """Jobs by name."""

    def __init__(self, *jobs):
        self.jobs = {job["metadata"]["name"]: job for job in jobs}

    def get(self, path, **_):
        name = path.rsplit("/", 1)[-1]
        if name not in self.jobs:
            raise KubeApiError(404, {"reason": "NotFound", "message": f'qlorajobs.qlora.dev "{name}" not found'}, path)
        return self.jobs[name]

    def list(self, path, **_):
        return list(self.jobs.values()), "1"


def retried(*jobs, name=None, assignments=()):
    return submit.retry_job(Cluster(FakeApi(*jobs), "research"), jobs[0]["metadata"]["name"], name, assignments)


def test_a_retry_is_a_new_job_with_the_same_spec():
    old = failed("tune")
    old["metadata"]["annotations"] = {"note": "kept", "kubectl.kubernetes.io/last-applied-configuration": "{}"}
    new = retried(old, failed("tune-r2"))
    assert new["metadata"] == {
        "name": "tune-r3",
        "namespace": "research",
        "annotations": {"note": "kept", "qlora.dev/retry-of": "tune"},
    }
    assert new["spec"] == {**old["spec"], "suspend": False}
    assert "status" not in new
    assert retried(old, name="other", assignments=["lora.rank=64"])["spec"]["lora"] == {"rank": 64, "alpha": 32}


def test_what_is_not_over_is_not_retried():
    with pytest.raises(ClusterError, match=r'job "tune" is Running \(Training\) and is retried by the operator itself'):
        retried(running("tune"))


def test_what_succeeded_is_retried_only_with_another_destination():
    with pytest.raises(ClusterError, match=r"--set output.destination=…"):
        retried(succeeded("tune"))
    new = retried(succeeded("tune"), assignments=["output.destination=s3://b/2"])
    assert new["spec"]["output"] == {"destination": "s3://b/2"}


@pytest.mark.parametrize(
    ("name", "following"),
    [("tune", "tune-r2"), ("tune-r9", "tune-r10"), ("a" * 52, "a" * 49 + "-r2"), ("tune-r2-x", "tune-r2-x-r2")],
)
def test_names_of_retries(name, following):
    assert submit.next_name(name) == following


def test_a_name_that_is_not_there_leads_to_one_that_is():
    from qlora_cli.kube.target import get_job

    with pytest.raises(ClusterError) as caught:
        get_job(Cluster(FakeApi(failed("tune")), "research"), "tunes")
    assert str(caught.value) == 'no job "tunes" in namespace research; did you mean tune?'
