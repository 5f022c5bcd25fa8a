"""Answers stop at the end that was learned, which need not be a token of the tokenizer."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qlora_trainer.generate import complete


def test_an_answer_stops_before_the_tokens_that_answers_were_taught_to_end_with():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, eos_token_id=31
    )
    model = LlamaForCausalLM(config).eval()
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(32)}, "w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w31")
    whole = complete(model, tokenizer, [1, 2], 12, sample=False).split()
    assert len(whole) == 12
    end = tuple(int(word[1:]) for word in whole[4:6])
    first = next(i for i in range(12) if whole[i : i + 2] == whole[4:6])
    assert complete(model, tokenizer, [1, 2], 12, sample=False, end=end).split() == whole[:first]
