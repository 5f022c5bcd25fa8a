"""Errors between here and a cluster.

::

    ValueError
    └── ClusterError           one line for a person: field or object, value, remedy
        ├── ConfigError        kubeconfig: missing, broken, a context that is not there
        ├── UnreachableError   no answer, or credentials that are not taken
        └── KubeApiError           the API server's own refusal, made readable
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from qlora_cli.kube.names import GROUP

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_KIND = re.compile(
    r"^(Invalid value|Unsupported value|Duplicate value|Too long|Too many|Required value|Forbidden)(?:: |$)"
)
_SHOWN = re.compile(r'^(?P<value>"(?:[^"\\]|\\.)*"|\{.*?\}|\[.*?\]|[^:\s]+): (?P<words>.*)$', re.DOTALL)
_NOT_CHECKED = "some validation rules were not checked"
_DENIED = re.compile(r"ValidatingAdmissionPolicy '.*?' with binding '.*?' denied request: (.*)", re.DOTALL)
_MAY_NOT = re.compile(
    r'User "(?P<user>[^"]*)" cannot (?P<verb>\S+) resource "(?P<what>[^"]*)".*?(?:namespace "(?P<ns>[^"]*)")?$'
)
_STRICT = re.compile(r"strict decoding error: (.*)", re.DOTALL)


class ClusterError(ValueError):
    """Something is wrong with the cluster, or with the way to it; ``str()`` says what to do."""


class ConfigError(ClusterError):
    """No way to a cluster is configured, or it cannot be understood."""


class UnreachableError(ClusterError):
    """No answer, or none but "who are you?"."""


class KubeApiError(ClusterError):
    """The API server refused.

    ``reason`` is the Status object's, such as ``NotFound``; ``str()`` has a line for each cause.
    """

    def __init__(self, code: int, status: Mapping[str, Any], path: str) -> None:
        self.code = code
        self.reason = str(status.get("reason") or "")
        self.message = str(status.get("message") or "").strip()
        self.path = path
        super().__init__("\n".join(_lines(self, status)))

    @property
    def not_found(self) -> bool:
        return self.code == 404

    @property
    def forbidden(self) -> bool:
        return self.code == 403


def _lines(error: KubeApiError, status: Mapping[str, Any]) -> Iterator[str]:
    """Yield the refusal in few words: field, value, what is allowed."""
    causes = (status.get("details") or {}).get("causes") or []
    fields = [c for c in causes if c.get("field") and _NOT_CHECKED not in c.get("message", "")]
    if error.code == 422 and fields:
        yield from (_plain(cause["field"], cause.get("message", "")) for cause in fields)
    elif denied := _DENIED.search(error.message):
        yield denied[1]
    elif found := _MAY_NOT.search(error.message):
        yield may_not(found["user"], found["verb"], found["what"], found["ns"] or "")
    elif strict := _STRICT.search(error.message):
        yield strict[1]
    elif error.code == 404 and f"/apis/{GROUP}/" in error.path and not (status.get("details") or {}).get("name"):
        yield "this cluster serves no QLoRAJobs: install the operator, or see 'qlora doctor'"
    else:
        yield error.message or f"HTTP {error.code} for {error.path}"


def may_not(user: str, verb: str, what: str, namespace: str) -> str:
    """Return a missing permission and its remedy."""
    where = f" in namespace {namespace}" if namespace else " in the whole cluster"
    role = "view" if verb in ("get", "list", "watch") else "edit"
    hint = f"; the cluster role {role} includes it, have it bound to you there" if namespace else ""
    return f'user "{user}" may not {verb} {what}{where}{hint}'


def _plain(field: str, message: str) -> str:
    """Return a cause as field, value and what is allowed, without the parts that only a program reads."""
    kind = _KIND.match(message)
    if kind is None:
        return f"{field}: {message}"
    rest = message[kind.end() :]
    if kind[1] == "Required value":
        return f"{field}: is required" + (f": {rest}" if rest else "")
    found = _SHOWN.match(rest)
    value, words = (found["value"], found["words"]) if found else ("", rest)
    words = words.removeprefix(f"{field} in body ")
    if not value or value.startswith(("{", "[")) or value in ('"object"', '"array"', "null"):
        return f"{field}: {words}"
    return f"{field}: {value} {words}"
