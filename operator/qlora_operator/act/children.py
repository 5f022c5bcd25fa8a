"""Create children: in which order, and with the values that no decision knows."""

from __future__ import annotations

import base64
import secrets
from typing import Any

from qlora_operator.names import KEY_ENTRY

KEY_BYTES = 32
UNREAD = frozenset({"Secret", "NetworkPolicy"})
"""Kinds that the operator may create and not read."""
_PLURALS = {
    "Job": "jobs",
    "NetworkPolicy": "networkpolicies",
    "PodGroup": "podgroups",
    "Secret": "secrets",
    "Service": "services",
}


def collection_of(body: dict[str, Any], namespace: str) -> str:
    """Return the path of the collection that a child is created in."""
    group = body["apiVersion"]
    return f"/{'api' if group == 'v1' else 'apis'}/{group}/namespaces/{namespace}/{_PLURALS[body['kind']]}"


def with_new_key(body: dict[str, Any]) -> dict[str, Any]:
    """Put a random key into a Secret; return any other child as it is.

    The key is 32 bytes in hexadecimal, so that its file is text. Nobody but the API server keeps it: a second create
    finds the first Secret, whose key counts.
    """
    if body["kind"] != "Secret":
        return body
    text = secrets.token_hex(KEY_BYTES).encode()
    return body | {"data": {KEY_ENTRY: base64.b64encode(text).decode()}}
