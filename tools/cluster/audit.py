"""Read the API server's audit log: requests and their users."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

READS = frozenset({"get", "list", "watch"})


@dataclass(frozen=True)
class Request:
    """One finished request. Written by ``audit-policy.yaml``: writes of all, reads of all but the control plane."""

    verb: str
    """As RBAC names it: get, list, watch, create, update, patch, delete, deletecollection."""
    resource: str
    """Plural name, with the subresource: ``jobs/status``."""
    namespace: str
    name: str
    user: str
    user_agent: str
    code: int
    """HTTP status of the answer."""
    at: datetime
    """Time at which the request arrived."""

    @property
    def is_write(self) -> bool:
        return self.verb not in READS


def read_audit_log(path: Path, start: int = 0) -> list[Request]:
    """Read the requests from a byte offset on. A last line that is not whole yet is left out."""
    with path.open("rb") as file:
        file.seek(start)
        text = file.read()
    return [_request(json.loads(line)) for line in text[: text.rfind(b"\n") + 1].splitlines()]


def _request(event: dict) -> Request:
    target = event.get("objectRef", {})
    return Request(
        verb=event["verb"],
        resource="/".join(p for p in (target.get("resource"), target.get("subresource")) if p),
        namespace=target.get("namespace", ""),
        name=target.get("name", ""),
        user=event["user"]["username"],
        user_agent=event.get("userAgent", ""),
        code=event.get("responseStatus", {}).get("code", 0),
        at=datetime.fromisoformat(event["requestReceivedTimestamp"]),
    )
