"""The assistant's messages are learned with their end, each in the context in which it is written."""

from __future__ import annotations

import json
from itertools import groupby

import pytest

from qlora_trainer.data.formats import Encoder
from qlora_trainer.data.rendering.compiled_template import CLOCK, MARK_START, MARK_STOP
from qlora_trainer.data.rendering.service import serve
from qlora_trainer.errors import UserError

USER = {"role": "user", "content": "Q1"}
CHAT = [USER, {"role": "assistant", "content": "Blue."}, {"role": "user", "content": "Q2"}]
CHAT.append({"role": "assistant", "content": "Red."})
CALL = {"type": "function", "function": {"name": "w", "arguments": {"city": "Bern", "xs": [1, None, 2]}}}
WEATHER = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "7"},
    {"role": "assistant", "content": "7."},
]
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
TOOLS = (
    "{% if tools %}<|im_start|>system\nTOOLS {{ tools | tojson }}<|im_end|>\n{% endif %}"
    + TURN
    + "{% if m.tool_calls %}"
    "{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}" + ASK
)


@pytest.fixture
def learned(chat_tokenizer, dataset):
    """Encode messages with a template: for each example the text, what counts of it between ⟦ and ⟧."""

    def encode(messages, template=None, tools=None, tokenizer=chat_tokenizer):
        encoder = Encoder(tokenizer, dataset(format="Messages", chat_template=template))
        row = encoder.encode_batch([{"messages": messages, "tools": tools}])[0]
        return [marked(example, tokenizer) for example in row.examples], row

    return encode


def marked(example, tokenizer) -> str:
    pairs = zip(example.input_ids, example.targets, strict=True)
    runs = [(counts, tokenizer.decode([i for i, _ in run])) for counts, run in groupby(pairs, key=lambda pair: pair[1])]
    return "".join(text.join("⟦⟧") if counts else text for counts, text in runs)


PLAIN = (
    "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n⟦Blue.<|im_end|>⟧\n"
    "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n⟦Red.<|im_end|>⟧\n"
)
MARKED = "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}"

# ------------------------------------------------------------------------------------------------------------- marks


@pytest.mark.parametrize(
    "template",
    [
        pytest.param(
            TURN + MARKED + "{{ m.content }}<|im_end|>{% endif %}\n\n{% endfor %}" + ASK, id="around-what-is-written"
        ),
        pytest.param(
            "{% macro say(m) %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endmacro %}"
            + TURN
            + "{% if m.role == 'assistant' %}{{ say(m) }}{% else %}{{ m.content }}<|im_end|>{% endif %}\n\n{% endfor %}"
            + ASK,
            id="in-a-macro",
        ),
        pytest.param(
            TURN
            + "{% set said %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
            "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endset %}{{ said }}\n{% endfor %}" + ASK,
            id="in-a-set-block",
        ),
        pytest.param(
            TURN
            + "{% filter trim %}"
            + MARKED
            + "{{ m.content }}<|im_end|>{% endif %}{% endfilter %}\n\n{% endfor %}"
            + ASK,
            id="in-a-filter",
        ),
        pytest.param(
            "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<|im_start|>assistant\n"
            "{{ m.content }}<|im_end|>\n{% endgeneration %}{% else %}<|im_start|>{{ m.role }}\n"
            "{{ m.content }}<|im_end|>\n{% endif %}"
            "{% endfor %}" + ASK,
            id="around-the-header-too-which-the-model-is-given",
        ),
    ],
)
def test_what_is_learned_does_not_depend_on_how_a_template_marks_it(template, learned):
    assert learned(CHAT, template)[0] == [PLAIN]


