"""All chat templates that two packages of the field ship, eleven conversations each, against transformers.

Every text that somebody says is a word of its own, so that nothing of a user, a system message or a tool is learned
without being seen.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from itertools import product
from pathlib import Path

import pytest
from transformers.utils import chat_template_utils

sys.path.insert(0, str(Path(__file__).parent))

from published_templates import published_templates

from qlora_trainer.data.rendering.compiled_template import CLOCK
from qlora_trainer.data.rendering.service import serve
from qlora_trainer.data.rendering.turns import as_parts

SPECIAL = {"bos_token": "<BOS>", "unk_token": "<UNK>", "pad_token": "<PAD>"}
END_TOKENS = re.compile(
    r"(<\|(im_end|assistant_end|END_OF_TURN_TOKEN|user|observation|message_sep|end_of_msg|tool_response|end_of_text"
    r"|role_end|eot_id|eom_id|end|eot|return|call|calls)(\|>|>)|<turn\|>|<seed:eos>|<end_of_sentence>|\[e~\[|<EOS>|</s>"
    r"|<SPECIAL_12>|<sep>|<.end▁of▁sentence.>|<end_of_turn>|</assistant>|<.hy_eos:opensource.>"
    r"|<tool_responses:opensource>|<end_of_utterance>)$"
)
CONTROL_TOKENS = re.compile(r"<\|[^<>\s]{1,60}>")
"""Those of a template's tokens that its tokenizer has as special tokens."""
NO_END_TOKEN = {"llama-cpp-python/llama-cpp-rwkv-world"}
"""Ends with an empty line, which the receipt tells."""
STATES = [{}, {"enable_thinking": False}, {"thinking": False}, {"reasoning": False}]
STATES += [{"enable_thinking": True}, {"thinking": True}]
OTHERS = ("uONE", "uTWO", "uTHREE", "sONE", "tONE", "dWEATHER")


def user(text):
    return {"role": "user", "content": text}


def says(text, **more):
    return {"role": "assistant", "content": text, **more}


def calls(content):
    function = {"name": "getweather", "arguments": {"city": "cONE"}}
    return says(content, tool_calls=[{"id": "call00001", "type": "function", "function": function}])


PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "getweather", "description": "dWEATHER", "parameters": PARAMETERS}}]
RESULT = {"role": "tool", "name": "getweather", "tool_call_id": "call00001", "content": "tONE"}
MULTI = [user("uONE"), says("aONE"), user("uTWO"), says("aTWO"), user("uTHREE"), says("aTHREE")]
CONVERSATIONS = {
    "single": (MULTI[:2], None),
    "multi": (MULTI, None),
    "system": ([{"role": "system", "content": "sONE"}, *MULTI], None),
    "thought in content": (
        [
            *(user("uONE"), says("<think>\nrONE\n</think>\n\naONE")),
            *(user("uTWO"), says("<think>\nrTWO\n</think>\n\naTWO")),
        ],
        None,
    ),
    "thought in a field": (
        [
            *(user("uONE"), says("aONE", reasoning_content="rONE")),
            *(user("uTWO"), says("aTWO", reasoning_content="rTWO")),
        ],
        None,
    ),
    "tool call": ([user("uONE"), calls(None), RESULT, says("aTWO")], TOOLS),
    "tool call with text": ([user("uONE"), calls("aONE"), RESULT, says("aTWO"), user("uTWO"), says("aTHREE")], TOOLS),
    "tools unused": (MULTI[:2], TOOLS),
    "ends with a question": (MULTI[:3], None),
    "white space": ([user("  uONE\n"), says("   aONE:\n\n  a  \n"), user("uTWO"), says("\naTWO  ")], None),
    "empty answer": ([user("uONE"), says(""), user("uTWO"), says("aTWO")], None),
}


@dataclass
class TemplateOutcome:
    """The outcome of one conversation with one template."""

    template: str
    source: str
    eos: str
    conversation: str
    answer: dict

    @property
    def accepted(self) -> bool:
        return "examples" in self.answer

    def turns(self) -> list[tuple[str, str]]:
        """(context, learned) of each learned turn."""
        found = []
        for example in self.answer["examples"]:
            context, learned = "", ""
            for text, counts in [*example, ("", False)]:
                if counts:
                    learned += text
                elif learned:
                    found.append((context, learned))
                    context, learned = context + learned + text, ""
                else:
                    context += text
        return found


