"""YAML read as Kubernetes reads it, remembering the line of every field; and written so that it reads it back.

kubectl and the API server convert YAML to JSON with go-yaml 2 (sigs.k8s.io/yaml), which differs from PyYAML: ``2e-4``
is a number, ``1:30`` is a text, ``y`` is true, dates are texts, ``014`` is octal, a field given twice is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import yaml

from qlora_api.errors import FieldError
from qlora_api.untrusted.printable import is_printable

_PLAIN = "!plain"
_STANDARD = "tag:yaml.org,2002:"
_MOST_NODES = 20_000
"""More than any manifest needs; a few nested aliases can unfold to billions."""

_WORDS: dict[str, object] = {
    **dict.fromkeys(("y", "Y", "yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON"), True),
    **dict.fromkeys(("n", "N", "no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF"), False),
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), math.inf),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), -math.inf),
}
_INTEGERS = (
    (re.compile(r"[+-]?0[xX][0-9a-fA-F]+"), 16),
    (re.compile(r"[+-]?0[bB][01]+"), 2),
    (re.compile(r"[+-]?0[oO]?[0-7]+"), 8),
    (re.compile(r"[+-]?(0|[1-9][0-9]*)"), 10),
)
_FLOAT = re.compile(r"[+-]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][+-]?[0-9]+)?")


@dataclass(frozen=True)
class Document:
    """One YAML document."""

    source: str
    """The file, as it was named."""
    line: int
    value: object
    lines: dict[str, int] = field(repr=False)
    """Line of each field, by path such as ``spec.lora.targetModules[0]``."""
    errors: tuple[FieldError, ...] = ()
    """Errors for what YAML allows and Kubernetes does not."""

    def line_of(self, path: str) -> int:
        """Return the line of a field, or of the nearest group around a field that is not there."""
        while path and path not in self.lines:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return self.lines.get(path, self.line)


class NotYamlError(ValueError):
    """The text cannot be parsed; ``str()`` begins with file and line."""


class _Loader(yaml.BaseLoader):
    """Composes nodes only, and marks unquoted scalars, so that they can be told from quoted ones."""


_Loader.add_implicit_resolver(_PLAIN, re.compile(r"(?s).*"), None)


def read(text: str, source: str) -> list[Document]:
    """Return all documents of a text; empty ones are passed over, as kubectl does.

    Raises:
        NotYamlError: it is not YAML.

    """
    documents = []
    try:
        for node in yaml.compose_all(text, Loader=_Loader):
            reader = _Reader()
            value = reader.value(node, "", ())
            if value is not None:
                line = node.start_mark.line + 1
                documents.append(Document(source, line, value, reader.lines, tuple(reader.errors)))
    except RecursionError:
        raise NotYamlError(f"{source}: is nested too deep to be a manifest") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise NotYamlError(f"{place}: YAML syntax error: {error.problem or error.context}{_hint(error)}") from None
    except yaml.YAMLError as error:
        raise NotYamlError(f"{source}: YAML syntax error: {' '.join(str(error).split())}") from None
    return documents


def _hint(error: yaml.MarkedYAMLError) -> str:
    """Name the lines to look at where YAML's own words do not say that they are not aligned."""
    unaligned = ("mapping values are not allowed", "expected <block end>", "could not find expected ':'")
    if error.problem_mark is None or not (error.problem or "").startswith(unaligned):
        return ""
    line = error.problem_mark.line + 1
    return f"; check the indentation of lines {line - 1} and {line}" if line > 1 else ""


def scalar(text: str) -> object:
    """Return the value of an unquoted scalar."""
    if text in _WORDS:
        return _WORDS[text]
    if text[0] not in "+-.0123456789":
        return text
    digits = text if text[0] == "." else text.replace("_", "")
    for pattern, base in _INTEGERS:
        if pattern.fullmatch(digits):
            return int(re.sub(r"^([+-]?)0[oO]", r"\1", digits) if base == 8 else digits, base)
    if not _FLOAT.fullmatch(digits) or math.isinf(value := float(digits)):
        return text
    return int(value) if value.is_integer() and abs(value) < 1e21 else value  # as JSON writes it: 16.0 is 16


