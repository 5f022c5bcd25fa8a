"""The service that renders conversations in a child; see :mod:`qlora_trainer.bounded_child`. Light to import."""

from __future__ import annotations

import re
import time
import traceback
from typing import TYPE_CHECKING, Any

import jinja2

from qlora_trainer.data.rendering.conversations import Renderer
from qlora_trainer.data.rendering.environment import compile_template
from qlora_trainer.data.rendering.turns import Reader, TemplateRefusedError, find_dialect

if TYPE_CHECKING:
    from qlora_trainer.bounded_child import Service

FIRST_SECONDS, ROW_SECONDS = 60, 1
"""Of processor time for all rows together: the first, and the second for each row."""
_TYPES = {"NoneType", "str", "int", "float", "bool", "dict", "list", "tuple", "generator", "Undefined"}
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")


class _Rows:
    """The answers to requests, with the time that they took."""

    def __init__(self, renderer: Renderer, source: str) -> None:
        self.renderer = renderer
        self.source = source
        self.count = 0

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if "rows" in request:
            return {"rows": [self._row(row, everything=request["everything"]) for row in request["rows"]]}
        if "prompt" in request:
            return self._caught(lambda: {"text": self.renderer.prompt(request["prompt"])})
        return {"notes": self.renderer.notes(), "end": self.renderer.end}

    def _row(self, row: dict[str, Any], *, everything: bool) -> dict[str, Any]:
        self.count += 1
        if time.process_time() > FIRST_SECONDS + ROW_SECONDS * self.count:
            return {"refused": f"takes more than {FIRST_SECONDS} s and {ROW_SECONDS} s for each row before it"}
        if everything:
            return self._caught(
                lambda: {"examples": [[(self.renderer.everything(row["messages"], row["tools"]), True)]]}
            )
        return self._caught(lambda: vars(self.renderer.render(row["messages"], row["tools"], row["learned"])))

    def _caught(self, render: Any) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = render()
        except TemplateRefusedError as error:
            return {"refused": str(error)}
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 whatever a template raises
            return {"failed": describe_error(error, self.source)}
        return answer


def serve(setup: dict[str, Any]) -> Service:
    """Compile a template and return the service that renders with it.

    Args:
        setup: ``template``, its text; ``variables``, those of the tokenizer; ``tokens``, its added tokens.

    """
    try:
        template = compile_template(setup["template"], setup["variables"])
    except jinja2.TemplateSyntaxError as error:
        problem = {"syntax": f"{error.message} (line {error.lineno})"}
        return lambda _: problem
    renderer = Renderer(Reader(template, setup["tokens"]))
    rows = _Rows(renderer, setup["template"])
    try:
        renderer.dialect = find_dialect(renderer.reader)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001, S110 it does not like our conversation; those of the rows decide
        pass
    return rows.answer


def describe_error(error: Exception, source: str) -> str:
    """Say what a template raised without quoting a row: what is not the template's own text is left out."""
    text = str(error)
    if isinstance(error, jinja2.TemplateError) and not isinstance(error, jinja2.TemplateRuntimeError):
        text = _own_beginning(text, source)
    elif text not in source:
        text = _QUOTED.sub(lambda quoted: quoted.group() if _is_own(quoted.group()[1:-1], source) else "'…'", text)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    where = f" (line {lines[-1]} of the template)" if lines else ""
    return f"{type(error).__name__}: {text}{where}"


def _is_own(text: str, source: str) -> bool:
    return text in source or text in _TYPES or text.endswith(" object")


def _own_beginning(text: str, source: str) -> str:
    """The beginning of the text that stands in the template's source, and dots for the rest."""
    length = len(text)
    while length and text[:length].replace("\n", "\\n") not in source and text[:length] not in source:
        length -= 1
    return text if length == len(text) else f"{text[:length]}…"
