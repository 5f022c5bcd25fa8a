"""Credentials from a Secret: allowed keys alone have a meaning in a pod, and Python takes no code from there."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from qlora_api.contract import TrainerConfig
from qlora_api.credentials import KEYS, prefix_of
from qlora_api.environment import WORKLOAD_IDENTITY
from qlora_api.spec import QLoRAJobSpec
from qlora_trainer.errors import UserError
from qlora_trainer.storage.credentials import take_credentials

HOSTILE = ("PYTHONPATH", "PYTHONSTARTUP", "LD_PRELOAD", "LD_LIBRARY_PATH", "PATH", "HTTPS_PROXY", "NCCL_DEBUG_FILE")


def spec(**credentials):
    def named(group, **fields):
        return fields | ({"credentials": credentials[group]} if group in credentials else {})

    return QLoRAJobSpec.model_validate(
        {
            "model": named("model", source="s3://b/model"),
            "dataset": {"train": named("train", source="s3://b/rows.jsonl"), "format": "Text"},
            "training": {"maxSteps": 1, "learningRate": "1e-3"},
            "output": named("output", destination="s3://b/out"),
        }
    )


@pytest.mark.parametrize("name", HOSTILE)
def test_a_key_that_is_no_credential_does_not_reach_the_environment(name):
    environment = {prefix_of(0) + name: "evil", prefix_of(0) + "AWS_REGION": "here", "PATH": "/bin"}
    take_credentials(spec(model="s"), environment)
    assert environment == {"AWS_REGION": "here", "PATH": "/bin"}


def test_a_tracking_tools_credentials_are_a_secrets_alone_in_a_pod():
    token = "MLFLOW_TRACKING_TOKEN"
    pod = {WORKLOAD_IDENTITY: "false", token: "admin", "WANDB_API_KEY": "admin"}
    environment = {**pod, prefix_of(0) + token: "tenant"}
    take_credentials(spec(model="s"), environment)
    assert environment == {WORKLOAD_IDENTITY: "false", token: "tenant"}
    own_machine = {token: "own"}
    take_credentials(spec(), own_machine)
    assert own_machine == {token: "own"}


def test_of_two_secrets_with_the_same_key_the_later_counts():
    environment = {prefix_of(0) + "HF_TOKEN": "a", prefix_of(1) + "HF_TOKEN": "b", prefix_of(0) + "AWS_REGION": "c"}
    take_credentials(spec(model="one", output="two"), environment)
    assert environment == {"HF_TOKEN": "b", "AWS_REGION": "c"}


def test_a_variable_of_the_administrators_wins_over_a_secrets():
    environment = {"HF_TOKEN": "admin", prefix_of(0) + "HF_TOKEN": "tenant", prefix_of(0) + "AWS_REGION": "here"}
    take_credentials(spec(model="s"), environment)
    assert environment == {"HF_TOKEN": "admin", "AWS_REGION": "here"}


@pytest.mark.parametrize(
    ("credential", "endpoint"),
    [
        ("HF_TOKEN", "HF_ENDPOINT"),
        ("HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"),
        ("AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT"),
        ("AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"),
        ("AWS_PROFILE", "AWS_ENDPOINT_URL_S3"),
        ("AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_ENDPOINT"),
        ("GOOGLE_BEARER_TOKEN", "GOOGLE_SERVICE_ACCOUNT_KEY"),
    ],
)
def test_the_administrators_credentials_do_not_go_to_a_server_that_a_secret_names(credential, endpoint):
    environment = {credential: "admin", "HF_HOME": "/cache", prefix_of(0) + endpoint: "https://tenant"}
    take_credentials(spec(model="s"), environment)
    assert environment == {endpoint: "https://tenant", "HF_HOME": "/cache"}


def test_a_secrets_own_credentials_go_to_the_server_that_it_names():
    secret = {"HF_TOKEN": "tenant", "HF_ENDPOINT": "https://tenant"}
    environment = {"HF_TOKEN": "admin"} | {prefix_of(0) + key: value for key, value in secret.items()}
    take_credentials(spec(model="s"), environment)
    assert environment == secret


def test_a_secrets_endpoint_does_not_replace_the_administrators_whatever_its_name():
    admin = {"AWS_ENDPOINT_URL": "https://admin", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    environment = {**admin, prefix_of(0) + "AWS_ENDPOINT_URL_S3": "https://tenant"}
    take_credentials(spec(model="s"), environment)
    assert environment == admin


def test_what_clouds_put_into_pods_does_not_win_over_a_secret():
    environment = {
        "AZURE_FEDERATED_TOKEN_FILE": "/token",
        "AZURE_CLIENT_ID": "pod",
        prefix_of(0) + "AZURE_CLIENT_ID": "s",
    }
    take_credentials(spec(model="s"), environment)
    assert environment == {"AZURE_FEDERATED_TOKEN_FILE": "/token", "AZURE_CLIENT_ID": "s"}


def test_a_secret_that_is_named_twice_is_taken_once():
    environment = {prefix_of(0) + "HF_TOKEN": "a", prefix_of(1) + "HF_TOKEN": "of nobody"}
    take_credentials(spec(model="one", train="one", output="one"), environment)
    assert environment["HF_TOKEN"] == "a"


def test_a_secret_without_credentials_is_refused_by_name_and_field():
    with pytest.raises(UserError, match=r'spec\.output\.credentials: "two".*AWS_ACCESS_KEY_ID'):
        take_credentials(spec(model="one", output="two"), {prefix_of(1) + "aws_access_key_id": "x"})


def test_an_environment_without_secrets_stays_as_it_is():
    environment = {"AWS_ACCESS_KEY_ID": "mine", "PYTHONPATH": "mine"}
    take_credentials(spec(), environment)
    assert environment == {"AWS_ACCESS_KEY_ID": "mine", "PYTHONPATH": "mine"}


def test_no_key_names_a_file_or_a_program():
    assert not [key for key in KEYS if key.endswith(("_FILE", "_PATH", "_BUNDLE", "_PROFILE", "_CREDENTIALS"))]


def test_an_isolated_prepare_runs_no_code_that_the_environment_names(tmp_path):
    """The pods' own command, in an environment that somebody filled; the Prepare ends by its own error."""
    evil = tmp_path / "evil"
    evil.mkdir()
    for name in ("sitecustomize", "usercustomize", "qlora_trainer"):
        (evil / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config = {
        "job": {"name": "job", "uid": "1"},
        "spec": spec(model="s").to_json_dict(),
        "batch": {"worldSize": 1, "microBatchSize": 16, "gradientAccumulationSteps": 1},
        "device": "CPU",
        "ranksPerWorker": 1,
        "gradientCheckpointing": False,
        "checkpointUri": str(tmp_path / "checkpoints"),
        "cacheDir": str(tmp_path / "cache"),
        "terminationMessagePath": str(tmp_path / "message"),
    }
    TrainerConfig.model_validate(config)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    environment = {**os.environ, "PYTHONPATH": str(evil), prefix_of(0) + "PYTHONPATH": str(evil)}
    command = [sys.executable, "-I", "-u", "-m", "qlora_trainer.prepare", str(path)]
    done = subprocess.run(command, env=environment, cwd=evil, capture_output=True, text=True, check=False)
    assert done.returncode == 40, done.stderr
    assert "must be a Secret with some of the keys" in json.loads((tmp_path / "message").read_text())["message"]
    assert not (tmp_path / "ran").exists()