@pytest.fixture(scope="module")
def results() -> list[TemplateOutcome]:
    found = []
    for name, source in published_templates().items():
        eos = "<|END_OF_TURN_TOKEN|>" if "END_OF_TURN_TOKEN" in source else "<EOS>"
        tokens = ["<BOS>", eos]
        setup = {
            "template": source,
            "tool_template": None,
            "variables": {**SPECIAL, "eos_token": eos},
            "tokens": tokens,
        }
        service = serve({**setup, "special": [*tokens, *CONTROL_TOKENS.findall(source)]})
        for conversation, (messages, tools) in CONVERSATIONS.items():
            row = {"messages": messages, "tools": tools, "learned": [True] * len(messages)}
            answer = service({"rows": [row], "everything": False})["rows"][0]
            found.append(TemplateOutcome(name, source, eos, conversation, answer))
    return found


def test_all_are_accepted_or_refused_and_at_most_eight_refuse_plain_turns_with_the_place(results):
    accepted = Counter(result.conversation for result in results if result.accepted)
    refused = Counter(result.conversation for result in results if not result.accepted)
    print(f"\n{len({result.template for result in results})} templates")  # noqa: T201 the table is asked for
    for conversation in CONVERSATIONS:
        print(f"{conversation:24}{accepted[conversation]:5} accepted{refused[conversation]:5} refused")  # noqa: T201
    plain = {r.template: r.answer for r in results if not r.accepted and r.conversation in {"single", "multi"}}
    for template, answer in plain.items():
        print(f"{template}: {answer}")  # noqa: T201
        reason = answer.get("refused") or answer["failed"]
        assert 'ends its prompt for the assistant with "' in reason or "line " in reason
    assert len(plain) <= 8
    assert not any(word in str(r.answer) for r in results if not r.accepted for word in ("aONE", "aTWO", *OTHERS))


def test_nothing_that_others_say_is_learned_and_every_answer_ends_with_its_end_token(results):
    for result in filter(lambda result: result.accepted, results):
        messages, _ = CONVERSATIONS[result.conversation]
        turns = result.turns()
        assert len(turns) + result.answer["empty"] == sum(m["role"] == "assistant" for m in messages), result
        for _, learned in turns:
            assert not any(word in learned for word in OTHERS), result
            assert re.search("a(ONE|TWO|THREE)|getweather", learned), result
            if result.template in NO_END_TOKEN:
                assert learned.endswith("\n\n")
            else:
                assert END_TOKENS.search(learned), result


def test_texts_are_those_of_apply_chat_template_when_the_turn_is_written(results, monkeypatch):
    class StandingClock(datetime):
        @classmethod
        def now(cls, tz=None):
            return CLOCK

    monkeypatch.setattr(chat_template_utils, "datetime", StandingClock)
    for result in results:
        if result.accepted:
            for context, learned in result.turns():
                assert any(agrees(context, learned, *texts) for texts in transformers_renderings(result)), result


def agrees(context, learned, asked, answered) -> bool:
    """Return whether transformers asks in the same context, and its rendering of the answer holds what is learned."""
    own = END_TOKENS.sub("", learned)  # the next message may write the end
    if context == asked and answered.startswith(context):
        return answered.startswith(context + own)
    # The prompt has a thought that the rendered history leaves out; the rest must be there.
    return context == asked and own.rpartition("</think>")[2].strip() in answered


def transformers_renderings(result):
    """(context, answered) of each assistant message, in each of the ways in which a template may want it."""
    messages, tools = CONVERSATIONS[result.conversation]
    has_calls = any(message.get("tool_calls") for message in messages)
    states = [state for state in STATES if all(name in result.source for name in state)]
    render = chat_template_utils.render_jinja_template
    ways = product(states, (False, True), (False, True), *[(False, True) if has_calls else (False,)] * 2)
    for state, empty_tools, parts, text, as_json in ways:
        given = [adapted(message, parts=parts, text=text, as_json=as_json) for message in messages]
        options = {
            "tools": tools if tools or not empty_tools else [],
            "chat_template": result.source,
            **SPECIAL,
            "eos_token": result.eos,
            **state,
        }
        for place in (i for i, message in enumerate(given) if message["role"] == "assistant"):
            try:
                asked = chat_template_utils.render_jinja_template(
                    [given[:place]], add_generation_prompt=True, **options
                )
                thought = {**given[place], "reasoning_content": "\n"}
                for answer in (given[place], thought):
                    answered = render([[*given[:place], answer]], **options)
                    yield asked[0][0], answered[0][0]
            except Exception:  # noqa: BLE001 this way is not the template's
                continue


def adapted(message, *, parts, text, as_json):
    """A message as some templates want it: content in parts, or never without, arguments as JSON text."""
    content = message["content"]
    if text and content is None:
        content = ""
    message = {**message, "content": as_parts(content) if parts and isinstance(content, str) else content}
    if as_json and "tool_calls" in message:
        (call,) = message["tool_calls"]
        function = {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}
        message["tool_calls"] = [{**call, "function": function}]
    return message
