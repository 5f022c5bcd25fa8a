"""Manifests of sweeps, as 'qlora validate' and 'qlora submit' read them."""

import json

import pytest

from qlora_cli.jobs import submit
from qlora_cli.manifest.job_manifest import RefusedError
from qlora_cli.manifest.validate import check_file


@pytest.fixture
def write(tmp_path):
    """Write a sweep's manifest; a function of changes to the template's output and of the spec."""

    def file(destination="s3://adapters/search", **spec):
        job = {
            "model": {"source": "hf://org/base@main"},
            "dataset": {"train": {"source": "s3://data/rows.jsonl"}, "eval": {"fraction": "0.1"}, "format": "Text"},
            "training": {"epochs": 1, "globalBatchSize": 16},
            "output": {"destination": destination},
        }
        spec = {
            "template": {"spec": job},
            "parameters": [{"path": "lora.rank", "choices": [8, 16]}],
            "algorithm": {"type": "Grid"},
            "maxTrials": 2,
            **spec,
        }
        body = {"apiVersion": "qlora.dev/v1alpha1", "kind": "QLoRASweep", "metadata": {"name": "search"}, "spec": spec}
        (tmp_path / "sweep.yaml").write_text(json.dumps(body))
        return tmp_path / "sweep.yaml"

    return file


def test_a_null_where_there_is_a_default_is_left_out_as_the_api_server_does(write):
    assert check_file(write(objective=None)).errors == ()
    (sent,) = submit.read_manifest(write(objective=None)).sweeps
    assert "objective" not in sent.body["spec"]


def test_a_place_of_the_template_that_cannot_be_meant_is_an_error(write):
    (error,) = check_file(write("s3://$BUCKET/search")).errors
    assert 'spec.template.spec.output.destination: "s3://$BUCKET/search" must not have variables' in str(error)


def test_a_path_on_this_machine_is_refused_with_its_field(write):
    with pytest.raises(RefusedError, match=r'spec.template.spec.output.destination: "out" is a path on this machine'):
        submit.read_manifest(write("out"))


def test_fields_of_a_sweep_are_set_by_their_paths(write):
    (sent,) = submit.read_manifest(write(), ["maxTrials=4", "template.spec.training.learningRate=1e-3"]).sweeps
    assert sent.body["spec"]["maxTrials"] == 4
    assert sent.body["spec"]["template"]["spec"]["training"]["learningRate"] == "1e-3"
