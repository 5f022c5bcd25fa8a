"""Nothing that others say is learned, whichever part of it a template writes into the assistant's messages."""

from __future__ import annotations

import re

import pytest

from qlora_trainer.data.formats import Encoder
from qlora_trainer.errors import UserError

ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHAT = [
    {"role": "system", "content": "Topic: geography. Be brief."},
    {"role": "user", "content": "哪座城市是首都: Bern or Basel?"},
    {"role": "assistant", "content": "Bern.", "reasoning_content": "Capital."},
    {"role": "user", "content": "And 25 + 17?"},
    {"role": "assistant", "content": "42."},
]
CITY = {"type": "string", "description": "Of the town"}
SEARCH = {"name": "search", "description": "Look it up", "parameters": {"type": "object", "properties": {"city": CITY}}}
TOOLS = [{"type": "function", "function": SEARCH}]


def with_answer(written: str, content: str = "m.content") -> str:
    """ChatML whose answers have something more at their end."""
    return (
        f"{{{{ tools | tojson if tools }}}}{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{{{{ {content} }}}}"
        f"{{% if m.role == 'assistant' %}}{written}{{% endif %}}<|im_end|>\n{{% endfor %}}{ASK}"
    )


@pytest.fixture
def encode(chat_tokenizer, dataset):
    def encoded(template, tools=None):
        encoder = Encoder(chat_tokenizer, dataset(format="Messages", chat_template=template))
        return encoder.encode_batch([{"messages": CHAT, "tools": tools}])[0]

    return encoded


@pytest.mark.parametrize(
    ("template", "tools", "message"),
    [
        pytest.param(with_answer(" ({{ messages[1].content[:6] }})"), None, 3, id="the-first-characters"),
        pytest.param(with_answer(" ({{ messages[1].content[10:15] | upper }})"), None, 3, id="a-word-in-capitals"),
        pytest.param(with_answer(" ({{ messages[0].content.split('Topic: ')[1][:9] }})"), None, 3, id="after-a-key"),
        pytest.param(
            with_answer("{{ messages[-2].content[4:6] }}"),
            None,
            3,
            id="digits",
        ),
        pytest.param(
            with_answer(" ({{ messages[1].content[0].text[:6] }})", "m.content[0].text"), None, 3, id="a-part-of-parts"
        ),
        pytest.param(with_answer(" ({{ messages[0].content[0].text }})", "m.content[0].text"), None, 3, id="parts"),
        pytest.param(
            with_answer("{% if not loop.first and loop.index > 3 %}{{ messages[2].content[:3] }}{% endif %}"),
            None,
            5,
            id="an-earlier-answer",
        ),
        pytest.param(
            with_answer("{% if loop.index > 3 %}{{ messages[2].reasoning_content }}{% endif %}"),
            None,
            5,
            id="earlier-reasoning",
        ),
        pytest.param(with_answer("{{ tools | tojson }}"), TOOLS, 3, id="tools"),
        pytest.param(with_answer("{{ tools[0].function.name if tools }}"), TOOLS, 3, id="a-tools-name"),
        pytest.param(
            with_answer("{{ (tools | last).description[:4] if tools }}"), [SEARCH], 3, id="a-tools-description"
        ),
        pytest.param(
            with_answer("{{ tools[1].parameters.properties.city.description[:5] if tools }}"),
            [{"name": "x"}, SEARCH],
            3,
            id="deep",
        ),
    ],
)
def test_a_template_that_writes_a_part_of_what_others_say_into_an_answer_is_refused(template, tools, message, encode):
    refusal = (
        f"writes what other messages or the row's tools say into message {message}, which the assistant is to learn"
    )
    with pytest.raises(UserError, match=re.escape(refusal)):
        encode(template, tools)


@pytest.mark.parametrize(
    "written",
    [
        pytest.param("{% if 'Topic' in messages[0].content %} geography{% endif %}", id="by-a-word"),
        pytest.param("{% if messages[1].content[0] > 'a' %} yes{% endif %}", id="by-a-letter"),
        pytest.param("{% if 'Bern' in messages[1].content %} Basel{% else %} Zug{% endif %}", id="by-a-choice"),
    ],
)
def test_a_template_may_decide_by_what_others_say(written, encode):
    assert encode(with_answer(written)).examples
    assert encode(with_answer(written), TOOLS).examples
