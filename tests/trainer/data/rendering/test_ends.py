"""Every turn of the assistant ends with a token that ends it, whatever the turn is made of."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from qlora_trainer.data.formats import Encoder
from qlora_trainer.errors import UserError
from qlora_trainer.model.tokenizer import load_tokenizer

USER = {"role": "user", "content": "Weather?"}
CALL = {"type": "function", "function": {"name": "w", "arguments": {"city": "Bern"}}}
CALLING = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
REASONING = [USER, {"role": "assistant", "content": "", "reasoning_content": "R1"}]
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def with_case(condition: str, written: str) -> str:
    """ChatML with another text for some messages."""
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m."
        f"{condition} %}}{written}{{% else %}}{{{{ m.content }}}}<|im_end|>\n{{% endif %}}{{% endfor %}}{ASK}"
    )


CALLS = "<tool_call>{{ m.tool_calls[0].function | tojson }}</tool_call>"
THOUGHT = with_case("reasoning_content", "<think>{{ m.reasoning_content }}</think>\n")


@pytest.fixture
def counted(byte_level, dataset, tmp_path):
    """Encode a conversation as a tokenizer from disk does: the text that counts."""

    def encode(messages, template, special=()) -> str:
        made = PreTrainedTokenizerFast(tokenizer_object=byte_level, eos_token="<|im_end|>")
        made.add_special_tokens({"additional_special_tokens": list(special)})
        made.add_tokens(["<tool_call>", "</tool_call>", "<think>"])
        made.save_pretrained(tmp_path)
        tokenizer = load_tokenizer(tmp_path)
        encoder = Encoder(tokenizer, dataset(format="Messages", chat_template=template))
        [example] = encoder.encode_batch([{"messages": messages}])[0].examples
        return tokenizer.decode([i for i, counts in zip(example.input_ids, example.targets, strict=True) if counts])

    return encode


@pytest.mark.parametrize(
    ("messages", "template", "special"),
    [
        pytest.param(CALLING, with_case("tool_calls", f"{CALLS}\n"), (), id="tool-calls"),
        pytest.param(CALLING, with_case("tool_calls", CALLS), ("</tool_call>",), id="that-a-special-token-closes"),
        pytest.param(
            CALLING, with_case("tool_calls", f"{CALLS}<|tool_call_end|>"), ("<|tool_call_end|>",), id="of-another-form"
        ),
        pytest.param(REASONING, THOUGHT, (), id="reasoning"),
        pytest.param(REASONING, THOUGHT, ("<think>", "</think>"), id="that-special-tokens-enclose"),
    ],
)
def test_a_turn_without_end_token_is_refused(messages, template, special, counted):
    with pytest.raises(UserError) as caught:
        counted(messages, template, special)
    assert str(caught.value) == (
        "spec.dataset.chatTemplate: this template, given row 1, writes no end token after message 2, where a plain"
        ' answer ends with "<|im_end|>", so the model would not learn to stop there: write that end after every message'
        " of the assistant"
    )


@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_end|>\n", "<|eom_id|>\n"])
def test_a_turn_of_tool_calls_may_end_with_another_special_token(end, counted):
    """As Llama 3.1's ``<|eom_id|>`` and gpt-oss's ``<|call|>``."""
    text = counted(CALLING, with_case("tool_calls", f"{CALLS}{end}"), ("<|eom_id|>",))
    assert text == f'<tool_call>{{"name": "w", "arguments": {{"city": "Bern"}}}}</tool_call>{end.rstrip()}'