@pytest.mark.parametrize(
    "template",
    [
        pytest.param(
            TURN + "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n\n{% endfor %}" + ASK, id="around-all"
        ),
        pytest.param(
            TURN
            + MARKED.replace("<|im_end|>{% endgen", "{% endgen").replace("%}{% else", "%}<|im_end|>{% else")
            + "{{ m.content }}<|im_end|>{% endif %}\n\n{% endfor %}"
            + ASK,
            id="without-the-end-token",
        ),
        pytest.param(
            TURN + "{% if m.role == 'user' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}"
            "{{ m.content }}<|im_end|>{% endif %}\n\n{% endfor %}" + ASK,
            id="around-the-user",
        ),
        pytest.param(
            "{% macro say(m) %}{% generation %}{{ m.content[1:] }}{% endgeneration %}{% endmacro %}"
            + TURN
            + "{% if m.role == 'assistant' %}{{ m.content[0] }}{{ say(m) }}{% else %}{{ m.content }}{% endif %}"
            "<|im_end|>\n{% endfor %}" + ASK,
            id="around-a-part-in-a-macro",
        ),
    ],
)
def test_marks_around_anything_else_are_refused_with_the_place(template, learned):
    with pytest.raises(UserError) as caught:
        learned(CHAT, template)
    message = str(caught.value)
    assert message.startswith(
        "spec.dataset.chatTemplate: this template, given row 1, marks other text than what the assistant writes as"
        ' message 2: {% generation %} … {% endgeneration %} must stand around all of that, its end "<|im_end|>"'
    )
    assert "Blue" not in message


def test_a_template_that_writes_what_others_say_into_the_answer_is_refused(learned):
    template = (
        TURN + "{{ m.content }}{% if m.role == 'assistant' %} ({{ messages[0].content }}){% endif %}<|im_end|>\n"
        "{% endfor %}" + ASK
    )
    with pytest.raises(UserError, match=r"writes what other messages or the row's tools say into message 2, which the"):
        learned(CHAT, template)


# --------------------------------------------------------------------------------------------------------- end tokens


def test_an_end_that_the_next_message_writes_is_learned_for_every_turn(learned, chat_tokenizer):
    """As GLM 4's: its user and observation tokens are end tokens."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}"
        "{{ m.tool_calls[0].function | tojson if m.tool_calls }}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    assert learned(CHAT, template)[0] == [
        "<|user|>\nQ1<|assistant|>\n⟦Blue.<|user|>⟧\nQ2<|assistant|>\n⟦Red.<|user|>⟧",
    ]
    assert "}⟦" not in learned(WEATHER, template)[0][0]
    assert learned(WEATHER, template)[0][0].endswith("}}<|tool|>⟧\n7<|assistant|>\n⟦7.<|user|>⟧")
    encoder_end = chat_tokenizer("<|user|>")["input_ids"]
    assert learned(CHAT, template)[1].examples[0].input_ids[-len(encoder_end) :] == encoder_end


def test_a_template_without_any_end_is_refused(learned):
    with pytest.raises(UserError, match="writes nothing after the assistant's answer, so the model would not learn to"):
        learned(CHAT, "{% for m in messages %}{{ m.content }}{% endfor %}")


def test_an_end_that_is_no_token_of_the_tokenizer_has_the_same_tokens_after_every_answer(byte_level, dataset):
    """ChatML on a base model that does not know its tokens."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level, eos_token="<eos>")
    template = TURN.replace("<|im_start|>", "<|begin|>") + "{{ m.content }}<|finish|>\n{% endfor %}"
    encoder = Encoder(tokenizer, dataset(format="Messages", chat_template=template))
    example = encoder.encode_batch([{"messages": [*CHAT[:3], {"role": "assistant", "content": "x <"}]}])[0].examples[0]
    ends = [
        tuple(i for i, _ in list(run)[-len(encoder.end) :])
        for counts, run in groupby(zip(example.input_ids, example.targets, strict=True), key=lambda pair: pair[1])
        if counts
    ]
    assert ends == [encoder.end] * 2
    assert tokenizer.decode(encoder.end) == "<|finish|>"


def test_the_end_of_a_prompt_is_the_learned_one(chat_tokenizer, tokenizer, dataset):
    assert Encoder(chat_tokenizer, dataset(format="Messages")).end == (chat_tokenizer.eos_token_id,)
    assert Encoder(tokenizer, dataset(format="Text")).end == (tokenizer.eos_token_id,)


# ------------------------------------------------------------------------------------------------------------ history

STRIPPING = (
    TURN + "{% if m.role=='assistant' and '</think>' in m.content and not loop.last %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    + ASK
)
OPENING = TURN + "{{ m.content }}<|im_end|>\n{% endfor %}" + ASK.replace("assistant\n", "assistant\n<think>\n")
THOUGHTS = [
    USER,
    {"role": "assistant", "content": "<think>\nR1\n</think>\n\nBlue."},
    {"role": "user", "content": "Q2"},
    {"role": "assistant", "content": "<think>\nR2\n</think>\n\nRed."},
]


