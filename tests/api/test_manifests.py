"""Manifests: what is valid, and the answers to those that are not."""

from __future__ import annotations

import pytest

from qlora_api import QLoRAJob
from qlora_api.errors import ManifestError
from qlora_api.spec import LossOn, QuantizationType

from .manifests import VALID, manifest


def test_the_smallest_manifest_has_the_recipe_of_the_paper_as_defaults():
    spec = QLoRAJob.from_manifest(VALID).spec
    assert spec.quantization.type is QuantizationType.NF4
    assert spec.quantization.double_quantization
    assert spec.lora.target_modules is None
    assert spec.training.max_grad_norm == "0.3"
    assert spec.dataset.effective_loss_on is LossOn.COMPLETION


def test_what_is_written_is_read_back_the_same():
    job = QLoRAJob.from_manifest(manifest(training__learningRate="1e-4", lora__targetModules=["q_proj"]))
    assert QLoRAJob.from_manifest(job.to_json_dict()) == job


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param(
            {"dataset__maxLenth": 3},
            "spec.dataset.maxLenth: unknown field; did you mean maxLength?",
            id="unknown-field-with-a-near-one",
        ),
        pytest.param({"lora__rank": 0}, "spec.lora.rank: 0 must be at least 1", id="too-small"),
        pytest.param({"lora__rank": 4096}, "spec.lora.rank: 4096 must be at most 1024", id="too-large"),
        pytest.param({"lora__rank": "16"}, 'spec.lora.rank: "16" must be a whole number', id="text-for-a-number"),
        pytest.param({"lora__rank": 1.5}, "spec.lora.rank: 1.5 must be a whole number", id="fraction-for-a-number"),
        pytest.param(
            {"policy__stallTimeoutSeconds": "30m"},
            'spec.policy.stallTimeoutSeconds: "30m" must be a whole number, without quotes and without a unit',
            id="wrong-unit",
        ),
        pytest.param(
            {"training__learningRate": 0.0002},
            'spec.training.learningRate: 0.0002 is a YAML number: write "0.0002", with quotes',
            id="float-for-a-decimal",
        ),
        pytest.param(
            {"training__learningRate": "2x"},
            'spec.training.learningRate: "2x" must be greater than 0 and at most 1, written with digits',
            id="no-decimal",
        ),
        pytest.param(
            {"lora__dropout": ".1"},
            'spec.lora.dropout: ".1" must be at least 0 and less than 1, written with digits, such as 0.05',
            id="no-leading-digit",
        ),
        pytest.param(
            {"lora__dropout": "1"},
            'spec.lora.dropout: "1" must be at least 0 and less than 1',
            id="bound-not-included",
        ),
        pytest.param(
            {"quantization__type": "nf4"},
            'spec.quantization.type: "nf4" must be one of NF4, FP4, INT8 or None; did you mean NF4?',
            id="unknown-choice",
        ),
        pytest.param(
            {"dataset__format": "prompt_completion"},
            'spec.dataset.format: "prompt_completion" must be one of Text, Messages, PromptCompletion or Instruction; '
            "did you mean PromptCompletion?",
            id="choice-in-snake-case",
        ),
        pytest.param({"lora__RANK": 8}, "spec.lora.RANK: unknown field; did you mean rank?", id="field-in-capitals"),
        pytest.param({"suspend": "yes"}, 'spec.suspend: "yes" must be true or false', id="text-for-a-switch"),
        pytest.param({"output": None}, "spec.output: is required", id="missing-group"),
        pytest.param(
            {"model__source": "http://x/y"},
            'spec.model.source: "http://x/y" scheme "http://" is not known',
            id="scheme",
        ),
        pytest.param(
            {"training__maxSteps": 5},
            "spec.training.epochs: 1: set exactly one of epochs and maxSteps",
            id="both-lengths",
        ),
        pytest.param(
            {"training__epochs": None}, "spec.training.epochs: set exactly one of epochs and maxSteps", id="no-length"
        ),
        pytest.param(
            {"training__globalBatchSize": 10, "parallelism__workers": 4},
            "spec.training.globalBatchSize: 10: globalBatchSize must be a multiple of parallelism.workers",
            id="impossible-batch-split",
        ),
        pytest.param(
            {"training__globalBatchSize": 8, "training__microBatchSize": 3},
            "spec.training.microBatchSize: 3: globalBatchSize must be a multiple of microBatchSize",
            id="impossible-micro-batch",
        ),
        pytest.param(
            {"dataset__lossOn": "Assistant"},
            'spec.dataset.lossOn: "Assistant": lossOn Assistant requires format Messages',
            id="loss-on-what-is-not-there",
        ),
        pytest.param(
            {"dataset__format": "Text", "dataset__lossOn": "Completion"},
            'spec.dataset.lossOn: "Completion": format Text has no completion',
            id="completion-of-a-text",
        ),
        pytest.param(
            {"dataset__eval": {"fraction": "0.1", "source": "s3://b/e"}},
            'spec.dataset.eval.fraction: "0.1": set exactly one of source',
            id="two-sources-of-evaluation-rows",
        ),
        pytest.param(
            {"dataset__tolerance": {"evalInTrain": "0"}},
            'spec.dataset.tolerance.evalInTrain: "0": tolerance.evalInTrain needs evaluation rows',
            id="tolerance-of-evaluation-rows-without-any",
        ),
        pytest.param(
            {"training__evaluation": {"patience": 2}},
            "spec.training.evaluation.patience: 2: training.evaluation.patience needs evaluation rows",
            id="patience-without-evaluation",
        ),
        pytest.param(
            {"parallelism__offload": "Optimizer"},
            'spec.parallelism.offload: "Optimizer": offload Optimizer needs zeroStage',
            id="offload-without-zero",
        ),
        pytest.param(
            {"quantization__type": "None", "quantization__skipModules": ["q_proj"]},
            "spec.quantization.skipModules: ",
            id="layers-to-skip-where-none-is-quantized",
        ),
        pytest.param(
            {"lora__trainTokens": ["<|im_start|>", "a", "<|im_start|>"]},
            "spec.lora.trainTokens: must name each token once",
            id="token-twice",
        ),
        pytest.param(
            {"lora__trainTokens": [str(number) for number in range(10_000)]},
            "spec.lora.trainTokens: is not allowed: list should have at most 512 items",
            id="too-many-tokens",
        ),
        pytest.param({"lora__trainTokens": ["a", ""]}, "spec.lora.trainTokens[1]: ", id="empty-token"),
        pytest.param({"lora__trainTokens": ["x" * 129]}, "spec.lora.trainTokens[0]: ", id="long-token"),
        pytest.param(
            {"parallelism__zeroStage": 3, "quantization__type": "INT8"},
            "spec.parallelism.zeroStage: 3: quantization.type INT8 cannot be partitioned",
            id="int8-under-zero-3",
        ),
    ],
)
def test_an_error_is_answered_with_field_value_and_what_is_allowed(changes, expected):
    with pytest.raises(ManifestError) as caught:
        QLoRAJob.from_manifest(manifest(**changes))
    assert str(caught.value.errors[0]).startswith(expected)


def test_all_errors_are_named_at_once():
    with pytest.raises(ManifestError) as caught:
        QLoRAJob.from_manifest(manifest(lora__rank=0, lora__alpah=1, training__seed=-1))
    assert {m.field for m in caught.value.errors} == {"spec.lora.rank", "spec.lora.alpah", "spec.training.seed"}


@pytest.mark.parametrize("name", ["Docs", "a_b", "", "x" * 53], ids=["capitals", "underscore", "empty", "too-long"])
def test_a_name_that_children_could_not_carry_is_refused(name):
    with pytest.raises(ManifestError, match=r"metadata\.name"):
        QLoRAJob.from_manifest({**VALID, "metadata": {"name": name}})


def test_another_api_version_is_refused():
    with pytest.raises(ManifestError, match=r"apiVersion.*must be qlora\.dev/v1alpha1"):
        QLoRAJob.from_manifest({**VALID, "apiVersion": "qlora.dev/v2"})
