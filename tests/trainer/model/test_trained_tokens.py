"""Trained embeddings of tokens: computed, published, loaded by PEFT and merged alike, tied to the head or not."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qlora_api.spec import ComputeType, LoRASpec, QuantizationSpec, QuantizationType
from qlora_memory import AdapterShape, planned_coverage
from qlora_trainer.engine.optim import parameter_groups
from qlora_trainer.errors import AdapterRejectedError, UserError
from qlora_trainer.model.base_model import add_lora, causal_config, load_base, meta_model, trainable, weight_bytes
from qlora_trainer.model.composite import model_class
from qlora_trainer.model.coverage import coverage_of
from qlora_trainer.model.dry_run import adapters_without_gradient
from qlora_trainer.model.loss import NextTokenLoss, call_arguments, end_to_end, head_is_plain
from qlora_trainer.model.trained_tokens import TRAINED_ROWS, token_numbers
from qlora_trainer.prepare.plan_memory import shape_of
from qlora_trainer.publish.gate import verify_adapter, verify_loads
from qlora_trainer.publish.merge_adapter import merge
from qlora_trainer.training.finish import export_adapter
from random_rows import random_rows
from tiny_models import LLAMA_LIKE, save_random
from training_steps import distance

CPU = torch.device("cpu")
NF4 = QuantizationSpec(compute_type=ComputeType.BFLOAT16)
PLAIN = QuantizationSpec(type=QuantizationType.NONE, compute_type=ComputeType.FLOAT32)
TOKENS = {"<|end|>": 7, "<|start|>": 35, "café": 301}
LORA = LoRASpec(rank=4, alpha=8, train_tokens=list(TOKENS))
TIED = ("tied", "opt", "gemma3", "composite")
NAMES = ("llama", *TIED)


@pytest.fixture(scope="module")
def bases(tiny_models, composites, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied")
    torch.manual_seed(0)
    save_random(LlamaForCausalLM(LlamaConfig(**LLAMA_LIKE, tie_word_embeddings=True)).bfloat16(), folder)
    return {**{name: tiny_models[name] for name in ("llama", "opt", "gemma3")}, "tied": folder} | {
        "composite": composites["gemma3"]
    }


def adapted(folder, quantization=PLAIN, lora=LORA):
    return add_lora(load_base(folder, quantization, CPU), lora, 1, "base", TOKENS)


def rows_of(model):
    (rows,) = (p for name, p in trainable(model).items() if TRAINED_ROWS in name)
    return rows


def train(model):
    """Train three steps on rows that hold the tokens; return the gradients of the last one."""
    module = NextTokenLoss(model.train(), fused=head_is_plain(model))
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=2e-2, weight_decay=0)
    for _ in range(3):
        optimizer.zero_grad()
        module(*call_arguments(end_to_end([*random_rows(24, 9), IDS[0]]), CPU)).mean().backward()
        gradients = {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}
        optimizer.step()
    return gradients


IDS = torch.tensor([[3, 7, 35, 8, 301, 7, 9, 35, 250, 3, 301, 4]])


@torch.no_grad()
def probabilities(model):
    return model.eval()(input_ids=IDS).logits[0].float().softmax(-1)


@torch.no_grad()
def own_probabilities(model):
    inputs, _, _ = call_arguments(end_to_end([IDS[0]]), CPU)
    module = NextTokenLoss(model.eval(), fused=head_is_plain(model))
    return module(inputs, torch.arange(IDS.shape[1])).float().softmax(-1)


@pytest.mark.parametrize("name", NAMES)
def test_published_rows_give_the_trained_logits_in_peft_and_merged(name, bases, tmp_path):
    base = bases[name]
    model = adapted(base)
    before = own_probabilities(model)
    train(model)
    trained = own_probabilities(model)
    export_adapter(
        model, {n: p.detach().clone() for n, p in trainable(model).items()}, tmp_path / "a", str(base), "main"
    )
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    skeleton = meta_model(base, whole=True)
    names = [n for found in (skeleton.named_modules(), skeleton.named_parameters()) for n, _ in found]
    verify_adapter(tmp_path / "a", names, LORA)
    verify_loads(tmp_path / "a", skeleton)
    whole = model_class(causal_config(base)).from_pretrained(base, dtype=torch.float32)
    assert distance(probabilities(PeftModel.from_pretrained(whole, tmp_path / "a")), trained) < 1e-5
    merge(base, tmp_path / "a", tmp_path / "merged")
    merged = model_class(causal_config(tmp_path / "merged")).from_pretrained(tmp_path / "merged", dtype=torch.float32)
    effect = distance(before, trained)
    assert distance(probabilities(merged), trained) < (0.02 if name == "gemma3" else 0.05 * effect)
    table, plain = (
        m.get_input_embeddings().weight
        for m in (merged, model_class(causal_config(base)).from_pretrained(base, dtype=torch.float32))
    )
    assert torch.equal(table[list(TOKENS.values())], rows_of(model).detach().bfloat16().float())
    others = [n for n in range(len(table)) if n not in TOKENS.values()]
    assert torch.equal(table[others], plain[others])
    assert (merged.get_output_embeddings().weight is table) == (name in TIED)


@pytest.mark.parametrize("name", NAMES)
def test_all_of_the_adapter_learns_and_the_dry_run_says_so(name, bases):
    assert adapters_without_gradient(add_lora(meta_model(bases[name]), LORA, 1, "base", TOKENS)) == []
    model = adapted(bases[name])
    gradients = train(model)
    assert [n for n in trainable(model) if n not in gradients or not gradients[n].any()] == []
    assert rows_of(model).grad.any(dim=1).all(), "of each token"


@pytest.mark.parametrize("name", NAMES)
def test_rows_compute_what_peft_computes_with_a_copy_of_the_table(name, bases):
    model = adapted(bases[name])
    rows_of(model).data.normal_()
    module = NextTokenLoss(model.eval(), fused=False)
    inputs, _, _ = call_arguments(end_to_end([IDS[0]]), CPU)
    ours = module(inputs, torch.arange(IDS.shape[1]))
    for layer in model.modules():
        if isinstance(layer, TrainableTokensLayer):
            del layer.forward
    torch.testing.assert_close(ours, module(inputs, torch.arange(IDS.shape[1])))


@pytest.mark.parametrize("name", ["llama", "tied", "opt"])
@pytest.mark.parametrize("chunk", [1, 1 << 25], ids=["a-token-at-a-time", "at-once"])
def test_the_fused_loss_has_the_gradients_of_the_models_own_logits(name, chunk, bases, monkeypatch):
    monkeypatch.setattr("qlora_trainer.model.loss.LOGITS_PER_CHUNK", chunk)
    found = []
    for fused in (True, False):
        model = adapted(bases[name])
        assert head_is_plain(model)
        generator = torch.Generator().manual_seed(3)
        for parameter in trainable(model).values():
            parameter.data.normal_(std=0.05, generator=generator)
        losses = NextTokenLoss(model, fused=fused)(*call_arguments(end_to_end([*random_rows(30), IDS[0]]), CPU))
        (losses * torch.linspace(0.5, 2, len(losses))).sum().backward()
        found.append({"losses": losses.detach(), **{n: p.grad for n, p in trainable(model).items()}})
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("quantization", [NF4, PLAIN], ids=["nf4", "16-bit"])
def test_the_plan_has_the_bytes_of_the_rows(name, quantization, bases):
    model = adapted(bases[name], quantization)
    assert rows_of(model).dtype is torch.float32
    shape = shape_of(bases[name])
    assert AdapterShape(shape, LORA).bytes == weight_bytes(model)["adapterWeights"]
    assert AdapterShape(shape, LORA).bytes - AdapterShape(shape, LoRASpec(rank=4)).bytes == 4 * len(TOKENS) * 64
    counted = coverage_of(model)
    assert planned_coverage(shape, LORA, quantization).adapted == counted.adapted
    assert counted.adapted.endswith(" linear layers, the embeddings of 3 tokens")


def test_rows_do_not_decay(bases):
    model = adapted(bases["tied"])
    matrices, others = parameter_groups(trainable(model), 0.1)
    assert [p for p in others["params"] if p.ndim > 1] == [rows_of(model)]
    assert others["weight_decay"] == 0
    assert all(p is not rows_of(model) for p in matrices["params"])


# ------------------------------------------------------------------------------------------------------ what is refused


def test_a_head_that_shares_the_embeddings_is_adapted_in_one_way(bases):
    both = LORA.model_copy(update={"target_modules": ["q_proj", "lm_head"]})
    with pytest.raises(UserError, match=r"trainTokens: is not available with lm_head in spec\.lora\.targetModules"):
        add_lora(meta_model(bases["tied"]), both, 1, "base", TOKENS)
    assert adapters_without_gradient(add_lora(meta_model(bases["llama"]), both, 1, "base", TOKENS)) == []


def test_a_token_without_an_embedding_is_refused(bases):
    with pytest.raises(UserError) as caught:
        add_lora(meta_model(bases["llama"]), LORA, 1, "base", {"<|x|>": 320})
    assert str(caught.value) == (
        'spec.lora.trainTokens: "<|x|>" is token 320 of the tokenizer, and base has 320 embeddings: it has none'
    )


class Doubled(torch.nn.Embedding):
    def forward(self, x):
        return 2 * super().forward(x)


def test_embeddings_that_peft_would_compute_in_another_way_are_refused(bases):
    model = meta_model(bases["llama"])
    model.get_input_embeddings().__class__ = Doubled
    with pytest.raises(UserError, match=r"is not available for base, whose embeddings are computed .* \(Doubled\)"):
        add_lora(model, LORA, 1, "base", TOKENS)


def test_a_head_that_is_tied_against_its_configuration_is_refused(bases):
    model = meta_model(bases["tied"])
    model.config.tie_word_embeddings = False
    with pytest.raises(UserError, match=r"shares the embeddings without saying so in its config\.json"):
        add_lora(model, LORA, 1, "base", TOKENS)


@pytest.fixture
def published(bases, tmp_path):
    folder = tmp_path / "published"
    model = adapted(bases["llama"])
    train(model)
    export_adapter(model, {n: p.detach().clone() for n, p in trainable(model).items()}, folder, "base", "main")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def change_tensors(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    (name,) = (n for n in tensors if n.endswith(TRAINED_ROWS))
    change(tensors, name)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


SPOILED = {
    "without-rows": (lambda t, n: t.pop(n), "names 3 trained tokens, and its embeddings are none"),
    "fewer-rows": (lambda t, n: t.update({n: t[n][:2].clone()}), r"names 3 trained tokens, .* are \(2, 64\)"),
    "not-finite": (lambda t, n: t[n].fill_(float("nan")), "trainable_tokens_delta is not finite"),
}


@pytest.mark.parametrize(("change", "said"), SPOILED.values(), ids=SPOILED)
def test_rows_that_are_not_whole_are_not_published(change, said, published):
    change_tensors(published, change)
    with pytest.raises(AdapterRejectedError, match=said):
        verify_adapter(published, None, LORA)


def test_rows_of_another_width_are_not_published(published, bases):
    change_tensors(published, lambda t, n: t.update({n: t[n][:, :32].clone()}))
    verify_adapter(published, None, LORA)
    with pytest.raises(AdapterRejectedError, match="cannot be loaded onto its base"):
        verify_loads(published, meta_model(bases["llama"]))


def test_rows_that_the_job_does_not_ask_for_are_not_published(published):
    with pytest.raises(AdapterRejectedError, match="trains 3 tokens, and the job names 0"):
        verify_adapter(published, None, LoRASpec(rank=4))


# ------------------------------------------------------------------------------------------------------ the tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level, of lower case, with special tokens of which one holds spaces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate([*alphabet, "ab", "Ġab", "ĠĠ"])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("Ġ", "ab"), ("Ġ", "Ġ")]))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<a b>", "<|终|>"]})
    return tokenizer


@pytest.mark.parametrize("token", ["<|im_start|>", "<a b>", "<|终|>", "ab", " ab", "Ġab", "  ", "\n", "q"])
def test_a_token_is_named_as_in_the_vocabulary_or_by_its_text(token, tokenizer):
    (number,) = token_numbers([token], tokenizer, "base").values()
    assert tokenizer.decode([number]) in (token, token.replace("Ġ", " "))


NO_TOKENS = {
    "several": ("<|im_end|>", 'makes "<", "|", "i", "m", "_", "e", "n", "d", … of it'),
    "several-bytes": ("終", "is no single token of base"),
    "normalized": (" AB", 'makes "Ġab" of it'),
    "emoji": ("🙂", "is no single token of base, whose tokenizer makes"),
}


@pytest.mark.parametrize(("text", "said"), NO_TOKENS.values(), ids=NO_TOKENS)
def test_a_text_that_is_no_single_token_is_refused(text, said, tokenizer):
    with pytest.raises(UserError) as caught:
        token_numbers(["ab", text], tokenizer, "base")
    assert str(caught.value).startswith(f'spec.lora.trainTokens: "{text}" is no single token of base')
    assert said in str(caught.value)
    assert str(caught.value).endswith("of it: name tokens that the tokenizer has")


def test_an_unknown_word_is_no_token(tmp_path):
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, "<unk>")), unk_token="<unk>"
    )
    with pytest.raises(UserError, match=r'"b" is no single token of base, whose tokenizer makes "<unk>" of it'):
        token_numbers(["b"], words, "base")


def test_one_token_under_two_names_is_refused(tokenizer):
    with pytest.raises(UserError, match=r'" ab" is token \d+ of base, as "Ġab" is: name it once'):
        token_numbers(["Ġab", " ab"], tokenizer, "base")


def test_the_order_of_names_does_not_matter(tokenizer):
    names = ["q", "<|im_start|>", "ab"]
    assert list(token_numbers(names, tokenizer, "base").items()) == list(
        token_numbers(names[::-1], tokenizer, "base").items()
    )
