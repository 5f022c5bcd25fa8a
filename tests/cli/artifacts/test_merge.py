"""An adapter merged into its base, by the trainer's process."""

import hashlib
import json
import os
import shutil

import pytest
from typer.testing import CliRunner

from qlora_cli import app
from qlora_cli.artifacts import adapters, merge
from qlora_cli.kube.errors import ClusterError


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A llama of a few thousand weights, with a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    LlamaForCausalLM(LlamaConfig(vocab_size=len(alphabet) + 1, **sizes)).to(torch.bfloat16).save_pretrained(folder)
    vocabulary = {letter: number for number, letter in enumerate([*alphabet, "<eos>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return folder


@pytest.fixture
def published(base, tmp_path):
    """An adapter on its q_proj, published as the trainer does it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"])
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(weight)
    folder = tmp_path / "out"
    adapter = folder / "u-attempt-1" / "adapter"
    model.save_pretrained(adapter)
    AutoTokenizer.from_pretrained(base).save_pretrained(adapter)
    files = [
        {
            "path": str(p.relative_to(folder)),
            "size": p.stat().st_size,
            "sha256": hashlib.sha256(p.read_bytes()).hexdigest(),
        }
        for p in sorted(adapter.rglob("*"))
        if p.is_file()
    ]
    body = {
        "schema": "qlora.dev/manifest/v1",
        "adapter": "u-attempt-1/adapter",
        "base": {"source": str(base)},
        "files": files,
    }
    (folder / "manifest.json").write_text(json.dumps(body))
    return folder


def test_the_merged_model_is_base_plus_update(base, published, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app.app, ["merge", f"{published}/", "--out", "merged"])
    assert done.exit_code == 0, done.output
    assert done.stdout == f"merged: {base} with the adapter merged in\n"
    name = "model.layers.0.self_attn.q_proj.weight"
    before, after = (
        load_file(base / "model.safetensors")[name],
        load_file(tmp_path / "merged" / "model.safetensors")[name],
    )
    update = load_file(published / "u-attempt-1/adapter/adapter_model.safetensors")
    a = update["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].float()
    b = update["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].float()
    assert (after.float() - (before.float() + 2 * b @ a)).abs().max() < 0.02
    assert (after.float() - before.float()).abs().max() > 0.1
    assert (tmp_path / "merged" / "tokenizer.json").exists()
    again = CliRunner().invoke(app.app, ["merge", f"{published}/", "--out", "merged"])
    assert (again.exit_code, again.stderr) == (40, "--out merged: is there already and not empty\n")


@pytest.mark.parametrize("command", ["merge {out}/ --out merged", "generate --adapter {adapter} --prompt a"])
def test_a_base_that_is_no_longer_what_the_adapter_was_trained_on_is_refused(
    base, published, tmp_path, monkeypatch, capfd, command
):
    from qlora_trainer.storage.fetch import fetch_model

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    changed = shutil.copytree(base, tmp_path / "base")
    revision = fetch_model(str(changed), tmp_path / "cache").revision
    body = json.loads((published / "manifest.json").read_text())
    body["base"] = {"source": str(changed), "revision": revision}
    (published / "manifest.json").write_text(json.dumps(body))
    weights = changed / "model.safetensors"
    times = weights.stat()
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    words = command.format(out=published, adapter=published / "u-attempt-1" / "adapter").split()
    done = CliRunner().invoke(app.app, words)
    assert done.exit_code == 40
    assert f"and the run began on {revision}" in done.output + capfd.readouterr().err


def test_a_full_disk_leaves_nothing_of_a_merged_model(published, tmpfs, capfd):
    with tmpfs("size=16k") as folder:
        done = CliRunner().invoke(app.app, ["merge", f"{published}/", "--out", f"{folder}/merged"])
        assert done.exit_code == 47
        assert list((folder / "merged").iterdir()) == []
    assert "No space left on device" in (said := capfd.readouterr().err)
    assert "Traceback" not in said


def test_an_adapter_that_was_changed_is_not_merged(published):
    (published / "u-attempt-1/adapter/adapter_config.json").write_text("{}")
    found = adapters.read(adapters.Source(str(published)))
    with pytest.raises(ClusterError, match=r"adapter_config.json has 2 bytes where .* the adapter must not be used"):
        merge.fetch(found, lambda _: None)


def test_without_the_trainer_it_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    done = CliRunner().invoke(app.app, ["merge", "u/", "--out", "merged"])
    assert done.exit_code == 40
    assert done.stderr.startswith("qlora merge runs the trainer (PyTorch, DeepSpeed), which is not installed here; ")
