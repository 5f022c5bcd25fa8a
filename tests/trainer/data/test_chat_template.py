from __future__ import annotations

import json

import pytest
from transformers import PreTrainedTokenizerFast

from qlora_trainer.data.formats import Encoder
from qlora_trainer.errors import UserError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "    def f():\n        return 1"},
    {"role": "assistant", "content": "   indented 🙂\n\n   text 🙂"},
    {"role": "user", "content": "assistant\n"},
    {"role": "assistant", "content": "Yes.  "},
]
ANSWERS = ["   indented 🙂\n\n   text 🙂<|im_end|>", "Yes.  <|im_end|>"]


def runs(encoded, tokenizer) -> list[str]:
    """The stretches that count, as text."""
    found, current = [], []
    for token, counts in zip(encoded.input_ids, encoded.targets, strict=True):
        if counts:
            current.append(token)
        elif current:
            found.append(tokenizer.decode(current))
            current = []
    return [*found, *([tokenizer.decode(current)] if current else [])]


def test_marked_templates_count_what_they_mark(chat_tokenizer, chatml, chatml_marked, dataset):
    encoded = Encoder(chat_tokenizer, dataset(format="Messages", chat_template=chatml_marked)).encode(
        {"messages": CHAT}
    )
    assert runs(encoded, chat_tokenizer) == ANSWERS
    unmarked = chat_tokenizer.apply_chat_template(CHAT, chat_template=chatml, tokenize=False)
    assert chat_tokenizer.decode(encoded.input_ids) == unmarked


def test_unmarked_templates_count_what_each_assistant_turn_adds(chat_tokenizer, dataset):
    encoded = Encoder(chat_tokenizer, dataset(format="Messages")).encode({"messages": CHAT})
    assert runs(encoded, chat_tokenizer) == ANSWERS
    assert chat_tokenizer.decode(encoded.input_ids) == chat_tokenizer.apply_chat_template(CHAT, tokenize=False)


def test_tokens_that_count_are_found_with_a_tokenizer_that_puts_a_space_first(begin_tokenizer, chatml_marked, dataset):
    encoded = Encoder(begin_tokenizer, dataset(format="Messages", chat_template=chatml_marked)).encode(
        {"messages": [{"role": "user", "content": "return"}, {"role": "assistant", "content": "the value"}]}
    )
    counted = [token for token, counts in zip(encoded.input_ids, encoded.targets, strict=True) if counts]
    assert begin_tokenizer.convert_ids_to_tokens(counted) == ["the▁", "value", "<|im_end|>"]
    assert (
        encoded.input_ids
        == begin_tokenizer(
            "<|im_start|>user\nreturn<|im_end|>\n<|im_start|>assistant\nthe value<|im_end|>\n", add_special_tokens=False
        )["input_ids"]
    )


def test_all_of_a_conversation_counts_on_request(chat_tokenizer, dataset):
    encoded = Encoder(chat_tokenizer, dataset(format="Messages", loss_on="All")).encode({"messages": CHAT})
    assert all(encoded.targets)


def test_a_conversation_without_the_assistant_counts_nothing(chat_tokenizer, chatml_marked, dataset):
    for template in (None, chatml_marked):
        encoder = Encoder(chat_tokenizer, dataset(format="Messages", chat_template=template))
        assert not any(encoder.encode({"messages": CHAT[:2]}).targets)


def test_messages_as_json_text_are_the_same_as_a_list(chat_tokenizer, dataset):
    encoder = Encoder(chat_tokenizer, dataset(format="Messages"))
    assert encoder.encode({"messages": json.dumps(CHAT)}) == encoder.encode({"messages": CHAT})


def test_keys_that_only_arrow_put_there_are_not_seen_by_the_template(chat_tokenizer, chatml, dataset):
    template = "{% for m in messages %}{% if m.tool_calls is defined %}CALL{% endif %}{% endfor %}" + chatml
    encoder = Encoder(chat_tokenizer, dataset(format="Messages", chat_template=template))
    filled = [{**message, "tool_calls": None} for message in CHAT]
    assert encoder.encode({"messages": filled}) == encoder.encode({"messages": CHAT})


