"""Rows that influence each other are found in Prepare, by the largest difference of a token."""

from __future__ import annotations

import pytest

from models.tiny_base import write_base
from qlora_api.contract import TrainerConfig
from qlora_trainer.errors import UserError
from qlora_trainer.prepare.fetch_and_tokenize import try_base
from qlora_trainer.storage.fetch import FetchedModel


def config_of(folder, zero_stage, device="CPU"):
    return TrainerConfig.model_validate(
        {
            "job": {"name": "job", "uid": "1"},
            "spec": {
                "model": {"source": "s3://b/model"},
                "dataset": {"train": {"source": "s3://b/rows.jsonl"}, "format": "Text"},
                "training": {"maxSteps": 1},
                "parallelism": {"zeroStage": zero_stage},
                "output": {"destination": "s3://b/out"},
            },
            "batch": {"worldSize": 2, "microBatchSize": 1, "gradientAccumulationSteps": 8},
            "device": device,
            "ranksPerWorker": 2,
            "gradientCheckpointing": False,
            "checkpointUri": str(folder / "checkpoints"),
            "cacheDir": str(folder),
            "terminationMessagePath": str(folder / "message"),
        }
    )


def tried(folder, model_type, zero_stage, device="CPU"):
    write_base(model_type, folder / "base")
    model = FetchedModel(folder / "base", "revision", "s3://b/model", "")
    return try_base(config_of(folder, zero_stage, device), model)


def test_rows_that_are_mixed_are_said_to_be_computed_alone(tmp_path):
    (note,) = tried(tmp_path, "mamba", 2)
    assert note == 'a "mamba" model mixes rows that lie end to end: each is computed by itself, exact and slower'


def test_zero_3_is_refused_where_rows_are_mixed(tmp_path):
    with pytest.raises(UserError, match=r'zeroStage: 3 is not available for a "mamba" model, which mixes rows'):
        tried(tmp_path, "mamba", 3)


def test_kernels_that_only_a_gpu_runs_are_left_to_the_ranks(tmp_path, monkeypatch):
    (tmp_path / "fla.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert tried(tmp_path, "mamba", 3, device="CUDA") == []


def test_rows_that_are_kept_apart_are_not_mentioned(tmp_path):
    assert tried(tmp_path, "qwen3", 3) == []
