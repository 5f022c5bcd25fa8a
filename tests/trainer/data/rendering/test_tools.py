"""Tools of a row reach the model as its template gives them, or are counted as left out."""

from __future__ import annotations

import pytest

from qlora_trainer.data.formats import Encoder
from qlora_trainer.errors import UserError

CHAT = [{"role": "user", "content": "Search the weather"}, {"role": "assistant", "content": "7."}]
CITY = {"type": "string", "description": "The city.\nWithout its country."}
FUNCTION = {
    "name": "search",
    "description": "Look it up",
    "parameters": {"type": "object", "properties": {"city": CITY}},
}
TOOLS = [{"type": "function", "function": FUNCTION}]
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + ASK


@pytest.fixture
def encode(chat_tokenizer, dataset):
    def encoded(templates, tools, **fields):
        chat_tokenizer.chat_template = templates
        encoder = Encoder(chat_tokenizer, dataset(format="Messages", **fields))
        return encoder.encode_batch([{"messages": CHAT, "tools": tools}])[0], encoder

    return encoded


@pytest.mark.parametrize(
    ("writes", "tools"),
    [
        pytest.param("{{ tools | tojson }}", TOOLS, id="json"),
        pytest.param("{{ tools | tojson }}", [FUNCTION], id="functions-alone"),
        pytest.param(
            "{% for t in tools %}// {{ t.function.description }}\n{{ t.function.name }}("
            "{% for k, v in t.function.parameters.properties.items() %}{{ k }}: {{ v.type }} // "
            "{{ v.description | replace('\n', '\n  // ') }}{% endfor %}){% endfor %}",
            TOOLS,
            id="signatures",
        ),
    ],
)
@pytest.mark.parametrize("loss_on", ["Assistant", "All"])
def test_tools_that_the_template_writes_are_seen(writes, tools, loss_on, encode):
    row, encoder = encode(f"{{% if tools %}}{writes}{{% endif %}}{TURNS}", tools, loss_on=loss_on)
    assert (row.tools, row.left_out, encoder.notes()) == (True, 0, [])


@pytest.mark.parametrize(
    ("writes", "tools"),
    [
        pytest.param("", TOOLS, id="all"),
        pytest.param("", [{"name": "weather"}], id="all-though-their-name-is-said"),
        pytest.param("{{ tools[0].function.name }}", TOOLS, id="all-but-the-name"),
        pytest.param("{{ tools[0] | tojson }}", [*TOOLS, {"name": "other"}], id="the-second"),
    ],
)
@pytest.mark.parametrize("loss_on", ["Assistant", "All"])
def test_tools_that_the_template_leaves_out_are_counted(writes, tools, loss_on, encode):
    row, encoder = encode(f"{{% if tools %}}{writes}{{% endif %}}{TURNS}", tools, loss_on=loss_on)
    assert (row.tools, row.left_out) == (False, 1)
    assert encoder.notes() == [
        "the chat template leaves out tools of rows, or parts of them: these are counted as leftOut"
    ]


NAMED = {"default": TURNS, "tool_use": f"{{{{ tools | tojson }}}}{TURNS}"}


def test_rows_with_tools_are_rendered_with_the_tokenizers_template_for_tools(encode, chat_tokenizer):
    for tools in (TOOLS, None):
        row, encoder = encode(NAMED, tools)
        expected = chat_tokenizer.apply_chat_template(CHAT, tools=tools, tokenize=False)
        assert chat_tokenizer.decode(row.examples[0].input_ids) == expected
        assert (row.tools, row.left_out, encoder.chat_template) == (bool(tools), 0, TURNS)


def test_the_manifests_template_is_for_rows_with_tools_too(encode, chat_tokenizer):
    row, _ = encode(NAMED, TOOLS, chat_template=f"<bos>{TURNS}")
    assert chat_tokenizer.decode(row.examples[0].input_ids).startswith("<bos><|im_start|>user\nSearch")


def test_a_template_for_tools_that_does_not_parse_is_refused(encode):
    with pytest.raises(UserError, match=r"the model's own template does not parse: .*line 1"):
        encode({**NAMED, "tool_use": "{% if"}, None)


def test_a_tokenizer_whose_templates_have_other_names_is_told_apart_from_one_without(encode):
    with pytest.raises(UserError) as caught:
        encode({"rag": TURNS, "tool_use": TURNS}, TOOLS)
    assert str(caught.value) == (
        "spec.dataset.chatTemplate: is needed: the model's tokenizer has several chat templates (rag, tool_use) and"
        " none of them is named default. Set the text of the one that is meant"
    )
