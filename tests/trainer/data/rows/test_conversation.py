from __future__ import annotations

import json

import pytest

from qlora_trainer.data.formats import Encoder
from qlora_trainer.data.rows.conversation import read_conversation, read_exchange
from qlora_trainer.data.rows.place import RowPlace
from qlora_trainer.errors import UserError

FIELD = "spec.dataset.columns.messages"
CHAT = [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "7."}]
CALL = {"type": "function", "function": {"name": "w", "arguments": {"city": "Bern"}}}
TOOL = {"type": "function", "function": {"name": "w", "parameters": {"properties": {}, "default": None}}}
MARKER = "text of a patient"


def read(messages, tools=None):
    return read_conversation(messages, tools, 2, FIELD)


def call(arguments) -> dict:
    return {"type": "function", "function": {"name": "w", "arguments": arguments}}


@pytest.mark.parametrize(
    ("messages", "want"),
    [
        pytest.param(CHAT, CHAT, id="list"),
        pytest.param(json.dumps(CHAT), CHAT, id="json-text"),
        pytest.param({"role": ["user", "assistant"], "content": ["Weather?", "7."]}, CHAT, id="object-of-lists"),
        pytest.param(
            [{"from": "human", "value": "Weather?"}, {"from": "gpt", "value": "7.", "id": 3}],
            [CHAT[0], {**CHAT[1], "id": 3}],
            id="sharegpt",
        ),
        pytest.param(
            [CHAT[0], {"role": "assistant", "content": [{"type": "text", "text": "7"}, {"type": "text", "text": "."}]}],
            CHAT,
            id="text-parts",
        ),
        pytest.param(
            [{"role": "assistant", "content": None, "tool_calls": [{**CALL, "id": None}]}],
            [{"role": "assistant", "tool_calls": [CALL]}],
            id="nulls-of-optional-keys-mean-absent",
        ),
        pytest.param(
            [{"role": "assistant", "tool_calls": [call('{"city": "Bern"}')]}],
            [{"role": "assistant", "tool_calls": [CALL]}],
            id="arguments-as-json-text",
        ),
        pytest.param(
            [{"role": "assistant", "tool_calls": [{"name": "w", "arguments": '{"a": null}'}]}],
            [{"role": "assistant", "tool_calls": [{"name": "w", "arguments": {"a": None}}]}],
            id="arguments-beside-the-name",
        ),
        pytest.param(
            [{"role": "assistant", "content": "", "tool_calls": [call({"xs": [1, None, 2], "deep": {"a": None}})]}],
            [{"role": "assistant", "content": "", "tool_calls": [call({"xs": [1, None, 2], "deep": {"a": None}})]}],
            id="nulls-in-arguments-are-kept",
        ),
        pytest.param(
            [
                {
                    "role": "assistant",
                    "content": "Wait.",
                    "function_call": {"name": "w", "arguments": '{"city": "Bern"}'},
                },
                {"role": "function", "name": "w", "content": "7"},
            ],
            [
                {"role": "assistant", "content": "Wait.", "tool_calls": [CALL]},
                {"role": "tool", "name": "w", "content": "7"},
            ],
            id="function-calls-of-before-tool-calls",
        ),
        pytest.param(
            [{"role": "assistant", "content": None, "function_call": '{"name": "w", "arguments": {"city": "Bern"}}'}],
            [{"role": "assistant", "tool_calls": [CALL]}],
            id="function-call-as-json-text",
        ),
        pytest.param(
            [{"role": "assistant", "tool_calls": [], "function_call": {"name": "w", "arguments": '{"city": "Bern"}'}}],
            [{"role": "assistant", "tool_calls": [CALL]}],
            id="function-call-beside-no-tool-calls",
        ),
        pytest.param(
            [{"role": "assistant", "content": "7.", "function_call": ""}], [CHAT[1]], id="function-call-that-is-none"
        ),
        pytest.param(
            [{"role": "assistant", "tool_calls": json.dumps([call('{"city": "Bern"}')])}],
            [{"role": "assistant", "tool_calls": [CALL]}],
            id="tool-calls-as-json-text",
        ),
        pytest.param(
            [{"role": "assistant", "content": "7.", "loss": 0.3, "train": None}],
            [{"role": "assistant", "content": "7.", "loss": 0.3}],
            id="a-loss-that-was-measured-is-no-weight",
        ),
        pytest.param(
            [{"role": "assistant", "content": None, "tool_calls": []}],
            [{"role": "assistant", "content": ""}],
            id="no-calls-and-no-content-is-an-empty-text",
        ),
        pytest.param(
            [{"role": "assistant", "content": "7.", "reasoning_content": "R", "x": {"y": None}}],
            [{"role": "assistant", "content": "7.", "reasoning_content": "R", "x": {"y": None}}],
            id="other-keys-are-kept",
        ),
    ],
)
def test_messages_are_read_as_templates_expect_them(messages, want):
    assert read(messages).messages == want


