"""From submit to download, command by command, on a real control plane."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from cluster.scenarios.jobs import in_state, job_path
from cluster.scenarios.script import pods_do

ADAPTER = {
    "uri": "s3://adapters/job/3f2a-attempt-1/adapter",
    "manifestUri": "s3://adapters/job/manifest.json",
    "manifestSha256": "a" * 64,
}


def word(code=0, reason="Completed", message="step 10 of 10", **more):
    said = {"exitCode": code, "reason": reason, "message": message, "progress": {"step": 10, "totalSteps": 10}}
    return json.dumps({**said, **more})


DONE = {"run-seconds": "1", "exit-code": 0, "termination-message": word(adapter=ADAPTER)}
FAILS = {"run-seconds": "0.5", "exit-code": 40, "termination-message": word(40, "UserError", "q_prj matches no layer")}


def test_a_job_from_submit_to_its_adapter(qlora, manifest, api):
    with pods_do(api, qlora.namespace, DONE, job="whole"):
        sent = qlora("submit", manifest("whole"))
        assert (sent.code, sent.out) == (0, "qlorajob.qlora.dev/whole created\n")
        assert f"Next: qlora watch whole -n {qlora.namespace}" in sent.err
        watched = qlora("watch", "whole")
    assert watched.code == 0, watched.err
    assert watched.out.splitlines()[-1] == "whole  Succeeded (Completed)  step 10/10  step 10 of 10"
    assert "Next: qlora download whole" in watched.err
    page = qlora("show", "whole").out
    assert page.splitlines()[0] == f"{qlora.namespace}/whole  Succeeded (Completed)"
    assert ADAPTER["uri"] in page
    assert "\x1b" not in page


def test_a_job_that_no_operator_has_seen_is_shown_as_such(qlora_class, crd_cluster, kwok_namespace, manifest, tmp_path):
    qlora = qlora_class(crd_cluster.kubeconfig, kwok_namespace, tmp_path)
    qlora("submit", manifest("unseen"))
    page = qlora("show", "unseen").out.splitlines()
    assert page[0] == f"{kwok_namespace}/unseen  Pending"
    assert page[1].split(maxsplit=1) == ["Message", "no operator has processed the job yet"]
    (row,) = qlora("list").out.splitlines()[1:]
    assert row.split()[:3] == ["unseen", "Pending", "Pending"]


def test_every_form_of_output(qlora, manifest, api):
    qlora("submit", manifest("forms", suspend=True))
    api.wait_for(job_path(qlora.namespace, "forms"), in_state("Suspended"))
    shown = qlora("show", "forms", "-o", "json").json
    assert (shown["kind"], shown["metadata"]["name"], "managedFields" in shown["metadata"]) == (
        "QLoRAJob",
        "forms",
        False,
    )
    listed = yaml.safe_load(qlora("list", "-o", "yaml").out)
    assert [j["metadata"]["name"] for j in listed["items"] if j["metadata"]["name"] == "forms"] == ["forms"]
    assert {(j["apiVersion"], j["kind"]) for j in listed["items"]} == {("qlora.dev/v1alpha1", "QLoRAJob")}
    assert "qlorajob.qlora.dev/forms\n" in qlora("list", "-o", "name").out
    head, *rows = qlora("list").out.splitlines()
    assert head.split()[:3] == ["NAME", "STATE", "REASON"]
    assert any(row.split()[:3] == ["forms", "Suspended", "Suspended"] for row in rows)
    assert f"{qlora.namespace}  " in qlora("list", "-A").out


def test_a_job_that_fails_ends_its_watch_with_1_and_is_retried_under_a_new_name(qlora, manifest, api):
    with pods_do(api, qlora.namespace, FAILS, job="wrong"), pods_do(api, qlora.namespace, DONE, job="wrong-r2"):
        sent = qlora("submit", manifest("wrong"), "--watch")
        assert sent.code == 1
        assert "wrong  Failed (UserError)" in sent.out
        assert "q_prj matches no layer" in sent.out
        assert "qlora retry wrong" in sent.err
        again = qlora("retry", "wrong", "--set", "training.maxSteps=20")
        assert again.out == "qlorajob.qlora.dev/wrong-r2 created\n", again.err
        new = qlora("show", "wrong-r2", "-o", "json").json
        assert new["metadata"]["annotations"]["qlora.dev/retry-of"] == "wrong"
        assert new["spec"]["training"]["maxSteps"] == 20
        assert qlora("watch", "wrong-r2").code == 0
    compared = qlora("compare", "wrong", "wrong-r2", "-o", "json").json
    assert compared["differences"] == {"spec.training.maxSteps": [10, 20]}
    assert [f["state"] for f in compared["figures"]] == ["Failed", "Succeeded"]


def test_suspend_and_resume(qlora, manifest, api):
    path = job_path(qlora.namespace, "pause")
    qlora("submit", manifest("pause"))
    api.wait_for(path, in_state("Running"))
    assert qlora("suspend", "pause").out == "qlorajob.qlora.dev/pause suspended\n"
    api.wait_for(path, in_state("Suspended"))
    assert qlora("suspend", "pause").out == "qlorajob.qlora.dev/pause unchanged, it is suspended already\n"
    resumed = qlora("resume", "pause", "-o", "json")
    assert resumed.json["spec"]["suspend"] is False
    api.wait_for(path, in_state("Running"))


def test_cancel_asks_first_and_says_what_is_lost(qlora, manifest, api):
    qlora("submit", manifest("unwanted"))
    api.wait_for(job_path(qlora.namespace, "unwanted"), in_state("Running"))
    refused = qlora("cancel", "unwanted")
    assert refused.code == 40
    assert f"{qlora.namespace}/unwanted  Running; its GPUs are freed" in refused.err
    assert refused.err.splitlines()[-1] == "--yes: needed where there is no terminal to ask on"
    assert qlora("cancel", "unwanted", "--yes").out == "qlorajob.qlora.dev/unwanted deleted\n"
    api.wait_gone(job_path(qlora.namespace, "unwanted"))


def test_events_of_a_job_its_children_and_their_pods(qlora, manifest, api):
    with pods_do(api, qlora.namespace, FAILS, job="noisy"):
        qlora("submit", manifest("noisy"), "--watch")
    api.wait_for(
        f"/api/v1/namespaces/{qlora.namespace}/events",
        lambda found: any(
            e["reason"] == "UserError" and e["involvedObject"]["name"] == "noisy" for e in found["items"]
        ),
    )
    rows = qlora("events", "noisy").out.splitlines()[1:]
    about = {row.split()[3].partition("/")[0] for row in rows}
    assert about == {"QLoRAJob", "Job", "Pod"}
    assert any("UserError" in row and "q_prj matches no layer" in row for row in rows)
    assert all("noisy" in row for row in rows)


def test_a_watch_of_several_in_a_pipe_has_a_line_for_each_change(qlora, manifest, api):
    with pods_do(api, qlora.namespace, DONE, job="one"), pods_do(api, qlora.namespace, FAILS, job="two"):
        qlora("submit", manifest("one"), manifest("two"))
        watched = qlora("watch", "one", "two")
    assert watched.code == 1
    last = {line.split()[0]: line for line in watched.out.splitlines()}
    assert last["one"].startswith("one  Succeeded")
    assert last["two"].startswith("two  Failed (UserError)")


# ------------------------------------------------------------------------------------------------------------ refusals


def test_the_api_servers_own_check_creates_nothing(qlora, manifest, api):
    sent = qlora("submit", manifest("dry"), "--dry-run", "server")
    assert (sent.code, sent.out) == (0, "qlorajob.qlora.dev/dry valid (dry run by the server)\n")
    assert qlora("show", "dry").code == 40


def test_a_name_that_is_taken(qlora, manifest):
    qlora("submit", manifest("taken", suspend=True))
    again = qlora("submit", manifest("taken", suspend=True))
    assert again.code == 40
    (line,) = again.err.splitlines()
    assert line.startswith(f'metadata.name: "taken" is taken in namespace {qlora.namespace} by a job that is ')
    assert "--set metadata.name=taken-r2" in line


def test_what_the_api_server_refuses_is_a_line_with_the_files_place(qlora, manifest):
    name = manifest("refused")
    path = qlora.folder / name
    path.write_text(
        path.read_text()
        .replace("qlora.dev/v1alpha1", "qlora.dev/v1alpha1")
        .replace("name: refused", "name: refused\n  labels: {a: 'b c'}")
    )
    sent = qlora("submit", name)
    assert sent.code == 40
    (line,) = sent.err.splitlines()
    assert line.startswith(f'{name}:1: metadata.labels: "b c" a valid label must be')


def test_a_job_that_is_not_there(qlora):
    of_jobs = (("logs",), ("logs", "-f"), ("events",), ("retry",), ("download",))
    of_both = (("show",), ("watch",), ("suspend",), ("cancel", "--yes"))
    for kinds, commands in (("job", of_jobs), ("job or sweep", of_both)):
        for command in commands:
            said = qlora(*command, "nobody")
            expected = f'no {kinds} "nobody" in namespace {qlora.namespace}'
            assert (said.code, said.err.partition(";")[0]) == (40, expected), command


def test_rights_that_are_missing_are_named(qlora, crd_cluster):

    stranger = replace(qlora, kubeconfig=crd_cluster.user_kubeconfig("stranger"))
    said = stranger("list")
    assert said.code == 40
    assert said.err.startswith(
        f'user "stranger" may not list qlorajobs in namespace {qlora.namespace}; the cluster role view'
    )


def test_an_exec_plugin_with_a_client_certificate(qlora, crd_cluster, tmp_path):
    """The client certificate comes from a plugin, as clouds' plugins and others do it."""

    pair = crd_cluster.authority.issue("plugged", ["system:masters"])
    status = {"clientCertificateData": pair.certificate.read_text(), "clientKeyData": pair.key.read_text()}
    answer = tmp_path / "answer.json"
    answer.write_text(
        json.dumps({"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": status})
    )
    body = json.loads(crd_cluster.kubeconfig.read_text())
    body["users"][0]["user"] = {
        "exec": {
            "apiVersion": "client.authentication.k8s.io/v1",
            "command": sys.executable,
            "args": ["-c", f"print(open({str(answer)!r}).read())"],
            "interactiveMode": "Never",
        }
    }
    (tmp_path / "config").write_text(yaml.safe_dump(body))
    assert replace(qlora, kubeconfig=tmp_path / "config")("list").code == 0