def test_each_turn_is_learned_in_the_context_in_which_it_is_written(learned):
    texts, row = learned(THOUGHTS, STRIPPING)
    first = "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n"
    assert texts == [
        f"{first}⟦<think>\nR1\n</think>\n\nBlue.<|im_end|>⟧\n",
        (
            f"{first}Blue.<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n"
            "⟦<think>\nR2\n</think>\n\nRed.<|im_end|>⟧\n"
        ),
    ]
    assert (row.left_out, row.empty) == (0, 0)


def test_a_prompt_that_opens_a_thought_which_the_answer_does_not_is_refused_with_both_texts(learned):
    with pytest.raises(UserError) as caught:
        learned(CHAT, OPENING)
    assert (
        'ends its prompt for the assistant with "<think>\\n", where message 2 has "…<|im_end|>\\n": the model would be'
        " asked in another context than it learned in. Give the assistant's messages reasoning_content, or set"
    ) in str(caught.value)
    assert "Blue" not in str(caught.value)


def test_a_prompt_that_opens_a_thought_is_continued_by_the_thought(learned):
    """As the distilled R1 models, whose template leaves all thoughts out of what it renders."""
    template = OPENING.replace("m.content", "m.content.split('</think>')[-1]")
    texts, row = learned(THOUGHTS, template)
    first = "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n"
    assert texts[0] == f"{first}<think>\n⟦R1\n</think>\n\nBlue.<|im_end|>⟧\n"
    assert texts[1].endswith("<|im_start|>assistant\n<think>\n⟦R2\n</think>\n\nRed.<|im_end|>⟧\n")
    assert row.left_out == 0


def test_a_state_in_which_the_template_does_not_reason_is_used_for_answers_without(learned):
    template = TURN + (
        "{% if m.role == 'assistant' %}<think>{{ m.reasoning_content or '' }}</think>{% endif %}{{ m.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>"
        "{{ '</think>' if enable_thinking is defined and not enable_thinking else '\n' }}{% endif %}"
    )
    assert learned(CHAT[:2], template)[0] == [
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n<think></think>⟦Blue.<|im_end|>⟧\n"
    ]


# ------------------------------------------------------------------------------------------- what a template leaves out


@pytest.mark.parametrize("content", ["", None])
def test_a_message_of_which_the_template_writes_nothing_is_counted_and_not_learned(content, learned):
    texts, row = learned([WEATHER[0], {**WEATHER[1], "content": content}, *WEATHER[2:]])
    assert [text.count("⟦") for text in texts] == [1]
    assert texts[0].endswith("⟦7.<|im_end|>⟧\n")
    assert (row.empty, row.left_out) == (1, 1)


@pytest.mark.parametrize(
    "answer",
    [{"content": ""}, {"content": "  \n"}, {"content": "\u200b\ufeff"}, {"content": None, "tool_calls": []}],
)
def test_an_empty_answer_is_counted_and_not_learned(answer, learned):
    assert learned([USER, {"role": "assistant", **answer}])[0] == []
    texts, row = learned([USER, {"role": "assistant", **answer}, *CHAT[2:]])
    assert [text.count("⟦") for text in texts] == [1]
    assert row.empty == 1


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param({"content": "Blue.", "reasoning_content": "R1"}, id="in-a-field"),
        pytest.param({"content": "<think>\nR1\n</think>\n\nBlue."}, id="in-the-content"),
    ],
)
def test_reasoning_that_the_template_leaves_out_is_counted(answer, learned):
    template = TURN + "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}" + ASK
    texts, row = learned([USER, {"role": "assistant", **answer}], template)
    assert "R1" not in texts[0]
    assert texts[0].endswith("Blue.<|im_end|>⟧\n")
    assert (row.left_out, row.empty) == (1, 0)


def test_messages_of_others_that_the_template_leaves_out_are_counted(learned):
    template = (
        TURN.replace("messages", "messages if m.role != 'system'") + "{{ m.content }}<|im_end|>\n{% endfor %}" + ASK
    )
    _, row = learned([{"role": "system", "content": "Be brief."}, *CHAT], template)
    assert (row.left_out, row.empty) == (1, 0)


def test_a_message_of_weight_0_is_context(learned):
    texts, _ = learned([USER, {**CHAT[1], "weight": 0}, CHAT[2], {**CHAT[3], "weight": 1}])
    assert texts == [PLAIN.replace("⟦Blue.<|im_end|>⟧", "Blue.<|im_end|>")]