@pytest.mark.parametrize("name", ["role", "from"])
@pytest.mark.parametrize(
    ("spelled", "role"),
    [
        ("Assistant", "assistant"),
        (" ASSISTANT\n", "assistant"),
        ("model", "assistant"),
        ("GPT", "assistant"),
        ("bot", "assistant"),
        ("Human", "user"),
        ("USER", "user"),
        ("System", "system"),
        ("Developer", "developer"),
        ("Tool", "tool"),
        ("Function", "tool"),
    ],
)
def test_roles_in_other_spellings_are_those_that_templates_know(name, spelled, role):
    [message] = read([{name: spelled, {"role": "content", "from": "value"}[name]: "7."}]).messages
    assert message == {"role": role, "content": "7."}


@pytest.mark.parametrize("role", ["critic", "observation", "ipython", "Alice"])
def test_a_role_that_is_not_known_stays_as_it_is(role):
    assert read([{"role": role, "content": "7."}]).messages == [{"role": role, "content": "7."}]


@pytest.mark.parametrize("role", ["tool_call", "function_call", "Tool_Call"])
@pytest.mark.parametrize(
    "contents",
    [
        ['{"name": "w", "arguments": {"city": "Bern"}}'],
        ['[{"name": "w", "arguments": "{\\"city\\": \\"Bern\\"}"}]'],
        [{"name": "w", "arguments": {"city": "Bern"}}],
        ['{"name": "w", "arguments": {"city": "Bern"}}'] * 2,
    ],
    ids=["text", "list", "object", "two-at-once"],
)
def test_messages_that_are_calls_are_those_of_the_assistant(role, contents):
    conversation = read([CHAT[0], *({"role": role, "content": text} for text in contents), CHAT[1]])
    assert conversation.messages == [CHAT[0], {"role": "assistant", "tool_calls": [CALL] * len(contents)}, CHAT[1]]
    assert conversation.learned == (True,) * 3
    assert read([{"from": role, "value": contents[0]}]).messages == [{"role": "assistant", "tool_calls": [CALL]}]


def test_calls_at_once_are_learned_if_all_of_them_are():
    text = '{"name": "w", "arguments": {}}'
    messages = [CHAT[0], {"role": "tool_call", "content": text}, {"role": "tool_call", "content": text, "loss": False}]
    assert read(messages).learned == (True, False)


def test_a_weight_of_zero_makes_a_message_context():
    messages = [CHAT[0], {**CHAT[1], "weight": 0}, CHAT[0], {**CHAT[1], "weight": 1}]
    conversation = read(messages)
    assert conversation.learned == (True, False, True, True)
    assert conversation.messages == CHAT * 2


@pytest.mark.parametrize("key", ["weight", "loss", "train", "training"])
def test_other_names_of_a_weight_are_heeded(key):
    conversation = read([CHAT[0], {**CHAT[1], key: False}, CHAT[0], {**CHAT[1], key: True}])
    assert conversation.learned == (True, False, True, True)
    assert conversation.messages == CHAT * 2