def dump(value: object, is_writable: Callable[[str], bool] = is_printable) -> str:
    """YAML that Kubernetes reads back as the same values, in ASCII where ``is_writable`` says no of the text."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
    if is_printable(text) and is_writable(text):
        return text
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=False))


class _Dumper(yaml.SafeDumper):
    """Quotes texts that only PyYAML takes for texts, such as 2e-4, which as a default in a CRD would be a number."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = None if isinstance(scalar(text), str) else "'"
    return dumper.represent_scalar(f"{_STANDARD}str", text, style=style)


_Dumper.add_representer(str, _represent_text)


class _Reader:
    """Turns the nodes of one document into plain data."""

    def __init__(self) -> None:
        self.lines: dict[str, int] = {}
        self.errors: list[FieldError] = []
        self._nodes = 0

    def value(self, node: yaml.Node, path: str, within: tuple[yaml.Node, ...]) -> object:
        self._nodes += 1
        if self._nodes > _MOST_NODES:
            raise yaml.MarkedYAMLError(problem="aliases unfold to too much", problem_mark=node.start_mark)
        if any(node is outer for outer in within):
            raise yaml.MarkedYAMLError(problem="an alias contains itself", problem_mark=node.start_mark)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, (*within, node))
        if isinstance(node, yaml.SequenceNode):
            items = []
            for index, item in enumerate(node.value):
                here = f"{path}[{index}]"
                self.lines.setdefault(here, item.start_mark.line + 1)
                items.append(self.value(item, here, (*within, node)))
            return items
        return self._scalar(node, path)

    def _mapping(self, node: yaml.MappingNode, path: str, within: tuple[yaml.Node, ...]) -> dict[str, object]:
        merged: dict[str, object] = {}
        own: dict[str, object] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _PLAIN and key_node.value == "<<":
                merged = {**self._merged(value_node, path, within), **merged}
                continue
            name = self._key(key_node)
            here = f"{path}.{name}".strip(".")
            line = key_node.start_mark.line + 1
            if name in own:
                self.errors.append(FieldError(here, None, f"is given twice, in lines {self.lines[here]} and {line}"))
            self.lines[here] = line
            own[name] = self.value(value_node, here, within)
        return {**merged, **own}

    def _merged(self, node: yaml.Node, path: str, within: tuple[yaml.Node, ...]) -> dict[str, object]:
        groups = node.value if isinstance(node, yaml.SequenceNode) else [node]
        merged: dict[str, object] = {}
        for group in reversed(groups):  # the first of a list wins
            value = self.value(group, path, within)
            if not isinstance(value, dict):
                raise yaml.MarkedYAMLError(problem="<< takes a mapping", problem_mark=group.start_mark)
            merged.update(value)
        return merged

    def _key(self, node: yaml.Node) -> str:
        value = self._scalar(node, "") if isinstance(node, yaml.ScalarNode) else None
        if value is None or isinstance(value, float):
            raise yaml.MarkedYAMLError(problem="a field's name must be a text", problem_mark=node.start_mark)
        return str(value).lower() if isinstance(value, bool) else str(value)

    def _scalar(self, node: yaml.Node, path: str) -> object:
        text: str = node.value
        if node.tag == f"{_STANDARD}str":
            return text
        value = scalar(text)
        kind = {bool: "bool", int: "int", float: "float", type(None): "null"}.get(type(value), "str")
        if node.tag not in (_PLAIN, f"{_STANDARD}{kind}") and (node.tag, kind) != (f"{_STANDARD}float", "int"):
            raise yaml.MarkedYAMLError(problem=f"tag {node.tag} is not known here", problem_mark=node.start_mark)
        if isinstance(value, float) and not math.isfinite(value):
            self.errors.append(FieldError(path, text, "is no number that JSON can hold"))
        return value
