"""Losses of packed rows equal those of the rows alone, and those of transformers itself, for every architecture."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, BloomConfig

from qlora_api.spec import ComputeType, LoRASpec, QuantizationSpec, QuantizationType
from qlora_trainer.model import loss as loss_module
from qlora_trainer.model.base_model import add_lora, load_base, trainable
from qlora_trainer.model.device.attention import PACKED, packed_attention
from qlora_trainer.model.loss import (
    FrozenHead,
    NextTokenLoss,
    call_arguments,
    end_to_end,
    head_is_plain,
    rows_are_apart,
)
from random_rows import random_rows
from tiny_models import CONFIGS

CPU = torch.device("cpu")
FLOAT32 = QuantizationSpec(type=QuantizationType.NONE, compute_type=ComputeType.FLOAT32)


def losses_of(module, rows):
    return module(*call_arguments(end_to_end(rows), CPU))


def with_random_adapter(path, quantization):
    model = add_lora(load_base(path, quantization, CPU), LoRASpec(rank=4, alpha=8), seed=1)
    generator = torch.Generator().manual_seed(3)
    for parameter in trainable(model).values():
        parameter.data.normal_(std=0.05, generator=generator)
    return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_row_has_the_losses_it_has_alone(name, tiny_models):
    model = with_random_adapter(tiny_models[name], FLOAT32)
    module = NextTokenLoss(model, fused=head_is_plain(model))
    rows = random_rows(40, 7, 90, 21)
    packed = losses_of(module, rows)
    alone = torch.cat([losses_of(module, [row]) for row in rows])
    torch.testing.assert_close(packed, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_equal_those_of_transformers_with_its_own_attention_and_head(name, tiny_models):
    reference = AutoModelForCausalLM.from_pretrained(
        tiny_models[name], dtype=torch.float32, attn_implementation="eager"
    )
    model = add_lora(load_base(tiny_models[name], FLOAT32, CPU), LoRASpec(), seed=1).eval()  # B is zero
    (row,) = random_rows(64)
    ours = losses_of(NextTokenLoss(model, fused=head_is_plain(model)), [row])
    theirs = functional.cross_entropy(reference.eval()(row[None]).logits[0, :-1].float(), row[1:], reduction="none")
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "opt", "gemma", "phi"])
def test_gradients_of_the_fused_head_equal_those_of_the_models_own_logits(name, tiny_models):
    gradients = []
    for fused in (True, False):
        model = with_random_adapter(tiny_models[name], FLOAT32)
        losses_of(NextTokenLoss(model, fused=fused), random_rows(30, 12)).sum().backward()
        gradients.append({n: p.grad for n, p in trainable(model).items()})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_models_that_keep_rows_apart_are_found_to(name, tiny_models):
    model = with_random_adapter(tiny_models[name], QuantizationSpec())
    assert rows_are_apart(NextTokenLoss(model, fused=head_is_plain(model)), CPU)


def test_a_model_whose_positions_count_through_all_rows_is_found_out(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=320, hidden_size=64, n_layer=2, n_head=4))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    model.bfloat16().save_pretrained(tmp_path)
    adapted = add_lora(load_base(tmp_path, QuantizationSpec(), CPU), LoRASpec(), seed=1)
    module = NextTokenLoss(adapted, fused=head_is_plain(adapted))
    assert not rows_are_apart(module, CPU)
    module.row_by_row = True
    assert rows_are_apart(module, CPU)


def test_a_class_that_refuses_rows_end_to_end_gets_them_by_themselves(tiny_models):
    assert not rows_are_apart(refusing(tiny_models, ValueError("rows")), CPU)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), MemoryError()])
def test_a_device_without_memory_is_no_class_that_refuses_rows(error, tiny_models):
    with pytest.raises(type(error)):
        rows_are_apart(refusing(tiny_models, error), CPU)


def test_what_is_wrong_with_a_row_alone_is_raised(tiny_models):
    with pytest.raises(ValueError, match="alone"):
        rows_are_apart(refusing(tiny_models, ValueError("alone"), alone=True), CPU)


def refusing(tiny_models, error, *, alone=False):
    """Return a model that raises an error where it is called with rows end to end, or always."""
    adapted = add_lora(load_base(tiny_models["gemma2"], FLOAT32, CPU), LoRASpec(), seed=1)

    def refuse(_, __, named):
        if alone or "cu_seq_lens_q" in named:
            raise error

    adapted.get_base_model().register_forward_pre_hook(refuse, with_kwargs=True)
    return NextTokenLoss(adapted, fused=False)


def test_rows_by_themselves_have_the_losses_and_gradients_of_rows_end_to_end(mixtures):
    found = []
    for row_by_row in (False, True):
        model = with_random_adapter(mixtures["mixtral"], FLOAT32)
        module = NextTokenLoss(model, fused=True, row_by_row=row_by_row)
        losses = losses_of(module, random_rows(30, 12, 7))
        losses.sum().backward()
        found.append((losses.detach(), {n: p.grad for n, p in trainable(model).items()}))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        pytest.param("llama", True, id="llama-head-is-plain"),
        pytest.param("opt", True, id="opt-tied-head-is-plain"),
        pytest.param("gemma2", False, id="gemma2-soft-caps-its-logits"),
    ],
)
def test_a_head_is_taken_apart_only_where_it_is_plain(name, plain, tiny_models):
    assert head_is_plain(add_lora(load_base(tiny_models[name], FLOAT32, CPU), LoRASpec(), seed=1)) is plain


def test_an_adapted_head_is_not_taken_apart(tiny_models):
    lora = LoRASpec(target_modules=["q_proj", "lm_head"])
    assert not head_is_plain(add_lora(load_base(tiny_models["llama"], FLOAT32, CPU), lora, seed=1))


def test_chunks_of_the_fused_head_do_not_change_losses_or_gradients(monkeypatch):
    torch.manual_seed(0)
    head = FrozenHead(torch.nn.Linear(16, 50).requires_grad_(requires_grad=False))
    labels = torch.randint(0, 50, (33,))
    results = []
    for logits_at_once in (1 << 20, 50 * 4):
        monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK", logits_at_once)
        hidden = torch.randn(33, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        losses = head(hidden, labels)
        (losses * torch.arange(33)).sum().backward()
        results.append((losses.detach(), hidden.grad))
    expected = functional.cross_entropy(functional.linear(hidden, head.weight, head.bias), labels, reduction="none")
    torch.testing.assert_close(results[0][0], expected.detach())
    torch.testing.assert_close(results[0], results[1])


def test_a_micro_batch_without_targets_costs_nothing_and_leaves_zero_gradients(tiny_models):
    model = with_random_adapter(tiny_models["llama"], FLOAT32)
    batch = end_to_end(random_rows(16))
    batch.labels.fill_(-100)
    loss = NextTokenLoss(model, fused=True)(*call_arguments(batch, CPU)).sum()
    loss.backward()
    assert loss.item() == 0.0
    assert all(torch.count_nonzero(p.grad) == 0 for p in trainable(model).values())


@pytest.mark.parametrize("window", [None, 5, 64], ids=["full", "sliding", "window-wider-than-rows"])
def test_packed_attention_is_the_block_diagonal_mask(window):
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    lengths = torch.tensor([11, 1, 20])
    total = int(lengths.sum())
    query, key, value = torch.randn(1, 4, total, 8), torch.randn(1, 2, total, 8), torch.randn(1, 2, total, 8)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    out, _ = packed_attention(
        module, query, key, value, None, cu_seq_lens_q=starts, max_length_q=20, scaling=0.3, sliding_window=window
    )
    row = torch.repeat_interleave(torch.arange(3), lengths)
    distance = torch.arange(total)[:, None] - torch.arange(total)[None]
    mask = (row[:, None] == row[None]) & (distance >= 0) & (distance < (window or total))
    keys, values = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    expected = functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_soft_capped_scores_keep_transformers_own_attention(tiny_models):
    def chosen(name):
        return load_base(tiny_models[name], FLOAT32, CPU).config._attn_implementation

    assert chosen("gemma2") == "eager"
    assert all(chosen(name) == PACKED for name in CONFIGS if name != "gemma2")
