"""Every turn of the assistant ends with a token that ends it, whatever the turn is made of."""

from __future__ import annotations

import json

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


LINES = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
ASK_LINE = "{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.mark.parametrize("loss_on", ["Assistant", "All"])
@pytest.mark.parametrize("end", ["\n", "\n###\n"])
def test_an_answer_that_contains_its_end_is_refused_where_that_is_a_text_like_others(
    end, loss_on, chat_tokenizer, dataset
):
    settings = dataset(format="Messages", chat_template=LINES.replace("\n", end) + ASK_LINE, loss_on=loss_on)
    encoder = Encoder(chat_tokenizer, settings)
    texts = ("One.", f"One.{end}", f"One.{end}Two.")
    rows = [{"messages": [USER, {"role": "assistant", "content": text}]} for text in texts]
    assert chat_tokenizer.decode(encoder.encode(rows[0]).input_ids).endswith(f"assistant: One.{end}")
    with pytest.raises(UserError) as caught:
        encoder.encode_batch(rows)
    assert str(caught.value) == (
        f"spec.dataset.chatTemplate: this template, given row 3, ends an answer with {json.dumps(end.rstrip() or end)},"
        " which is no special token, and message 2 contains that, so the model would not learn where to stop: write an"
        " end token there, such as {{ eos_token }}"
    )


@pytest.mark.parametrize(
    ("template", "noted"),
    [(LINES.replace("\n", "<|im_end|>"), ["assistant: "]), (LINES.replace("\n", "<|im_end|>") + ASK_LINE, [])],
)
def test_a_beginning_of_the_turn_that_is_learned_is_told(template, noted, chat_tokenizer, dataset):
    encoder = Encoder(chat_tokenizer, dataset(format="Messages", chat_template=template))
    encoder.encode({"messages": [USER, {"role": "assistant", "content": "One."}]})
    assert encoder.notes() == [
        f"the chat template adds nothing for add_generation_prompt: what begins the assistant's turn, {opening!r}, is"
        " learned with each answer"
        for opening in noted
    ]


def test_a_template_without_a_beginning_of_the_turn_has_nothing_to_tell(chat_tokenizer, dataset):
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    assert Encoder(chat_tokenizer, dataset(format="Messages", chat_template=template)).notes() == []


@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_end|>\n", "<|eom_id|>\n"])
def test_a_turn_of_tool_calls_may_end_with_another_special_token(end, counted):
    """As Llama 3.1's ``<|eom_id|>`` and gpt-oss's ``<|call|>``."""
    text = counted(CALLING, with_case("tool_calls", f"{CALLS}{end}"), ("<|eom_id|>",))
    assert text == f'<tool_call>{{"name": "w", "arguments": {{"city": "Bern"}}}}</tool_call>{end.rstrip()}'