def test_a_message_of_tool_calls_needs_no_content(chat_tokenizer, dataset):
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content or m.tool_calls | tojson }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    encoder = Encoder(chat_tokenizer, dataset(format="Messages", chat_template=template))
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    encoded = encoder.encode({"messages": [{"role": "user", "content": "?"}, call]})
    assert runs(encoded, chat_tokenizer) == ['[{"name": "f"}]<|im_end|>']


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}<think></think>"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns_gives_an_example_for_each(chat_tokenizer, dataset):
    encoder = Encoder(chat_tokenizer, dataset(format="Messages", chat_template=THINKING))
    first, second = encoder.encode_batch([{"messages": CHAT}])[0].examples
    assert runs(first, chat_tokenizer) == [f"<think></think>{ANSWERS[0]}"]
    assert runs(second, chat_tokenizer) == [f"<think></think>{ANSWERS[1]}"]
    for example, turns in ((first, 3), (second, 5)):
        text = chat_tokenizer.apply_chat_template(CHAT[:turns], chat_template=THINKING, tokenize=False)
        assert chat_tokenizer.decode(example.input_ids) == text


def test_an_unmarked_conversation_that_starts_with_the_assistant_is_refused(chat_tokenizer, dataset):
    with pytest.raises(UserError, match="given row 4, has no text before the assistant's first message"):
        Encoder(chat_tokenizer, dataset(format="Messages")).encode({"messages": CHAT[2:]}, number=4)


@pytest.mark.parametrize(
    ("template", "want"),
    [
        pytest.param(
            "{% if messages[0].role != 'user' %}{{ raise_exception('start with user') }}{% endif %}",
            "this template fails on row 3: TemplateError: start with user",
            id="raised-by-the-template",
        ),
        pytest.param(
            "{{ messages[0].name.first }}",
            "this template fails on row 3: UndefinedError: 'dict object' has no attribute 'name'",
            id="undefined-name",
        ),
        pytest.param(
            "{{ messages[0].content + 1 }}",
            "this template fails on row 3: TypeError (line 1 of the template)",
            id="python-error",
        ),
        pytest.param(
            "{% generation %}{{ messages[0].content / 0 }}{% endgeneration %}",
            "this template fails on row 3: TypeError (line 1 of the template)",
            id="inside-the-marks",
        ),
    ],
)
def test_a_template_that_fails_names_the_row_and_jinjas_message(template, want, chat_tokenizer, dataset):
    encoder = Encoder(chat_tokenizer, dataset(format="Messages", chat_template=template))
    with pytest.raises(UserError) as caught:
        encoder.encode({"messages": CHAT}, number=3)
    assert str(caught.value).startswith(f"spec.dataset.chatTemplate: {want}")


def test_a_template_that_does_not_parse_is_refused_before_any_row(chat_tokenizer, dataset):
    with pytest.raises(
        UserError, match=r"^spec\.dataset.chatTemplate: this template does not parse: Encountered unknown"
    ):
        Encoder(chat_tokenizer, dataset(format="Messages", chat_template="{% fore m in messages %}"))


def test_no_template_at_all_says_what_to_do(tokenizer, dataset):
    with pytest.raises(
        UserError, match=r"^spec\.dataset.chatTemplate: is needed: the model's tokenizer has no chat tem"
    ):
        Encoder(tokenizer, dataset(format="Messages"))


def test_the_manifests_template_wins_over_the_tokenizers(chat_tokenizer, dataset):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    encoder = Encoder(chat_tokenizer, dataset(format="Messages", chat_template=template, loss_on="All"))
    assert encoder.chat_template == template
    assert chat_tokenizer.decode(encoder.encode({"messages": CHAT[:1]}).input_ids) == "system: Be brief.\n"


def test_of_several_templates_of_a_tokenizer_the_default_one_is_used(byte_level, chatml, dataset):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level, chat_template={"default": chatml, "rag": "x"})
    assert Encoder(tokenizer, dataset(format="Messages")).chat_template == chatml