@pytest.mark.parametrize("key", ["weight", "loss", "train", "training"])
@pytest.mark.parametrize("off", [0, 0.0, False, "0", "false", "False", " FALSE "])
def test_a_weight_may_be_a_number_or_a_text(key, off):
    on = "True" if isinstance(off, str) else type(off)(1)
    conversation = read([CHAT[0], {**CHAT[1], key: off}, CHAT[0], {**CHAT[1], key: on}])
    assert conversation.learned == (True, False, True, True)
    assert conversation.messages == CHAT * 2


@pytest.mark.parametrize("key", ["loss", "train", "training"])
@pytest.mark.parametrize("value", ["no", "", [], {}, [0], MARKER, "2"])
def test_a_weight_that_says_neither_is_refused(key, value):
    with pytest.raises(UserError, match=f"row 2 holds a message 2 with {key} other than false .context. and true"):
        read([CHAT[0], {**CHAT[1], key: value}])


@pytest.mark.parametrize("key", ["train", "training"])
def test_only_a_loss_may_be_measured(key):
    with pytest.raises(UserError, match=f"a message 1 with {key} other than false"):
        read([{**CHAT[1], key: 0.5}])


@pytest.mark.parametrize("marked", [True, False])
def test_what_has_no_weight_is_not_learned(marked, chat_tokenizer, chatml, chatml_marked, dataset):
    encoder = Encoder(chat_tokenizer, dataset(format="Messages", chat_template=chatml_marked if marked else chatml))
    row = {"messages": [CHAT[0], {"role": "assistant", "content": "WRONG", "weight": 0}, *CHAT]}
    encoded = encoder.encode(row)
    counted = [t for t, counts in zip(encoded.input_ids, encoded.targets, strict=True) if counts]
    assert chat_tokenizer.decode(counted).strip() == "7.<|im_end|>"
    assert "WRONG" in chat_tokenizer.decode(encoded.input_ids)


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])], ids=["list", "json-text"])
def test_tools_reach_the_template(tools, chat_tokenizer, chatml, dataset):
    template = "{% if tools %}TOOLS {{ tools | tojson }}{% endif %}" + chatml
    encoder = Encoder(chat_tokenizer, dataset(format="Messages", chat_template=template))
    text = chat_tokenizer.decode(encoder.encode({"messages": CHAT, "tools": tools}).input_ids)
    assert f"TOOLS {json.dumps([TOOL])}" in text
    assert "TOOLS" not in chat_tokenizer.decode(encoder.encode({"messages": CHAT, "tools": None}).input_ids)


def test_a_prompt_and_a_completion_of_messages_are_one_conversation(chat_tokenizer, dataset):
    encoder = Encoder(chat_tokenizer, dataset(format="PromptCompletion"))
    given = [*CHAT, CHAT[0]]
    encoded = encoder.encode({"prompt": given, "completion": CHAT[1:]})
    counted = [t for t, counts in zip(encoded.input_ids, encoded.targets, strict=True) if counts]
    assert chat_tokenizer.decode(counted).strip() == "7.<|im_end|>"
    assert encoded.input_ids == chat_tokenizer.apply_chat_template([*given, *CHAT[1:]])["input_ids"]
    assert read_exchange(given, CHAT[1:], None, 1, ("p", "c")).learned == (False, False, False, True)


def test_all_of_an_exchange_is_learned_where_all_counts_but_for_weight_0(chat_tokenizer, dataset):
    encoder = Encoder(chat_tokenizer, dataset(format="PromptCompletion", loss_on="All"))
    given = [CHAT[0], {"role": "assistant", "content": "WRONG", "weight": 0}, CHAT[0]]
    encoded = encoder.encode({"prompt": given, "completion": CHAT[1:]})
    left_out = [t for t, counts in zip(encoded.input_ids, encoded.targets, strict=True) if not counts]
    assert chat_tokenizer.decode(left_out) == "<|im_start|>assistant\nWRONG<|im_end|>\n"


def test_prompts_to_a_model_that_learns_exchanges_are_turns_of_the_user(chat_tokenizer, dataset):
    pairs = dataset(format="PromptCompletion")
    asked = Encoder(chat_tokenizer, pairs, conversations=True).prompt("Q")
    assert asked == Encoder(chat_tokenizer, dataset(format="Messages")).prompt("Q")
    assert chat_tokenizer.decode(Encoder(chat_tokenizer, pairs).prompt("Q")) == "Q"


