"""Count what a template leaves out of a conversation; learn no silence, also where all is learned."""

from __future__ import annotations

from itertools import groupby

import pytest

from qlora_trainer.data.formats import Encoder

USER = {"role": "user", "content": "Q1"}
CHAT = [USER, {"role": "assistant", "content": "Blue."}, {"role": "user", "content": "Q2"}]
CHAT.append({"role": "assistant", "content": "Red."})
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
CALLS = (
    TURN + "{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}WRITTEN{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}" + ASK
)


def marked(example, tokenizer) -> str:
    """The text, what counts of it between ⟦ and ⟧."""
    pairs = zip(example.input_ids, example.targets, strict=True)
    runs = [(counts, tokenizer.decode([i for i, _ in run])) for counts, run in groupby(pairs, key=lambda pair: pair[1])]
    return "".join(text.join("⟦⟧") if counts else text for counts, text in runs)


LAST_TWO = TURN.replace("messages", "messages[-2:]") + "{{ m.content }}<|im_end|>\n{% endfor %}"
NO_DEVELOPER = TURN.replace("messages", "messages if m.role != 'developer'") + "{{ m.content }}<|im_end|>\n{% endfor %}"
LAST_ANSWER = TURN.replace("messages", "messages if m.role != 'assistant' or m == messages[-1]")
LAST_ANSWER += "{{ m.content }}<|im_end|>\n{% endfor %}"
TWICE = [USER, {"role": "assistant", "content": "Q"}, CHAT[2], CHAT[3]]


