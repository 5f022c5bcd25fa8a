"""The service that renders conversations in a child; see :mod:`qlora_trainer.bounded_child`. Light to import."""

from __future__ import annotations

import re
import time
import traceback
from typing import TYPE_CHECKING, Any

import jinja2

from qlora_trainer.data.rendering.compiled_template import TemplateWords, compile_template
from qlora_trainer.data.rendering.conversations import Renderer
from qlora_trainer.data.rendering.turns import Reader, TemplateRefusedError, find_dialect
from qlora_trainer.data.rows.limits import MIB, MOST_ROW_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from qlora_trainer.bounded_child import Service

FIRST_SECONDS, ROW_SECONDS = 60, 1
"""Processor time for all rows together: the first once, and the second for each row."""
_UNDEFINED = re.compile(r"'(?P<name>\w+)' is undefined|'(?:None|[\w.]+ object)' has no attribute '(?P<attribute>\w+)'")
"""Jinja's messages about an undefined variable or attribute, with its name."""


class _Rows:
    """The answers to requests, with the time that they took.

    Args:
        renderer: of the template for rows without tools.
        with_tools: of the one for rows with tools.

    """

    def __init__(self, renderer: Renderer, with_tools: Renderer) -> None:
        self.renderer = renderer
        self.with_tools = with_tools
        self.count = 0
        self.began = time.process_time()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if "rows" in request:
            return {"rows": [self._row(row, everything=request["everything"]) for row in request["rows"]]}
        if "prompt" in request:
            return _caught(self.renderer, lambda: {"text": self.renderer.prompt(request["prompt"])})
        notes = dict.fromkeys([*self.renderer.notes(), *self.with_tools.notes()])
        return {"notes": list(notes), "end": self.renderer.end}

    def _row(self, row: dict[str, Any], *, everything: bool) -> dict[str, Any]:
        self.count += 1
        if time.process_time() - self.began > FIRST_SECONDS + ROW_SECONDS * self.count:
            return {"refused": f"takes more than {FIRST_SECONDS} s and {ROW_SECONDS} s for each row before it"}
        renderer = self.with_tools if row["tools"] else self.renderer
        render = renderer.everything if everything else renderer.render
        return _caught(
            renderer, lambda: vars(render(row["messages"], row["tools"], row["learned"], row.get("continued", 0)))
        )


def _caught(renderer: Renderer, render: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        answer = render()
    except TemplateRefusedError as error:
        return {"refused": str(error)}
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 whatever a template raises
        return {"failed": describe_error(error, TemplateWords.of(renderer.reader.template))}
    if _size(answer) > MOST_ROW_BYTES:
        return {"refused": f"writes more than {MOST_ROW_BYTES // MIB} MiB, the most that a row may have"}
    return answer


def _size(answer: dict[str, Any]) -> int:
    """Return the bytes of the texts of a row or prompt."""
    texts = [text for example in answer.get("examples", ()) for text, _ in example]
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in [*texts, answer.get("text", "")])


def serve(setup: dict[str, Any]) -> Service:
    """Compile a template and return the service that renders with it.

    Args:
        setup: ``template``, its text; ``tool_template``, another one for rows with tools, or None; ``variables``, those
            of the tokenizer; ``tokens``, its added tokens; ``special``, those that are no text.

    """
    try:
        renderer = _renderer(setup, setup["template"])
        with_tools = _renderer(setup, setup["tool_template"]) if setup["tool_template"] else renderer
    except jinja2.TemplateSyntaxError as error:
        problem = {"syntax": f"{error.message} (line {error.lineno})"}
        return lambda _: problem
    return _Rows(renderer, with_tools).answer


def _renderer(setup: dict[str, Any], source: str) -> Renderer:
    template = compile_template(source, setup["variables"])
    renderer = Renderer(Reader(template, setup["tokens"], setup["special"]))
    try:
        renderer.dialect = find_dialect(renderer.reader)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001, S110 it does not like our conversation; those of the rows decide
        pass
    return renderer


def describe_error(error: Exception, words: TemplateWords) -> str:
    """Say what a template raised: the kind of error, and of its text only what stands in the template itself.

    The rest may be a row's: errors of Python and jinja quote values that the template works with.
    """
    text = ""
    if type(error) is jinja2.TemplateError:  # of raise_exception
        text = f": {words.beginning_of(str(error))}"
    elif isinstance(error, jinja2.UndefinedError):
        found = _UNDEFINED.fullmatch(str(error))
        text = f": {error}" if found and found[found.lastgroup or 0] in words.names else ""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    where = f" (line {lines[-1]} of the template)" if lines else ""
    return f"{type(error).__name__}{text}{where}"