def test_texts_and_messages_are_not_mixed_in_one_row(chat_tokenizer, dataset):
    encoder = Encoder(chat_tokenizer, dataset(format="PromptCompletion"))
    with pytest.raises(UserError, match="row 1 holds a list"):
        encoder.encode({"prompt": "a", "completion": ["b"]})
    with pytest.raises(UserError, match=r"^spec.dataset.columns.completion: .* row 1 holds a text as message 1"):
        encoder.encode({"prompt": CHAT[:1], "completion": ["b"]})


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        pytest.param(None, "nothing", id="none"),
        pytest.param([], "nothing", id="empty"),
        pytest.param(7, "a number", id="number"),
        pytest.param(MARKER, "text that is not JSON", id="plain-text"),
        pytest.param("[" * 100_000, "text that is not JSON", id="deep-text"),
        pytest.param([MARKER], "a text as message 1", id="list-of-texts"),
        pytest.param([CHAT[0], {"speaker": MARKER, MARKER: "hi"}], "a message 2 without a role", id="other-keys"),
        pytest.param([{"from": MARKER, "value": "a"}], 'a message 1 whose "from" is none of user, human', id="speaker"),
        pytest.param([{"role": "user", "content": None}], "a message 1 without content", id="no-content"),
        pytest.param([{"role": "user", "content": 3}], "a message 1 whose content is a number", id="number-content"),
        pytest.param(
            [*CHAT, {"role": "tool", "content": {MARKER: 7}}],
            "a message 3 whose content is an object; allowed are a text and a list of text parts",
            id="object-content",
        ),
        pytest.param(
            [{"role": "user", "content": [{"type": "image", "image": MARKER}]}],
            "a message 1 whose content part 1 is no text",
            id="image-part",
        ),
        pytest.param([{**CHAT[1], "weight": 0.5}], "a message 1 with a weight other than 0", id="half-weight"),
        pytest.param(
            [{**CHAT[1], "train_detail": [{"begin_offset": 0, "end_offset": 3, "train": False}]}],
            "a message 1 with train_detail; a message is learned as a whole or, by weight 0, not at all",
            id="weights-of-parts",
        ),
        pytest.param(
            [CHAT[0], {**CHAT[1], "reasoning_content": [MARKER]}],
            "a message 2 whose reasoning_content is a list, not a text",
            id="reasoning-in-a-list",
        ),
        pytest.param(
            [{"from": "human", "value": "Q"}, {"from": "gpt", "value": None}],
            "a message 2 without content",
            id="sharegpt-null",
        ),
        pytest.param([{**CHAT[1], "weight": MARKER}], "a message 1 with a weight other than 0", id="text-weight"),
        pytest.param(
            [{**CHAT[1], "tool_calls": [call(MARKER)]}],
            "a message 1 whose tool_calls[0].function.arguments is text that is not JSON",
            id="arguments-no-json",
        ),
        pytest.param(
            [{**CHAT[1], "tool_calls": [call(f'["{MARKER}"]')]}],
            "a message 1 whose tool_calls[0].function.arguments is a list, not an object",
            id="arguments-no-object",
        ),
        pytest.param(
            [{**CHAT[1], "tool_calls": {"a": MARKER}}], "a message 1 whose tool_calls are an object", id="calls-object"
        ),
        pytest.param(
            [{**CHAT[1], "tool_calls": [MARKER]}], "a message 1 whose tool_calls[0] is a text", id="call-text"
        ),
        pytest.param(
            [{**CHAT[1], "tool_calls": [{"function": MARKER}]}],
            "a message 1 whose tool_calls[0].function is a text, not an object",
            id="function-text",
        ),
        pytest.param(
            [{**CHAT[1], "tool_calls": MARKER}],
            "a message 1 whose tool_calls are text that is not JSON",
            id="calls-text",
        ),
        pytest.param(
            [{**CHAT[1], "function_call": MARKER}],
            "a message 1 whose function_call is text that is not JSON",
            id="function-call-text",
        ),
        pytest.param(
            [{**CHAT[1], "function_call": [MARKER]}],
            "a message 1 whose function_call is a list, not an object",
            id="function-call-list",
        ),
        pytest.param(
            [{**CHAT[1], "function_call": CALL["function"], "tool_calls": [CALL]}],
            "a message 1 with both tool_calls and function_call",
            id="both-calls",
        ),
        pytest.param(
            [{"role": "tool_call", "content": MARKER}], 'a message 1 that is no call such as {"name"', id="no-call"
        ),
        pytest.param({"role": ["user"], "content": [MARKER, "b"]}, "an object, not a list", id="uneven-lists"),
    ],
)
def test_what_is_not_a_conversation_is_named_without_its_text(messages, found):
    with pytest.raises(UserError) as caught:
        read(messages)
    assert str(caught.value).startswith(f"{FIELD}: must hold a list of messages")
    assert f"row 2 holds {found}" in str(caught.value)
    assert MARKER not in str(caught.value)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("as_text", [False, True])