@pytest.mark.parametrize(
    "arguments", [{"city": "Bern", "ok": True, "z": None}, '{"city": "Bern", "ok": true, "z": null}']
)
@pytest.mark.parametrize("written", ["{{ f.arguments }}", "{{ f.name ~ f.arguments }}", "{{ f.arguments | tojson }}"])
def test_arguments_are_learned_as_json_however_a_template_writes_them(written, arguments, chat_tokenizer, dataset):
    if "tojson" in written and isinstance(arguments, str):
        pytest.skip("the template would quote the text")
    template = CALLS.replace("WRITTEN", "{{ f.name }} " + written)
    encoder = Encoder(chat_tokenizer, dataset(format="Messages", chat_template=template))
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    [row] = encoder.encode_batch([{"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}])
    assert '{"city": "Bern", "ok": true, "z": null}' in marked(row.examples[0], chat_tokenizer)


@pytest.mark.parametrize("loss_on", ["Assistant", "All"])
@pytest.mark.parametrize(
    ("messages", "template", "left_out"),
    [
        pytest.param([{"role": "developer", "content": "Be brief."}, *CHAT], NO_DEVELOPER, 1, id="developer"),
        pytest.param([{"role": "developer", "content": "Blue"}, *CHAT], NO_DEVELOPER, 1, id="what-is-said-again"),
        pytest.param(CHAT, LAST_ANSWER, 1, id="earlier-answers"),
        pytest.param(TWICE, LAST_ANSWER, 1, id="an-earlier-answer-whose-text-is-said-again"),
        pytest.param(CHAT, NO_DEVELOPER, 0, id="nothing"),
    ],
)
def test_messages_that_a_template_drops_are_counted_whatever_is_learned(
    loss_on, messages, template, left_out, chat_tokenizer, dataset
):
    encoder = Encoder(chat_tokenizer, dataset(format="Messages", loss_on=loss_on, chat_template=template + ASK))
    [row] = encoder.encode_batch([{"messages": messages}])
    assert (row.left_out, row.empty) == (left_out, 0)


def test_messages_before_the_last_two_that_a_template_drops_are_counted_where_all_is_learned(chat_tokenizer, dataset):
    encoder = Encoder(chat_tokenizer, dataset(format="Messages", loss_on="All", chat_template=LAST_TWO))
    [row] = encoder.encode_batch([{"messages": CHAT}])
    assert (row.left_out, row.empty) == (2, 0)


def with_call(arguments):
    call = {"type": "function", "function": {"name": "w", "arguments": arguments}}
    said = {"role": "assistant", "content": "", "tool_calls": [call]}
    return [USER, said, {"role": "tool", "content": "8"}, {"role": "assistant", "content": "Warm."}]


@pytest.mark.parametrize("loss_on", ["Assistant", "All"])
@pytest.mark.parametrize(
    ("arguments", "left_out"),
    [
        pytest.param({"city": "Bern", "days": 4}, 1, id="a-number"),
        pytest.param({"city": "Bern", "warm": True}, 1, id="a-boolean"),
        pytest.param({"city": "Bern", "at": None}, 1, id="a-null"),
        pytest.param({"city": "Bern", "deep": {"xs": [4.5]}}, 1, id="a-number-in-a-list"),
        pytest.param({"city": "Bern"}, 0, id="nothing"),
    ],
)
def test_calls_that_a_template_writes_in_part_are_counted(loss_on, arguments, left_out, chat_tokenizer, dataset):
    template = (
        TURN
        + "{% for c in m.tool_calls or [] %}{{ c.function.name }}(city={{ c.function.arguments.city }}){% endfor %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}" + ASK
    )
    encoder = Encoder(chat_tokenizer, dataset(format="Messages", loss_on=loss_on, chat_template=template))
    [row] = encoder.encode_batch([{"messages": with_call(arguments)}])
    assert (row.left_out, row.empty) == (left_out, 0)


@pytest.mark.parametrize(
    "arguments",
    [
        {"city": 'B"\\e\nr\tn \u00fc', "n": [1, 2.5, 1e30, True, None, "None"], "m": {"n": 1, "o": {}}},
        {},
        {"7": "7"},
    ],
)
@pytest.mark.parametrize(
    "written",
    [
        pytest.param("{{ f | tojson }}", id="json"),
        pytest.param("{{ f.name }}{{ f.arguments }}", id="python"),
        pytest.param("{{ f.name }}{{ f.arguments | tojson | tojson }}", id="json-in-json"),
        pytest.param("{{ f.name }}{% for k, v in f.arguments.items() %}{{ k }}={{ v }}{% endfor %}", id="values"),
    ],
)
@pytest.mark.parametrize("loss_on", ["Assistant", "All"])
def test_nothing_is_left_out_of_calls_that_are_written_in_another_form(
    loss_on, written, arguments, chat_tokenizer, dataset
):
    template = CALLS.replace("WRITTEN", written)
    encoder = Encoder(chat_tokenizer, dataset(format="Messages", loss_on=loss_on, chat_template=template))
    [row] = encoder.encode_batch([{"messages": with_call(arguments)}])
    assert (row.left_out, row.empty) == (0, 0)


@pytest.mark.parametrize(
    ("silent", "left_out"),
    [
        pytest.param({"role": "assistant", "content": ""}, 0, id="no-text"),
        pytest.param({"role": "assistant", "content": " \u200b\n"}, 0, id="blank-text"),
        pytest.param(with_call({"city": "Bern"})[1], 1, id="a-call-that-is-not-written"),
    ],
)
def test_silence_is_not_learned_where_all_is(silent, left_out, chat_tokenizer, dataset):
    encoder = Encoder(chat_tokenizer, dataset(format="Messages", loss_on="All"))
    [row] = encoder.encode_batch([{"messages": [USER, silent, *CHAT[2:]]}])
    assert (row.left_out, row.empty) == (left_out, 1)
    written = f"<|im_start|>assistant\n{silent['content']}<|im_end|>\n"
    [text] = [marked(example, chat_tokenizer) for example in row.examples]
    assert text == (
        f"⟦<|im_start|>user\nQ1<|im_end|>\n⟧{written}⟦<|im_start|>user\nQ2<|im_end|>\n"
        "<|im_start|>assistant\nRed.<|im_end|>\n⟧"
    )


def test_silence_that_cannot_be_told_apart_is_not_learned_with_its_row(chat_tokenizer, dataset):
    template = "{% for m in messages %}{{ '<|im_start|>' if loop.last }}{{ m.role }}: {{ m.content }};{% endfor %}"
    encoder = Encoder(chat_tokenizer, dataset(format="Messages", loss_on="All", chat_template=template))
    [row] = encoder.encode_batch([{"messages": [USER, {"role": "assistant", "content": ""}, *CHAT[2:]]}])
    assert (row.examples, row.empty) == ([], 1)


def test_an_empty_message_that_the_template_drops_is_no_silence(chat_tokenizer, dataset):
    encoder = Encoder(chat_tokenizer, dataset(format="Messages", loss_on="All", chat_template=LAST_TWO))
    [row] = encoder.encode_batch([{"messages": [USER, {"role": "assistant", "content": ""}, *CHAT[2:]]}])
    assert all(row.examples[0].targets)
    assert (row.left_out, row.empty) == (1, 1)
