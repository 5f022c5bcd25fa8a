"""Runs that train embeddings of tokens, from Prepare over a pause to the merged model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from qlora_api.contract import ExitCode
from qlora_trainer.prepare.local_copy import PreparedInputs
from qlora_trainer.prepare.records import Records

pytestmark = pytest.mark.ranks
TOKENS = ["<eos>", "(", "<|never|>"]
STEPS = 6


@pytest.fixture
def base(runner):
    """A base whose head shares its embeddings, and whose tokenizer has a token that no row holds."""
    folder = runner.folder / "base"
    tokenizer = AutoTokenizer.from_pretrained(runner.model)
    tokenizer.add_tokens(["<|never|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(runner.model, vocab_size=520, tie_word_embeddings=True)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def config_of(runner, base, attempt=1, pause=None, ranks=2, **changes):
    return runner.config(
        attempt,
        ranks=ranks,
        pause=pause,
        **{
            "model": {"source": str(base)},
            "lora": {"rank": 4, "trainTokens": TOKENS},
            "training": {"epochs": None, "maxSteps": STEPS, "learningRate": "5e-3"},
            "parallelism": {"zeroStage": 2},
            "output": {"destination": str(runner.folder / "out"), "merge": "BFloat16", "allowWorseEval": True},
            **changes,
        },
    )


def test_tokens_are_trained_resumed_published_and_merged(runner, base):
    first = config_of(runner, base, pause=3)
    assert runner.prepare(first) == 0
    paused = runner.train(first)
    assert paused.code == ExitCode.PREEMPTED, paused.log[-3000:]
    ended = runner.train(config_of(runner, base, attempt=2))
    assert ended.code == ExitCode.DONE, ended.log[-3000:]

    other = {"destination": str(runner.folder / "other"), "allowWorseEval": True}
    whole = config_of(runner, base, attempt=3, output=other).model_copy(
        update={"checkpoint_uri": str(runner.folder / "other-checkpoints")}
    )
    at_once = runner.train(whole)
    assert at_once.code == ExitCode.DONE, at_once.log[-3000:]
    assert at_once.losses == {**paused.losses, **ended.losses}
    adapter = Path(ended.message.adapter.uri)
    tensors, same = (load_file(a / "adapter_model.safetensors") for a in (adapter, Path(at_once.message.adapter.uri)))
    assert all(torch.equal(tensors[name], same[name]) for name in tensors)

    numbers = json.loads((adapter / "adapter_config.json").read_text())["trainable_token_indices"]
    names = AutoTokenizer.from_pretrained(adapter).convert_ids_to_tokens(numbers)
    assert sorted(names) == sorted(TOKENS)
    (rows,) = (t for name, t in tensors.items() if name.endswith("embed_tokens.token_adapter.trainable_tokens_delta"))
    table = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    merged = load_file(adapter.with_name("merged") / "model.safetensors")
    assert "lm_head.weight" not in merged
    assert torch.equal(merged["model.embed_tokens.weight"][numbers], rows.bfloat16())
    assert not torch.equal(rows[:2].bfloat16(), table[numbers[:2]])
    card = (adapter / "README.md").read_text()
    assert "since it has trained embeddings of tokens. Merge it into its base" in card
    assert '``"<\\|never\\|>"``' in card
    record = Records(first).of_run()
    assert record is not None
    assert [note for note in record.receipt.notes if "token" in note] == [
        "vLLM does not load trained embeddings of tokens with an adapter: serve the merged model",
        'trained tokens that no training row holds: "<|never|>"',
    ]
    assert PreparedInputs.read(first).shape.head.tied


@pytest.mark.parametrize("token", ["<|im_start|>", "  \n\t ", "終わり🙂"], ids=["unknown", "spaces", "unicode"])
def test_what_is_no_token_ends_prepare_with_the_token(token, runner):
    config = runner.config(ranks=1, lora={"trainTokens": ["<eos>", token]})
    code = runner.prepare(config)
    assert code == ExitCode.USER_ERROR
    assert f'spec.lora.trainTokens: "{token}" is no single token of ' in runner.ended(config, code).text
