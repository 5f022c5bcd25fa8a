"""Summary of a job before it is created."""

import pytest

from memory.shapes import LLAMA_8B, LLAMA_70B
from model_folders import model_files, write
from qlora_api.job import QLoRAJob
from qlora_cli.kube.errors import ClusterError
from qlora_cli.kube.target import Cluster
from qlora_cli.memory_plan.cluster_plan import UNKNOWN_GPU, gpu_of_nodes, node_labels, summary

PRODUCT = "nvidia.com/gpu.product"
H100, L4 = {PRODUCT: "NVIDIA-H100-80GB-HBM3", "pool": "big"}, {PRODUCT: "NVIDIA-L4"}


def job(source, **scheduling):
    return QLoRAJob.from_manifest(
        {
            "apiVersion": "qlora.dev/v1alpha1",
            "kind": "QLoRAJob",
            "metadata": {"name": "tune"},
            "spec": {
                "model": {"source": source},
                "dataset": {"train": {"source": "s3://bucket/rows"}, "format": "Text", "maxLength": 2048},
                "training": {"maxSteps": 100, "globalBatchSize": 16},
                "output": {"destination": "s3://bucket/out"},
                "scheduling": scheduling,
            },
        }
    )


class NodeListApi:
    """An API server with nodes of these labels; None: who asks may not list them."""

    def __init__(self, *labels):
        self.labels = labels

    def list(self, path):
        if None in self.labels:
            raise ClusterError("forbidden")
        return [{"metadata": {"labels": of}} for of in self.labels], "1"


@pytest.mark.parametrize(
    ("labels", "scheduling", "gpu"),
    [
        pytest.param([H100, L4, {}], {}, "l4-24gb", id="smallest"),
        pytest.param([H100, L4], {"nodeSelector": {"pool": "big"}}, "h100-80gb", id="selected"),
        pytest.param([{}], {}, None, id="no-label"),
        pytest.param([None], {}, None, id="nodes-not-listed"),
        pytest.param([None], {"nodeSelector": {PRODUCT: "NVIDIA-L4"}}, "l4-24gb", id="selector-says-it"),
        pytest.param([H100, L4], {"profile": "big"}, None, id="profile"),
    ],
)
def test_the_gpu_is_that_of_the_nodes(labels, scheduling, gpu):
    assert (
        gpu_of_nodes(node_labels(Cluster(NodeListApi(*labels), "default")), job("hf://org/base", **scheduling)) == gpu
    )


def test_a_job_is_summed_up_with_its_plan(tmp_path):
    rows = dict(summary(job(write(tmp_path / "model", model_files(LLAMA_8B))), "h100-80gb"))
    assert list(rows) == ["Job", "Model", "Data", "Output", "GPU", "Batch", "Sequences", "Memory", "Speed", "Time"]
    assert rows["Memory"].endswith(" left")


def test_a_job_that_does_not_fit_says_what_would(tmp_path):
    rows = dict(summary(job(write(tmp_path / "model", model_files(LLAMA_70B))), "l4-24gb"))
    assert rows["Memory"].endswith(" missing")
    assert "a6000-48gb" in rows["Does not fit"]


def test_without_a_plan_it_says_why_there_is_none(tmp_path):
    assert dict(summary(job("hf://org/base"), None))["Memory"] == UNKNOWN_GPU
    profile = dict(summary(job("hf://org/base", profile="big"), None))["Memory"]
    assert profile == "not planned: the GPU of profile big is not known here; name it with --gpu"
    rows = dict(summary(job(str(tmp_path / "nothing")), "l4-24gb"))
    assert rows["Memory"].startswith("not planned: spec.model.source: ")
