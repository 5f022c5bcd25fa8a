"""``qlora validate`` refuses exactly what the API server refuses: random manifests, and errors that people make."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import yaml

from cluster.api import ClusterApiError
from cluster.scenarios.jobs import CRD, GROUP, qlora_job
from cluster.scenarios.mutations import mutations
from qlora_cli.manifest.validate import check_file

if TYPE_CHECKING:
    from pathlib import Path

    from cluster.control_plane import ControlPlane

COUNT, SEED = 500, 20260102
PLACES = ("source", "destination", "folder")
"""Fields in which 'qlora run' takes a path of this machine, too."""
FULL: dict[str, Any] = {
    "dataset": {
        "train": {"source": "hf://org/rows", "credentials": "hub"},
        "eval": {"fraction": "0.1"},
        "format": "Messages",
        "columns": {"messages": "turns"},
        "chatTemplate": "{{ messages }}",
        "lossOn": "Assistant",
        "tolerance": {"dropped": "0.5"},
    },
    "model": {"credentials": "hub"},
    "lora": {"targetModules": ["q_proj", "v_proj"], "trainTokens": ["<|im_start|>"]},
    "training": {"microBatchSize": 4, "evaluation": {"everySteps": 5, "patience": 2, "prompts": ["Why?"]}},
    "checkpoint": {"everySteps": 5},
    "policy": {"activeDeadlineSeconds": 600},
    "scheduling": {
        "gang": "None",
        "nodeSelector": {"type": "kwok"},
        "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
    },
    "evaluate": {"tasks": [{"name": "arc_easy", "minimum": "0.5"}], "folder": "s3://b/tasks", "limit": 100},
    "tracking": [{"type": "WandB", "server": "https://wandb.example.com", "project": "support"}],
    "output": {"credentials": "store"},
}
GONE = object()
COMMON_ERRORS: tuple[tuple[str, Any], ...] = (
    *(("apiVersion", "qlora.dev/v1"), ("apiVersion", GONE), ("kind", "QloraJob"), ("kind", GONE)),
    *(("metadata.name", "My_Job"), ("metadata.name", "a.b"), ("metadata.name", "x" * 80), ("metadata.name", GONE)),
    *(("spec.model", GONE), ("spec.model.source", GONE), ("spec.model.source", "gs:/bucket/base")),
    *(("spec.model.name", "org/base"), ("spec.model.path", "s3://b/base"), ("spec.model.revision", "main")),
    *(("spec.model.source", "https://huggingface.co/org/base"), ("spec.model.source", "s3://")),
    *(("spec.dataset.format", "messages"), ("spec.dataset.format", "ChatML"), ("spec.dataset.format", GONE)),
    *(("spec.dataset.max_length", 2048), ("spec.dataset.maxLength", "2048"), ("spec.dataset.maxLength", 0)),
    *(("spec.dataset.columns", {"conversations": "turns"}), ("spec.dataset.columns", {"text": 1})),
    *(("spec.dataset.eval", {"fraction": 0.1}), ("spec.dataset.eval", {"fraction": "10%"})),
    *(("spec.dataset.train", "s3://b/rows.jsonl"), ("spec.dataset.path", "s3://b/rows.jsonl")),
    *(("spec.dataset.packing", "yes"), ("spec.dataset.lossOn", "assistant")),
    *(("spec.training.learningRate", 0.0002), ("spec.training.learningRate", "2e"), ("spec.training.lr", "2e-4")),
    *(("spec.training.learning_rate", "2e-4"), ("spec.training.epochs", 0), ("spec.training.epochs", "3")),
    *(("spec.training.epochs", 1.5), ("spec.training.batchSize", 8), ("spec.training.globalBatchSize", -8)),
    *(("spec.training.num_train_epochs", 3), ("spec.training.bf16", True)),
    *(("spec.lora.r", 16), ("spec.lora.rank", 0), ("spec.lora.alpha", "32"), ("spec.lora.dropout", 0.05)),
    *(("spec.lora.targetModules", "q_proj"), ("spec.lora.targetModules", []), ("spec.lora.target_modules", ["q"])),
    *(("spec.quantization.type", "nf4"), ("spec.quantization.load_in_4bit", True)),
    *(("spec.parallelism.gpus", 4), ("spec.parallelism.gpusPerWorker", "4"), ("spec.parallelism.zeroStage", 4)),
    *(("spec.scheduling.tolerations", [{"key": "gpu", "operator": "exists"}]), ("spec.scheduling.nodeSelector", [])),
    *(("spec.output", GONE), ("spec.output.destination", "hf://org/adapter"), ("spec.output.path", "s3://b/out")),
    *(("spec.policy.maxRestarts", -1), ("spec.suspend", "false"), ("spec.resources", {"limits": {"cpu": 4}})),
)
"""A field of a manifest, and what people write there."""


def test_nothing_differs_in_500_random_changes(crd_cluster, kwok_namespace, tmp_path):
    schema = yaml.safe_load(CRD.read_text())["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    drawn = list(mutations(schema, qlora_job("job", kwok_namespace, **FULL), 2 * COUNT, SEED))
    changed = [m for m in drawn if not _is_path(m.path[-1], m.value)][:COUNT]
    assert len(changed) == COUNT
    found = [(str(m), *_both(crd_cluster, tmp_path, kwok_namespace, m.manifest)) for m in changed]
    assert [each for each in found if bool(each[1]) != bool(each[2])] == []
    assert 100 < sum(bool(refused) for _, refused, _ in found) < COUNT


def test_nothing_differs_in_common_errors(crd_cluster, kwok_namespace, tmp_path):
    found = []
    for path, value in COMMON_ERRORS:
        manifest = _with(qlora_job("job", kwok_namespace), path, value)
        found.append((f"{path}: {value!r}", *_both(crd_cluster, tmp_path, kwok_namespace, manifest)))
    assert [each for each in found if not (each[1] and each[2])] == []
    assert len(found) >= 50


def test_a_valid_manifest_is_taken_by_both(crd_cluster, kwok_namespace, tmp_path):
    assert _both(crd_cluster, tmp_path, kwok_namespace, qlora_job("job", kwok_namespace, **FULL)) == ("", "")


def _is_path(field: object, value: object) -> bool:
    return field in PLACES and isinstance(value, str) and "://" not in value


def _with(manifest: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    manifest = copy.deepcopy(manifest)
    *groups, last = path.split(".")
    place = manifest
    for group in groups:
        place = place.setdefault(group, {})
    if value is GONE:
        del place[last]
    else:
        place[last] = value
    return manifest


def _both(cluster: ControlPlane, folder: Path, namespace: str, manifest: dict[str, Any]) -> tuple[str, str]:
    """Return what the API server says of a manifest, and what ``qlora validate`` does; empty where it is taken."""
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(manifest, allow_unicode=True))
    try:
        cluster.api.post(f"{GROUP}/namespaces/{namespace}/qlorajobs", manifest, dryRun="All", fieldValidation="Strict")
    except ClusterApiError as error:
        if error.status not in (400, 404, 422):
            raise
        return error.message, "\n".join(map(str, check_file(file).errors))
    return "", "\n".join(map(str, check_file(file).errors))
