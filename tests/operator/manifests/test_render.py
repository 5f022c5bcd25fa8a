"""Manifests: a golden pair for each kind of job, and what must hold of all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from fixtures import check_golden
from operator_builders import UID
from qlora_api.contract import TrainerConfig
from qlora_api.environment import WORKLOAD_IDENTITY
from qlora_api.errors import ManifestError, validate
from qlora_api.job import QLoRAJob
from qlora_api.spec import Gang
from qlora_api.status import Attempt, QLoRAJobStatus
from qlora_memory.gpus import GPU_PRODUCT
from qlora_operator.config import OperatorConfig
from qlora_operator.manifests import render
from qlora_operator.manifests.pod_template import AZURE_IDENTITY_LABEL
from qlora_operator.manifests.profiles import gpu_of

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(p.name for p in GOLDEN.iterdir() if p.is_dir())
CONFIG_KEY = "qlora.dev/config"


def rendered(case: str, **trainer: object) -> list[dict]:
    """All manifests of a case: Prepare's, then attempt 2's."""
    given = yaml.safe_load((GOLDEN / case / "job.yaml").read_text())
    gang = Gang(given.pop("gang", "None"))
    operator = given.pop("operator")
    config = OperatorConfig.model_validate({**operator, "trainer": {**operator["trainer"], **trainer}})
    given["metadata"]["uid"] = UID
    job = QLoRAJob.from_manifest(given)
    workers, gpus = job.spec.parallelism.workers, job.spec.parallelism.gpus_per_worker
    share = job.spec.training.global_batch_size // (workers * gpus)
    attempt = Attempt.model_validate(
        {
            "number": 2,
            "worldSize": workers * gpus,
            "microBatchSize": 1,
            "gradientAccumulationSteps": share,
            "startTime": "2026-01-01T00:00:00Z",
        }
    )
    return [render.prepare(job, config), *render.attempt(job, config, gang, attempt, QLoRAJobStatus())]


def readable(manifests: list[dict]) -> list[dict]:
    """With the trainer's config as an object in place of one long line, and without the spec in it, which is given."""
    plain = json.loads(json.dumps(manifests))
    for manifest in plain:
        annotations = manifest.get("spec", {}).get("template", {}).get("metadata", {}).get("annotations", {})
        if CONFIG_KEY in annotations:
            annotations[CONFIG_KEY] = {k: v for k, v in json.loads(annotations[CONFIG_KEY]).items() if k != "spec"}
    return plain


def test_there_are_golden_cases():
    assert CASES


@pytest.mark.parametrize("case", CASES)
def test_manifests_are_as_they_were_looked_at(case):
    text = yaml.safe_dump_all(readable(rendered(case)), sort_keys=True, width=120)
    check_golden(GOLDEN / case / "want.yaml", text)


@pytest.mark.parametrize("case", CASES)
def test_pods_pass_the_restricted_profile_and_have_no_token(case):
    for manifest in rendered(case):
        if manifest["kind"] != "Job":
            continue
        spec = manifest["spec"]["template"]["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
        assert {next(iter(set(v) - {"name"})) for v in spec["volumes"]} <= {
            *("downwardAPI", "emptyDir", "persistentVolumeClaim", "secret")
        }


@pytest.mark.parametrize("case", CASES)
def test_the_config_in_the_pod_is_the_contracts(case):
    for manifest in rendered(case):
        if manifest["kind"] == "Job":
            text = manifest["spec"]["template"]["metadata"]["annotations"][CONFIG_KEY]
            assert TrainerConfig.model_validate_json(text).job.uid == UID


@pytest.mark.parametrize("case", CASES)
def test_what_a_pod_may_write_is_bounded(case):
    for manifest in rendered(case, cacheSizeLimit="50Gi", tmpSizeLimit="2G", ephemeralStorage="20Gi"):
        if manifest["kind"] != "Job":
            continue
        spec = manifest["spec"]["template"]["spec"]
        sizes = {v["name"]: v["emptyDir"]["sizeLimit"] for v in spec["volumes"] if "emptyDir" in v}
        assert (sizes["cache"], sizes["tmp"]) == ("50Gi", "2G")
        resources = spec["containers"][0]["resources"]
        assert resources["requests"]["ephemeral-storage"] == "20Gi"
        assert resources["limits"]["ephemeral-storage"] == "54132Mi"  # both volumes, and 1Gi of logs


@pytest.mark.parametrize("case", CASES)
def test_no_disk_is_asked_for_where_none_is_configured(case):
    for manifest in rendered(case, ephemeralStorage=None):
        if manifest["kind"] == "Job":
            resources = manifest["spec"]["template"]["spec"]["containers"][0]["resources"]
            assert "ephemeral-storage" not in {**resources["requests"], **resources["limits"]}


def test_a_pod_may_not_ask_for_more_disk_than_it_may_fill():
    with pytest.raises(ManifestError, match=r"ephemeralStorage: 100Gi .* 31744Mi"):
        validate(OperatorConfig, {"trainer": {"image": "t", "cacheSizeLimit": "10Gi", "ephemeralStorage": "100Gi"}})


@pytest.mark.parametrize(
    ("product", "gpu"),
    [
        (None, "h100-80gb"),
        ("NVIDIA-L40", "l40-48gb"),
        ("NVIDIA-H100-80GB-HBM3-MIG-1g.10gb", None),
        ("NVIDIA-GH200-480GB", None),
    ],
)
def test_the_product_of_a_jobs_nodes_counts_over_the_operators_gpu(product, gpu):
    given = yaml.safe_load((GOLDEN / CASES[0] / "job.yaml").read_text())
    config = OperatorConfig.model_validate(given.pop("operator"))
    trainer = config.trainer.model_copy(update={"device": "CUDA", "gpu": "h100-80gb"})
    given.pop("gang", None)
    given["spec"]["scheduling"] = {"nodeSelector": {GPU_PRODUCT: product} if product else {}}
    spec = QLoRAJob.from_manifest(given).spec
    assert gpu_of(spec, config.model_copy(update={"trainer": trainer})) == gpu


@pytest.mark.parametrize("consent", [True, False])
def test_pods_are_told_whether_the_clouds_identity_counts_whatever_a_secret_says(consent):
    """A variable of 'env' wins over one of 'envFrom'."""
    for manifest in rendered("cpu", workloadIdentity=consent):
        if manifest["kind"] == "Job":
            template = manifest["spec"]["template"]
            assert template["metadata"]["labels"].get(AZURE_IDENTITY_LABEL) == ("true" if consent else None)
            [container] = template["spec"]["containers"]
            assert {"name": WORKLOAD_IDENTITY, "value": str(consent).lower()} in container["env"]