def all_but_weight_0(messages, encoder):
    [example] = encoder.encode_batch([{"messages": messages}])[0].examples
    return marked(example, encoder.tokenizer)


def test_a_message_of_weight_0_is_not_learned_where_all_is(chat_tokenizer, dataset):
    encoder = Encoder(chat_tokenizer, dataset(format="Messages", loss_on="All"))
    wrong = [USER, {**CHAT[1], "weight": 0}, CHAT[2], {**CHAT[3], "weight": 1}]
    text = PLAIN.replace("⟦", "").replace("⟧", "")
    after = text.partition("Blue.<|im_end|>\n")[2]
    assert all_but_weight_0(wrong, encoder) == (
        f"⟦<|im_start|>user\nQ1<|im_end|>\n⟧<|im_start|>assistant\nBlue.<|im_end|>\n⟦{after}⟧"
    )
    silent = [{**message, "weight": 0} for message in CHAT]
    assert encoder.encode_batch([{"messages": silent}])[0].examples[0].targets.count(True) == 0
    assert all_but_weight_0(CHAT, encoder) == f"⟦{text}⟧"


@pytest.mark.parametrize(
    "template",
    [
        pytest.param(
            "{% for m in messages %}{{ '<|im_start|>' if loop.last }}{{ m.content }}<|im_end|>{% endfor %}",
            id="another-text-once-others-follow",
        ),
        pytest.param(
            "{% for m in messages %}{% if not loop.last %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}",
            id="with-the-next-message",
        ),
    ],
)
def test_a_message_of_weight_0_that_cannot_be_told_apart_is_refused_where_all_is_learned(
    template, chat_tokenizer, dataset
):
    encoder = Encoder(chat_tokenizer, dataset(format="Messages", loss_on="All", chat_template=template))
    with pytest.raises(UserError, match="row 1, writes message 2, which has weight 0, otherwise once others follow"):
        encoder.encode_batch([{"messages": [USER, {**CHAT[1], "weight": 0}, *CHAT[2:]]}])


def test_characters_that_mark_spans_are_a_rows_own_where_the_template_has_no_marks(learned):
    answer = f"a{MARK_START}b{MARK_STOP}"
    assert f"⟦{answer}<|im_end|>⟧" in learned([USER, {"role": "assistant", "content": answer}])[0][0]


def test_tools_and_tool_calls_reach_the_template(learned):
    tools = [{"type": "function", "function": {"name": "w", "parameters": {"type": "object", "properties": {}}}}]
    texts, row = learned(WEATHER, TOOLS, tools=tools)
    assert texts[0].startswith(f"<|im_start|>system\nTOOLS {json.dumps(tools)}<|im_end|>\n")
    assert f"assistant\n⟦{json.dumps(CALL['function'])}<|im_end|>⟧\n" in texts[0]
    assert (row.left_out, row.empty) == (0, 0)


def test_a_template_that_wants_parts_is_given_parts(learned):
    template = TURN + "{{ m.content[0]['text'] }}<|im_end|>\n{% endfor %}" + ASK
    assert learned(CHAT, template)[0] == [PLAIN]


# ----------------------------------------------------------------------------------------------------- tokens and clock


def test_the_first_learned_token_can_follow_the_tokens_of_the_prompt(chat_tokenizer, dataset):
    """No token reaches over the end of a generation prompt that ends with a space or a new line."""
    for ending, answer in ((" ", "return the value"), ("\n", "\n\nreturn")):
        template = TURN.replace("}}\n", f"}}}}:{ending}") + "{{ m.content }}<|im_end|>\n{% endfor %}"
        template += ASK.replace("assistant\n", f"assistant:{ending}")
        encoder = Encoder(chat_tokenizer, dataset(format="Messages", chat_template=template))
        example = encoder.encode({"messages": [USER, {"role": "assistant", "content": answer}]})
        prompt = encoder.prompt("Q1")
        assert example.input_ids[: len(prompt)] == prompt
        assert example.targets.index(True) == len(prompt)


