"""Configurations of other tools become valid manifests, and what does not get into them is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from qlora_cli.kube.errors import ClusterError
from qlora_cli.manifest import validate
from qlora_cli.manifest.convert.manifest import manifest_of

CONFIGURATIONS = Path(__file__).parent / "configurations"


def converted(name, gpus=1, **given):
    found = manifest_of(CONFIGURATIONS / name, gpus, given, None)
    return yaml.safe_load(found.text)["spec"], "\n".join(found.notes)


@pytest.mark.parametrize("name", sorted(p.name for p in CONFIGURATIONS.iterdir() if p.is_file()))
def test_a_configuration_becomes_a_valid_manifest(name, tmp_path):
    text = manifest_of(CONFIGURATIONS / name, 2, {"destination": "s3://adapters/one"}, None).text
    path = tmp_path / "job.yaml"
    path.write_text(text)
    report = validate.check_file(path)
    assert report.good, validate.as_text([report])


def test_axolotl_with_instructions():
    spec, notes = converted("axolotl-alpaca.yaml", gpus=2)
    assert spec["model"] == {"source": "hf://acme/base-8b"}
    assert spec["dataset"] == {
        "train": {"source": "hf://acme/instructions"},
        "eval": {"fraction": "0.05"},
        "format": "Instruction",
        "maxLength": 512,
        "longRows": "Drop",
    }
    assert spec["quantization"] == {"type": "NF4"}
    assert spec["lora"] == {"rank": 32, "alpha": 16, "dropout": "0.05"}
    assert spec["training"] == {
        "epochs": 2,
        "learningRate": "0.0002",
        "globalBatchSize": 16,
        "microBatchSize": 2,
        "maxGradNorm": "1",
        "optimizer": "PagedAdamW32Bit",
        "gradientCheckpointing": "Full",
    }
    assert spec["parallelism"] == {"gpusPerWorker": 2}
    assert spec["output"] == {"destination": "./outputs/qlora-out"}
    for part in ("acme/more-instructions", "num_epochs: 1.5", "warmup of 0.1", "evals_per_epoch: 4", "wandb"):
        assert part in notes
    assert "neftune_noise_alpha: 5: has no counterpart" in notes
    assert "pad_token" not in notes


def test_axolotl_with_conversations_in_8_bits():
    spec, notes = converted("axolotl-chat.yml", gpus=2)
    assert spec["dataset"]["train"]["source"] == "hf://acme/conversations/train.jsonl"
    assert spec["dataset"]["columns"] == {"messages": "turns"}
    assert (spec["dataset"]["packing"], spec["dataset"]["longRows"]) == (False, "Truncate")
    assert spec["quantization"]["type"] == "INT8"
    assert spec["lora"]["targetModules"] == ["q_proj", "v_proj", "k_proj", "o_proj"]
    training = spec["training"]
    assert (training["maxSteps"], training["warmupSteps"], training["schedule"]) == (200, 10, "Constant")
    assert spec["checkpoint"] == {"everySteps": 50, "keep": 2}
    assert spec["parallelism"] == {"gpusPerWorker": 2, "zeroStage": 2}
    assert "chat_template: chatml" in notes
    assert "test_datasets" in notes


def test_llama_factory_with_its_description_of_the_rows():
    spec, notes = converted("llama-factory.yaml")
    assert spec["dataset"]["train"]["source"] == str(CONFIGURATIONS / "data" / "support.json")
    columns = {"messages": "conversations", "system": "rules"}
    assert (spec["dataset"]["format"], spec["dataset"]["columns"]) == ("Messages", columns)
    assert spec["dataset"]["packing"] is False
    assert spec["lora"] == {"rank": 8, "alpha": 16}, "LLaMA-Factory's alpha is twice the rank"
    assert spec["quantization"] == {"type": "NF4", "computeType": "BFloat16"}
    assert spec["training"]["evaluation"] == {"everySteps": 500}
    for part in ("identity", "template: qwen3_nothink", "max_samples: 1000", "warmup of 0.1", "give --gpus"):
        assert part in notes


def test_llama_factory_without_its_description_asks_for_the_rows(tmp_path):
    (tmp_path / "job.yaml").write_text((CONFIGURATIONS / "llama-factory.yaml").read_text())
    with pytest.raises(ClusterError, match="--data"):
        manifest_of(tmp_path / "job.yaml", 1, {}, None)
    text = manifest_of(tmp_path / "job.yaml", 1, {"data": "s3://rows/support.jsonl", "format": "Messages"}, None).text
    assert yaml.safe_load(text)["spec"]["dataset"]["train"] == {"source": "s3://rows/support.jsonl"}


def test_trl_from_its_configuration():
    spec, notes = converted("trl.yaml")
    assert spec["model"]["source"] == "hf://acme/chat-1b@1f2e3d"
    assert spec["dataset"]["format"] == "Messages"
    assert spec["lora"] == {"rank": 16, "dropout": "0.05"}, "TRL's own default of dropout"
    assert spec["training"]["warmupSteps"] == 3, "a share of the steps"
    assert spec["training"]["maxGradNorm"] == "1"
    assert "split test" in notes
    assert "wandb" in notes


def test_trl_from_a_command_line():
    spec, notes = converted("trl.sh", format="PromptCompletion")
    assert spec["dataset"]["format"] == "PromptCompletion"
    assert (spec["training"]["epochs"], spec["training"]["globalBatchSize"]) == (1, 32), "of two processes"
    assert spec["training"]["schedule"] == "Linear"
    assert spec["lora"]["targetModules"] == ["q_proj", "v_proj"]
    assert spec["quantization"] == {"type": "NF4", "doubleQuantization": False}, "TRL nests only where it is told to"
    assert "eos_token: <|im_end|>" in notes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base_model: a/b\nadapter: qlora\nrl: dpo\ndatasets: [{path: x, type: alpaca}]", "preferences"),
        ("base_model: a/b\ndatasets: [{path: x, type: alpaca}]", "adapter: 'none' trains all weights"),
        ("base_model: a/b\nadapter: qlora", "datasets: must be a list"),
        ("base_model: a/b\nadapter: qlora\ndatasets: [{path: x, type: input_output}]", "'input_output' has no"),
        ("base_model: a/b\nadapter: qlora\nsequence_len: long\ndatasets: [{path: x, type: alpaca}]", "sequence_len"),
        ("base_model: a/b\nadapter: qlora\nlearning_rate: .nan\ndatasets: [{path: x, type: alpaca}]", "learning_rate"),
        ("model_name_or_path: a/b\nstage: dpo\nfinetuning_type: lora", "stage: 'dpo'"),
        ("model_name_or_path: a/b\nfinetuning_type: full", "finetuning_type: 'full'"),
        ("--model_name_or_path a/b --dataset_name c/d", "use_peft"),
        ("--model_name_or_path 'a/b --use_peft", "no command line"),
        ("a: 1", "is no configuration of axolotl"),
        ("a: [1", "neither YAML"),
        ("", "is no configuration of axolotl"),
        ("- 1", "is no configuration of axolotl"),
    ],
)
def test_what_cannot_be_converted_is_said(tmp_path, text, words):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ClusterError, match=words):
        manifest_of(path, 1, {"destination": "s3://a/b"}, None)


def test_a_missing_binary_or_huge_file_is_named(tmp_path):
    path = tmp_path / "config.yaml"
    for data, words in ((None, "No such file"), (b"\xff\xfe\x00", "UTF-8"), (b"#" * (2 << 20), "larger")):
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(ClusterError, match=words):
            manifest_of(path, 1, {}, None)