def test_nobody_answers(qlora, crd_cluster, tmp_path):

    text = crd_cluster.kubeconfig.read_text().replace(crd_cluster.url, "https://127.0.0.1:1")
    (tmp_path / "config").write_text(text)
    said = replace(qlora, kubeconfig=tmp_path / "config")("list")
    assert said.code == 3
    assert said.err.startswith("https://127.0.0.1:1 (context test) cannot be reached: ")


# -------------------------------------------------------------------------------------------------------------- kubectl


def test_as_a_plugin_of_kubectl(qlora, crd_cluster, manifest):
    """kubectl finds the script on PATH, passes flags on and asks it for completions."""
    scripts = Path(sys.executable).parent
    if not (scripts / "kubectl-qlora").exists():
        pytest.skip("the package was installed before it had this script")
    qlora("submit", manifest("plugged-in", suspend=True))
    environment = {**os.environ, **qlora.environment, "PATH": f"{scripts}:{os.environ['PATH']}"}

    def kubectl(*words):
        return subprocess.run(
            [crd_cluster.binaries["kubectl"], *words], env=environment, text=True, stdout=subprocess.PIPE, check=True
        ).stdout

    assert "qlorajob.qlora.dev/plugged-in\n" in kubectl("qlora", "list", "-n", qlora.namespace, "-o", "name")
    offered = kubectl("__complete", "qlora", "show", "-n", qlora.namespace, "plugged")
    assert offered.splitlines()[0] == "plugged-in"
