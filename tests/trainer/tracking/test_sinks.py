"""Errors that are found before a GPU is held, whichever the tool."""

from __future__ import annotations

import pytest

from qlora_api.spec import SinkType
from qlora_trainer.errors import UserError
from qlora_trainer.tracking import sinks
from qlora_trainer.tracking.sinks import sink_class
from qlora_trainer.worker.tracking_processes import environment_with
from tracking_fixtures import facts_of


def test_a_tool_without_its_package_is_named(monkeypatch):
    monkeypatch.setitem(sinks.MODULES, SinkType.WANDB, "wandb_that_is_not_installed")
    with pytest.raises(UserError, match=r'spec.tracking\[0\].type: "WandB" needs the Python package wandb_that_is_not'):
        sink_class(facts_of({"type": "WandB"}))


@pytest.mark.parametrize("kind", ["MLflow", "WandB"])
def test_a_server_at_an_address_of_credentials_is_refused(kind, monkeypatch):
    monkeypatch.delenv("QLORA_WORKLOAD_IDENTITY", raising=False)
    with pytest.raises(UserError, match=r'spec.tracking\[0\].server: "http://169.254.169.254" leads to a link-local'):
        sink_class(facts_of({"type": kind, "server": "http://169.254.169.254"}))


def test_a_tools_process_has_its_own_credentials_and_a_rank_has_none(monkeypatch):
    for name in ("MLFLOW_TRACKING_TOKEN", "WANDB_API_KEY", "AWS_ACCESS_KEY_ID"):
        monkeypatch.setenv(name, "secret")
    names = ("MLFLOW_TRACKING_TOKEN", "WANDB_API_KEY", "AWS_ACCESS_KEY_ID")
    found = {kind: [name for name in names if name in environment_with(keys)] for kind, keys in sinks.KEYS.items()}
    assert found == {
        SinkType.TENSORBOARD: ["AWS_ACCESS_KEY_ID"],
        SinkType.MLFLOW: ["MLFLOW_TRACKING_TOKEN", "AWS_ACCESS_KEY_ID"],
        SinkType.WANDB: ["WANDB_API_KEY", "AWS_ACCESS_KEY_ID"],
    }
    assert [name for name in names if name in environment_with(frozenset())] == ["AWS_ACCESS_KEY_ID"]
