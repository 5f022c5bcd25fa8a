"""Configurations of axolotl, LLaMA-Factory and TRL, converted, run at toy width with their own batch and settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open
from transformers import AutoTokenizer

from qlora_api import QLoRAJob
from qlora_api.batch import split_batch
from qlora_api.contract import ExitCode
from qlora_cli.manifest.convert.manifest import manifest_of

CONFIGURATIONS = Path(__file__).parents[3] / "cli" / "manifest" / "configurations"
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def as_rows(pairs, spec):
    """Return rows in the job's format and columns, those of a ShareGPT set included."""
    columns = {name: name for name in ("instruction", "input", "output", "prompt", "completion")}
    columns |= spec["dataset"].get("columns", {})
    for prompt, completion in pairs:
        match spec["dataset"]["format"]:
            case "Instruction":
                yield {columns["instruction"]: prompt, columns["input"]: "", columns["output"]: completion}
            case "PromptCompletion":
                yield {columns["prompt"]: prompt, columns["completion"]: completion}
            case "Messages" if columns.get("messages") == "conversations":
                yield {"conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": completion}]}
            case "Messages":
                turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
                yield {columns.get("messages", "messages"): turns}


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("axolotl-alpaca.yaml", None),
        ("axolotl-chat.yml", None),
        ("llama-factory.yaml", None),
        ("trl.yaml", None),
        ("trl.sh", "PromptCompletion"),
    ],
)
def test_a_converted_configuration_trains(runner, name, form):
    model = runner.folder / "base"
    model.mkdir()
    for file in runner.model.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    rows = runner.folder / "given.jsonl"
    given = {"model": str(model), "data": str(rows), "destination": str(runner.folder / "out"), "format": form}
    manifest = yaml.safe_load(manifest_of(CONFIGURATIONS / name, 1, given, None).text)
    spec = manifest["spec"]
    pairs = [(r["prompt"], r["completion"]) for r in map(json.loads, runner.rows.read_text().splitlines())][:60]
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in as_rows(pairs, spec)))
    spec["dataset"]["maxLength"] = 128  # the toy has 256 positions; the rest but the steps is as it was converted
    spec["training"] |= {"maxSteps": 2}
    spec["training"].pop("epochs", None)
    if spec["training"].get("warmupSteps"):
        spec["training"]["warmupSteps"] = 1
    job = QLoRAJob.from_manifest(manifest).spec
    config = runner.config(ranks=1).model_copy(update={"spec": job, "batch": split_batch(job, 1)})
    ended = runner.run(config)
    assert ended.code == ExitCode.DONE, ended.log[-3000:]
    adapter = Path(ended.message.adapter.uri)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (job.lora.rank, job.lora.alpha)
    with safe_open(adapter / "adapter_model.safetensors", "pt") as tensors:
        layers = {key.split(".lora_")[0].rsplit(".", 1)[-1] for key in tensors.keys()}  # noqa: SIM118 no mapping
    every = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert layers == set(job.lora.target_modules or every)
