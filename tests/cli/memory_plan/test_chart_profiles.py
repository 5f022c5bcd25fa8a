"""The command line resolves a profile as the operator does."""

from __future__ import annotations

import re

import pytest
import yaml

from api.manifests import manifest
from qlora_api.errors import FieldError, validate
from qlora_api.job import QLoRAJob
from qlora_cli.memory_plan.chart_profiles import gpu_of_profile
from qlora_operator.config import OperatorConfig
from qlora_operator.manifests.profiles import gpu_of, profile_problem

PRODUCT = "nvidia.com/gpu.product"
PROFILES = {
    "kind": {"gpu": "h100-80gb"},
    "product": {"nodeSelector": {PRODUCT: "NVIDIA-L4"}},
    "both": {"gpu": "h100-80gb", "nodeSelector": {PRODUCT: "NVIDIA-L4"}},
    "other-product": {"nodeSelector": {PRODUCT: "Some-Accelerator"}},
    "pool": {"nodeSelector": {"pool": "a"}},
    "mig": {"gpuResource": "nvidia.com/mig-3g.40gb"},
    "same": {"gpuResource": "nvidia.com/gpu"},
    "cpu": {"gpuResource": ""},
}


@pytest.mark.parametrize("profiles", [PROFILES, PROFILES | {"default": {"gpu": "t4-16gb"}}], ids=["", "own-default"])
@pytest.mark.parametrize(
    "trainer", [{}, {"gpu": "a100-80gb"}, {"gpu": "a100-80gb", "device": "CPU"}], ids=["", "gpu", "device-cpu"]
)
@pytest.mark.parametrize("cluster", [{}, {"gpuResource": ""}], ids=["gpus", "cpus"])
@pytest.mark.parametrize(
    "scheduling",
    [
        {},
        *({"profile": name} for name in (*PROFILES, "default", "missing", "poool")),
        {"nodeSelector": {PRODUCT: "NVIDIA-L4"}},
        {"nodeSelector": {PRODUCT: "Some-Accelerator"}},
    ],
    ids=str,
)
def test_the_gpu_of_a_profile_is_the_operators(tmp_path, profiles, trainer, cluster, scheduling):
    config = {"trainer": {"image": "i", **trainer}, "profiles": profiles, **cluster}
    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump(config))
    spec = QLoRAJob.from_manifest(manifest(scheduling=scheduling)).spec
    operator = validate(OperatorConfig, config)
    if problem := profile_problem(spec.scheduling, operator):
        with pytest.raises(FieldError, match=f"^{re.escape(problem.replace('this cluster', str(path)))}$"):
            gpu_of_profile(spec.scheduling, path)
    elif (gpu := gpu_of(spec, operator)) is None:
        with pytest.raises(FieldError, match=r"^--gpu: is required"):
            gpu_of_profile(spec.scheduling, path)
    else:
        assert gpu_of_profile(spec.scheduling, path) == gpu