def test_numbers_that_json_has_not_are_refused_in_calls_and_tools(number, as_text):
    value = {"deep": [float(number.replace("1e999", "inf"))]}
    arguments = f'{{"deep": [{number}]}}' if as_text else value
    wanted = "with NaN, Infinity or a number beyond"
    with pytest.raises(UserError, match=rf"row 2 holds a message 2 .*tool_calls\[0\].function.arguments {wanted}"):
        read([CHAT[0], {"role": "assistant", "tool_calls": [call(arguments)]}])
    with pytest.raises(UserError, match=rf"row 2 holds tools {wanted}"):
        read(CHAT, f"[{arguments}]" if as_text else [value])


@pytest.mark.parametrize(
    "messages",
    [
        json.dumps([{"role": "user", "content": "a\ud800"}, CHAT[1]]),
        [CHAT[0], {"role": "assistant", "tool_calls": [call('{"city": "\\udc00 Bern"}')]}],
        json.dumps([CHAT[0], {"role": "assistant", "tool_calls": [call('{"city": "\\ud83d"}')]}]),
    ],
    ids=["messages", "arguments", "arguments-in-messages"],
)
def test_half_of_a_surrogate_pair_inside_json_text_is_named_with_its_row(messages, chat_tokenizer, dataset):
    encoder = Encoder(chat_tokenizer, dataset(format="Messages"))
    with pytest.raises(UserError, match=r"row 1 holds JSON text that has half of a surrogate pair"):
        encoder.encode_batch([{"messages": messages}])
    whole = json.dumps([{"role": "user", "content": "\U0001f600"}, CHAT[1]])
    assert read(whole).messages[0]["content"] == "\U0001f600"


@pytest.mark.parametrize("cell", ["", " ", "\n", "null", None])
def test_a_cell_of_tools_with_nothing_in_it_is_none(cell):
    assert read(CHAT, cell).tools is None


@pytest.mark.parametrize("cell", ["", " ", "null", "{}"])
def test_a_call_without_arguments_has_none(cell):
    call = {"type": "function", "function": {"name": "now", "arguments": cell}}
    said = read([*CHAT[:1], {"role": "assistant", "tool_calls": [call]}]).messages[-1]
    assert said["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize("cell", [" ", "null"])
def test_a_cell_of_calls_with_nothing_in_it_is_none(cell):
    assert "tool_calls" not in read([*CHAT[:1], {"role": "assistant", "content": "a", "tool_calls": cell}]).messages[-1]


@pytest.mark.parametrize("tools", [MARKER, {"a": MARKER}, [MARKER]])
def test_tools_that_are_none_are_named_without_their_text(tools):
    with pytest.raises(UserError, match=r"row 2 holds .*tools") as caught:
        read(CHAT, tools)
    assert MARKER not in str(caught.value)


def test_a_row_is_named_with_its_file_and_line():
    with pytest.raises(UserError, match=r"row 16 \(p1.jsonl, line 6\) holds nothing"):
        read_conversation(None, None, RowPlace(16, "p1.jsonl", "line 6"), FIELD)
