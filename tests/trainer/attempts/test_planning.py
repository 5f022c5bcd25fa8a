"""Prepare knows what the ranks will need before any of them has a GPU, from the base's headers and the rows."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

from demo.material import LLAMA_70B, make_large_base
from qlora_api.contract import ExitCode
from qlora_api.status import Reason
from qlora_memory import model_shape
from qlora_trainer.prepare.command import main

AUTO = {"epochs": 3, "globalBatchSize": 64, "microBatchSize": None, "learningRate": "1e-4"}


def on_gpu(runner, gpu, **changes):
    """A config as an operator writes it whose nodes have these GPUs."""
    config = runner.config(**{"training": AUTO, **changes})
    return config.model_copy(update={"device": "CUDA", "gpu": gpu, "gradient_checkpointing": True})


@pytest.fixture
def prepare(runner, monkeypatch):
    """Prepare, one after the other; the termination message."""

    def run(*configs):
        words = []
        for config in configs:
            path, _ = runner.write(config)
            monkeypatch.setattr(sys, "argv", ["prepare", str(path)])
            words.append(runner.ended(config, main()).message)
        return words

    return run


@pytest.fixture
def large_base(runner):
    """All of a Llama of 70 billion weights but the weights: one file that is a hole behind its header."""
    folder = runner.folder / "llama-70b"
    make_large_base(folder, runner.model)
    return folder


def test_the_batch_is_cut_and_activations_are_kept_as_the_gpu_allows(runner, prepare):
    small, large = prepare(on_gpu(runner, "l4-24gb"), on_gpu(runner, "h100-80gb"))
    for word in (small, large):
        assert word.exit_code == ExitCode.DONE, word
        batch = word.prepared.batch
        assert (batch.world_size, batch.global_batch_size) == (2, 64)
        assert not word.prepared.gradient_checkpointing, "a model of this size leaves room"
        assert batch.micro_batch_size == 32
        assert {"peak", "activations", "adapterWeights", "logits"} <= word.prepared.memory.keys()
    assert float(small.prepared.expected_gpu_hours) >= float(large.prepared.expected_gpu_hours)


def test_what_the_job_says_of_its_batch_stays(runner, prepare):
    fixed = {**AUTO, "microBatchSize": 2, "gradientCheckpointing": "Full"}
    (word,) = prepare(on_gpu(runner, "h100-80gb", training=fixed))
    assert (word.prepared.batch.micro_batch_size, word.prepared.gradient_checkpointing) == (2, True)


def test_a_gpu_that_the_trainer_cannot_use_ends_the_job(runner, prepare):
    (word,) = prepare(on_gpu(runner, "p100-16gb"))
    assert (word.exit_code, word.prepared) == (ExitCode.USER_ERROR, None)
    assert word.message.startswith('spec.scheduling.nodeSelector: "p100-16gb" has compute capability 6.0; the trainer')


def test_a_base_that_no_gpu_of_this_kind_holds_ends_the_job_with_what_would_fit(runner, prepare, large_base):
    model = {"source": str(large_base)}
    small, large = prepare(on_gpu(runner, "rtx4090-24gb", model=model), on_gpu(runner, "h200-141gb", model=model))
    assert (small.exit_code, small.reason, small.prepared) == (ExitCode.USER_ERROR, Reason.USER_ERROR, None)
    assert small.message.startswith("spec.model.source: ")
    for words in ("GiB on each GPU, but rtx4090-24gb gives 23.5", "quantizedWeights 31", "a GPU such as l40s-48gb"):
        assert words in small.message
    assert large.exit_code == ExitCode.DONE, "what was found of the rows is not lost"
    assert large.prepared.memory["quantizedWeights"] == sum(i.elements for i in model_shape(LLAMA_70B).linears) // 2


def test_on_a_cpu_nothing_is_chosen_by_memory_and_all_of_it_is_predicted(runner, prepare):
    (word,) = prepare(runner.config())
    assert word.prepared.batch == runner.config().batch
    assert word.prepared.expected_gpu_hours is None
    assert word.prepared.memory["adapterWeights"] > 0
    assert "cudaContext" not in word.prepared.memory


def test_weights_that_contradict_the_configuration_are_refused(runner, prepare):
    folder = runner.folder / "other"
    shutil.copytree(runner.model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": config["intermediate_size"] * 2}))
    (word,) = prepare(runner.config(model={"source": str(folder)}))
    assert word.exit_code == ExitCode.USER_ERROR
    assert "or have them in other shapes, such as model.layers.0.mlp.down_proj.weight" in word.message
