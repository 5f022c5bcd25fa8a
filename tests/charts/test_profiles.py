"""Profiles: the examples' pods as they were looked at, valid for Kubernetes, and refused where values are wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from charts.helm import CHART, HelmError, one
from fixtures import check_golden
from qlora_api.errors import validate
from qlora_api.job import QLoRAJob
from qlora_api.spec import Gang
from qlora_api.status import Attempt, QLoRAJobStatus
from qlora_operator.config import OperatorConfig
from qlora_operator.manifests import render
from qlora_operator.profile_types import AmountRange, PodProfile, PreparePod, ProfileVolume, TopologySpread

GOLDEN = Path(__file__).parent / "golden-profiles"
EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))
CONFIG_KEY = "qlora.dev/config"
UID = "11111111-2222-3333-4444-555555555555"


def config_of(helm, values) -> OperatorConfig:
    """The operator's configuration as it reads it from the chart's ConfigMap."""
    config_map = one(helm.render(values), "ConfigMap", "qlora-operator")
    return validate(OperatorConfig, yaml.safe_load(config_map["data"]["config.yaml"]))


def pods_by(config: OperatorConfig, profile: str) -> list[dict]:
    """Jobs of Prepare and of an attempt of two pods, by a profile."""
    scheduling = {} if profile == "default" else {"profile": profile}
    job = QLoRAJob.from_manifest(
        {
            "metadata": {"name": profile, "namespace": "team", "uid": UID},
            "spec": {
                "model": {"source": "s3://models/base"},
                "dataset": {"train": {"source": "s3://data/rows.jsonl"}, "format": "Text"},
                "training": {"maxSteps": 10, "globalBatchSize": 16},
                "parallelism": {"workers": 2, "gpusPerWorker": 2},
                "output": {"destination": "s3://adapters/job"},
                "scheduling": scheduling,
            },
        }
    )
    attempt = Attempt.model_validate(
        {
            "number": 1,
            "worldSize": 4,
            "microBatchSize": 1,
            "gradientAccumulationSteps": 4,
            "startTime": "2026-01-01T00:00:00Z",
        }
    )
    made = [render.prepare(job, config), *render.attempt(job, config, Gang.NONE, attempt, QLoRAJobStatus())]
    return json.loads(json.dumps([manifest for manifest in made if manifest["kind"] == "Job"]))


def golden_text(manifests: list[dict]) -> str:
    """Pods alone, without the trainer's configuration but for its GPU."""
    shown = []
    for manifest in manifests:
        pod = manifest["spec"]["template"]
        pod["metadata"]["annotations"][CONFIG_KEY] = json.loads(pod["metadata"]["annotations"][CONFIG_KEY]).get("gpu")
        shown.append({"job": manifest["metadata"]["name"], "pod": pod})
    return yaml.safe_dump_all(shown, sort_keys=True, width=120)


def test_there_are_examples_for_six_kinds_of_clusters():
    names = {path.stem for path in EXAMPLES}
    assert names == {"openshift", "eks-efa", "gke-workload-identity", "aks", "infiniband", "mig"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_pods_of_the_examples_are_as_they_were_looked_at(helm, path):
    config = config_of(helm, yaml.safe_load(path.read_text()))
    got = golden_text([pod for profile in config.profiles for pod in pods_by(config, profile)])
    check_golden(GOLDEN / path.name, got)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_pods_of_the_examples_are_valid_for_kubernetes(helm, conform, path):
    config = config_of(helm, yaml.safe_load(path.read_text()))
    made = [pod for profile in config.profiles for pod in pods_by(config, profile)]
    assert made
    assert conform(yaml.safe_dump_all(made)) == ""


def test_a_misspelled_field_that_is_passed_on_is_found(helm, conform):
    """A control: what a profile passes on as it is, Kubernetes' schemas look at."""
    affinity = {"podAffinity": {"requiredDuringScheduling": []}}
    config = config_of(helm, {"profiles": {"default": {"affinity": affinity}}})
    assert "'requiredDuringScheduling' not allowed" in conform(yaml.safe_dump_all(pods_by(config, "default")))


@pytest.mark.parametrize(
    ("profile", "complaint"),
    [
        ({"image": "evil"}, "at '/profiles/p': additional properties 'image' not allowed"),
        ({"gpuResource": "gpu"}, "at '/profiles/p/gpuResource': 'gpu' does not match pattern"),
        ({"cpu": {"min": "1"}}, "at '/profiles/p/cpu': missing property 'default'"),
        (
            {"resourcesPerPod": {"cpu": "4"}},
            "at '/profiles/p/resourcesPerPod': additional properties 'cpu' not allowed",
        ),
        ({"capabilities": ["SYS_ADMIN"]}, "at '/profiles/p/capabilities/0': value must be one of 'IPC_LOCK'"),
        ({"affinity": {"nodes": {}}}, "at '/profiles/p/affinity': additional properties 'nodes' not allowed"),
        ({"volumes": [{"name": "a", "mountPath": "a"}]}, "at '/profiles/p/volumes/0/mountPath'"),
        ({"prepare": {"gpu": "x"}}, "at '/profiles/p/prepare': additional properties 'gpu' not allowed"),
    ],
    ids=str,
)
def test_wrong_profiles_are_refused_by_helm(helm, profile, complaint):
    with pytest.raises(HelmError, match=re.escape(complaint)):
        helm.template({"profiles": {"p": profile}})


@pytest.mark.parametrize(
    ("definition", "model"),
    [
        ("profile", PodProfile),
        ("preparePod", PreparePod),
        ("volume", ProfileVolume),
        ("bounds", AmountRange),
        ("spread", TopologySpread),
    ],
)
def test_chart_and_operator_know_the_same_fields(definition, model):
    schema = json.loads((CHART / "values.schema.json").read_text())["definitions"][definition]
    assert set(schema["properties"]) == {field.alias for field in model.model_fields.values()}
    assert schema["additionalProperties"] is False


def test_a_cluster_without_profiles_has_pods_as_before(helm):
    """The default profile is the operator's own settings."""
    empty, named = config_of(helm, {}), config_of(helm, {"profiles": {"default": {}, "other": {}}})
    assert pods_by(named, "default") == pods_by(empty, "default")


def test_values_of_a_release_before_profiles_still_make_a_configuration(helm):
    """Values that 'helm upgrade --reuse-values' keeps have no profiles and no placement of Prepare."""
    new = ("queue", "nodeSelector", "affinity", "tolerations", "schedulerName", "runtimeClassName", "annotations")
    kept = {"profiles": None, "prepare": dict.fromkeys(new)}
    assert config_of(helm, kept) == config_of(helm, {})
