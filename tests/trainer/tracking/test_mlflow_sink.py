from __future__ import annotations

import warnings

import pytest

from mlflow_runs import only_run
from qlora_trainer.errors import StorageError, UserError
from qlora_trainer.tracking.journal import StepRow
from services.mlflow_server import MLflowServer
from testing.ports import free_port
from tracking_fixtures import facts_of, step_rows

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import ErrorCode
    from mlflow.tracking import MlflowClient

    from qlora_trainer.tracking.mlflow_sink import ADAPTER_TAG, MLflowSink, find_or_create_experiment, translated


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with MLflowServer(tmp_path_factory.mktemp("mlflow")) as running:
        yield running


def facts(server, project, attempt=1):
    return facts_of({"type": "MLflow", "server": server.url, "project": project}, attempt)


def test_a_run_of_two_attempts_has_each_step_once(server, tmp_path):
    first = MLflowSink(facts(server, "two"))
    first.write(step_rows(1, 250))
    history = tmp_path / "history.jsonl"
    history.write_text("{}\n")
    second = MLflowSink(facts(server, "two", attempt=2))
    second.write([StepRow(0, 1e9, {"eval/loss": 3.0}), *step_rows(1, 260, loss=2.0)])
    second.finish([{"worldSize": 2, "device": "CPU"}], 0, "s3://adapters/tiny", history)
    assert second.url.startswith(f"{server.url}/#/experiments/")
    client, run = only_run(server.url, "two")
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((m.step, m.value) for m in losses) == [(s, 1.0 if s <= 250 else 2.0) for s in range(1, 261)]
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "eval/loss")] == [(0, 3.0)]
    assert run.data.params["lora.rank"] == "16"
    assert run.data.tags[ADAPTER_TAG] == "s3://adapters/tiny"
    assert run.data.tags["qlora.device"] == "CPU"
    assert run.info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["history.jsonl"]


def test_an_experiment_that_another_job_creates_meanwhile_is_taken(server, monkeypatch):
    there = MlflowClient(server.url).create_experiment("race")
    answers = iter([None])
    found = MlflowClient.get_experiment_by_name
    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", lambda *a: next(answers, found) and found(*a))
    assert find_or_create_experiment(MlflowClient(server.url), facts(server, "race")) == there


@pytest.mark.parametrize("code", ["REQUEST_LIMIT_EXCEEDED", "RESOURCE_CONFLICT", "TEMPORARILY_UNAVAILABLE"])
def test_a_server_that_is_busy_ends_no_job_for_good(server, code):
    with pytest.raises(StorageError, match="does not take the run"), translated(facts(server, "busy")):
        raise MlflowException("later", error_code=ErrorCode.Value(code))


@pytest.mark.parametrize(("code", "status"), [(43, "KILLED"), (47, "FAILED")])
def test_an_attempt_that_ends_early_says_so_and_the_next_one_goes_on(code, status, server, tmp_path):
    project = f"early-{code}"
    MLflowSink(facts(server, project)).finish([], code, "", tmp_path)
    assert only_run(server.url, project)[1].info.status == status
    MLflowSink(facts(server, project, attempt=2))
    assert only_run(server.url, project)[1].info.status == "RUNNING"


def test_a_server_that_is_not_there_is_named(tmp_path):
    sink = {"type": "MLflow", "server": f"http://127.0.0.1:{free_port()}"}
    with pytest.raises(StorageError, match=r"spec.tracking\[0\].server: http://127.0.0.1:\d+ does not take the run"):
        MLflowSink.check(facts_of(sink))


def test_a_server_that_is_no_mlflow_server_is_refused(server):
    with pytest.raises(UserError, match=r'spec.tracking\[0\].server: "http://127.0.0.1:\d+/wrong" refuses the run'):
        MLflowSink.check(facts_of({"type": "MLflow", "server": f"{server.url}/wrong"}))


def test_an_experiment_that_was_deleted_is_refused(server):
    client = MlflowClient(server.url)
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(UserError, match=r'spec.tracking\[0\].project: "gone" is an experiment that was deleted'):
        MLflowSink.check(facts(server, "gone"))
