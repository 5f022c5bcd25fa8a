"""Compile and render a chat template as transformers' ``apply_chat_template`` does, without importing transformers.

Differences, each on purpose: the clock stands still, nothing is drawn at random, and ``{% generation %}`` writes a mark
before and after its body, so that macros, filters and blocks cannot move what is marked. Runs in a child; light to
import.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from qlora_trainer.data.message_keys import REASONING_KEYS

MARK_START, MARK_STOP = "\ue0f0", "\ue0f1"
"""Characters for private use that stand around what ``{% generation %}`` marks."""
CLOCK = datetime(2025, 1, 1, 12)  # noqa: DTZ001 templates format it, and most write a date alone
"""Time that ``strftime_now`` formats, so that the same rows give the same tokens on any day."""

Message = dict[str, Any]


class _Generation(jinja2.ext.Extension):
    """The tag ``{% generation %}``."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{MARK_START}{caller()}{MARK_STOP}"


class _Namespace(jinja2.utils.Namespace):
    """Refuse names with which a template could reach CPython's internals, as transformers does."""

    def __init__(*arguments: Any, **named: Any) -> None:
        values = dict(*arguments[1:], **named)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(arguments[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace takes no name such as {name!r}")


class _Dict:
    """``dict`` without its attributes."""

    def __call__(self, *arguments: Any, **named: Any) -> dict[Any, Any]:
        return dict(*arguments, **named)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        return dict.fromkeys(*arguments)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@dataclass(frozen=True)
class CompiledTemplate:
    """A template with the tokenizer's special tokens."""

    source: str
    template: jinja2.Template
    names: frozenset[str]
    """Variables that it asks for."""
    variables: dict[str, Any]
    draws: bool = False
    """It asks for something at random, and gets the first."""

    def render(
        self, messages: list[Message], tools: Any = None, *, prompt: bool = False, marks: bool = False, **state: Any
    ) -> str:
        """Write a conversation.

        Args:
            messages: not changed.
            tools: JSON schemas, or None.
            prompt: begin the assistant's next message.
            marks: leave marks where the template has them.
            state: further variables.

        """
        text = self.template.render(
            messages=[_with_reasoning(message) for message in messages],
            tools=tools,
            documents=None,
            add_generation_prompt=prompt,
            **self.variables,
            **state,
        )
        if marks or "endgeneration" not in self.source:  # the characters are a row's own there
            return text
        return text.replace(MARK_START, "").replace(MARK_STOP, "")


@dataclass(frozen=True)
class TemplateWords:
    """The words that stand in a template's source."""

    names: frozenset[str]
    """Names of variables, attributes and keys."""
    literals: tuple[str, ...]
    """Texts of its expressions, the longest first."""

    @classmethod
    def of(cls, template: CompiledTemplate) -> TemplateWords:
        tree = template.template.environment.parse(template.source)
        literals = {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
        names = {node.name for node in tree.find_all(jinja2.nodes.Name)}
        attributes = {node.attr for node in tree.find_all(jinja2.nodes.Getattr)}
        keys = {node.arg for node in tree.find_all(jinja2.nodes.Getitem)}
        constants = {key.value for key in keys if isinstance(key, jinja2.nodes.Const) and isinstance(key.value, str)}
        return cls(frozenset(names | attributes | constants), tuple(sorted(literals, key=len, reverse=True)))

    def beginning_of(self, text: str) -> str:
        """Return the longest literal that a text begins with, and dots for what follows it."""
        literal = next((literal for literal in self.literals if text.startswith(literal)), "")
        return literal if text == literal else f"{literal}…"


def compile_template(source: str, variables: dict[str, Any]) -> CompiledTemplate:
    """Parse and compile.

    Raises:
        jinja2.TemplateSyntaxError: it does not parse.

    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    tree = environment.parse(source)
    names = jinja2.meta.find_undeclared_variables(tree)  # with globals, which come next
    draws = any(node.name == "random" for node in tree.find_all(jinja2.nodes.Filter))
    environment.filters |= {"tojson": _tojson, "random": environment.filters["first"]}
    del environment.globals["lipsum"]  # random words
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": CLOCK.strftime,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return CompiledTemplate(source, environment.from_string(source), frozenset(names), variables, draws)


def _with_reasoning(message: Message) -> Message:
    """Give reasoning under the names that templates read."""
    reasoning = next((message[key] for key in REASONING_KEYS if message.get(key) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}