def test_a_template_that_calls_the_clock_gives_the_same_tokens_on_any_day(learned, chat_tokenizer, dataset):
    template = "{{ strftime_now('%d %B %Y') }}" + TURN + "{{ m.content }}<|im_end|>\n{% endfor %}" + ASK
    assert learned(CHAT, template)[0] == [f"{CLOCK:%d %B %Y}{PLAIN}"]
    notes = Encoder(chat_tokenizer, dataset(format="Messages", chat_template=template)).notes()
    assert notes == [f"the chat template calls the clock, which stands at {CLOCK:%Y-%m-%d %H:%M}"]


def test_a_template_that_draws_at_random_gives_the_same_tokens_each_time(learned, chat_tokenizer, dataset):
    template = "{{ range(9999) | random }}" + TURN + "{{ m.content }}<|im_end|>\n{% endfor %}" + ASK
    assert learned(CHAT, template)[0] == [f"0{PLAIN}"]
    notes = Encoder(chat_tokenizer, dataset(format="Messages", chat_template=template)).notes()
    assert notes == ["the chat template draws at random: it always gets the first of what it draws from"]
    with pytest.raises(UserError, match="'lipsum' is undefined"):
        learned(CHAT, template.replace("range(9999) | random", "lipsum(1)"))


def test_what_a_template_raises_is_told_without_the_rows_text(learned):
    template = "{% for m in messages %}{% if m.content == 'Q2' %}{{ raise_exception('bad: ' + m.content) }}{% endif %}"
    with pytest.raises(UserError, match=r"fails on row 1: TemplateError: bad: … \(line 1 of the template\)"):
        learned(CHAT, template + "{{ m.content }}<|im_end|>{% endfor %}")
    with pytest.raises(UserError, match=r"fails on row 1: UndefinedError \(line 1 of the template\)"):
        learned(CHAT, "{% for m in messages %}{{ {}[m.content].text }}<|im_end|>{% endfor %}")


ROW_TEXT = "Zebra"
FAILING = {
    "{{ 'x'.encode(said) }}": "LookupError",
    "{{ 'x'.encode('utf-8', said).decode('ascii') ~ 'é'.encode('ascii', said) }}": "LookupError",
    "{{ {'a': 1}[said].x }}": "UndefinedError",
    "{{ {'a': 1}.a[said].x }}": "UndefinedError",
    "{{ messages | map(said) | list }}": "TemplateRuntimeError",
    "{{ messages | select(said) | list }}": "TemplateRuntimeError",
    "{{ messages | map(attribute=said) | map('upper') | sum }}": "TypeError",
    "{{ '{' ~ said ~ '}' | format }}{{ ('{' ~ said ~ '}').format() }}": "KeyError",
    "{{ ('%(' ~ said ~ ')s') % {} }}": "KeyError",
    "{{ [1].index(said) }}": "ValueError",
    "{{ (said ~ '\\ud800').encode() }}": "UnicodeEncodeError",
    "{{ said.nothing.more }}": "UndefinedError: 'str object' has no attribute 'nothing'",
    "{{ raise_exception(said) }}": "TemplateError: …",
    "{{ raise_exception([said]) }}": "TemplateError: …",
    "{{ raise_exception('bad row: ' ~ said) }}": "TemplateError: bad row: …",
    "{{ raise_exception('bad row') }}": "TemplateError: bad row",
    "{{ namespace(**{'_' ~ said: 1}) }}": "SecurityError",
    "{{ dict(**{said: 1}).fromkeys(said, said, said) }}": "TypeError",
}


@pytest.mark.parametrize("failing", FAILING)
@pytest.mark.parametrize("quote", ["", "'", '"', "' has no attribute 'role"], ids=["no", "one", "two", "jinjas"])
def test_no_error_of_a_template_has_text_of_the_row(failing, quote):
    template = "{% set said = messages[0].content %}" + failing
    answer = serve({"template": template, "variables": {}, "tool_template": None, "tokens": [], "special": []})(
        {"prompt": [{"role": "user", "content": f"{ROW_TEXT}{quote}"}]}
    )
    assert answer == {"failed": f"{FAILING[failing]} (line 1 of the template)"}


def test_a_row_of_which_a_template_makes_too_much_text_is_refused_by_name(learned):
    template = TURN + "{{ m.content * (6_000_000 if m.content == 'Blue.' else 1) }}<|im_end|>\n{% endfor %}" + ASK
    with pytest.raises(UserError, match=r"this template, given row 1, writes more than 16 MiB, the most that a row"):
        learned(CHAT, template)
