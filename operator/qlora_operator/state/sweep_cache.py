"""Cache the QLoRASweeps, as JSON. Their trials are QLoRAJobs, which the object cache has."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_api.job import API_VERSION
from qlora_api.sweep.sweep import SWEEP_KIND
from qlora_operator.names import KUEUE_PRIORITY_LABEL
from qlora_operator.state.cache import KEPT_META, Key, is_observed


@dataclass(frozen=True, slots=True)
class StoredSweep:
    """A QLoRASweep without what nobody here reads."""

    uid: str
    version: int
    body: bytes
    is_quiescent: bool
    """It is over, does not go by itself, and its status is of its generation."""


class SweepCache:
    """All QLoRASweeps, by namespace and name."""

    def __init__(self) -> None:
        self._sweeps: dict[Key, StoredSweep] = {}

    def __iter__(self) -> Iterator[tuple[Key, StoredSweep]]:
        return iter(self._sweeps.items())

    def get(self, key: Key) -> StoredSweep | None:
        return self._sweeps.get(key)

    def held(self) -> Iterator[tuple[Key, str]]:
        """Give the keys and UIDs of all sweeps."""
        return ((key, stored.uid) for key, stored in self._sweeps.items())

    def take(self, body: Mapping[str, Any]) -> Key | None:
        """Take in a QLoRASweep; its key, None where it is no news."""
        meta = body["metadata"]
        key = meta["namespace"], meta["name"]
        version, before = int(meta["resourceVersion"]), self._sweeps.get(key)
        if before and before.uid == meta["uid"] and version <= before.version:
            return None
        labels = {k: v for k, v in (meta.get("labels") or {}).items() if k == KUEUE_PRIORITY_LABEL}
        kept = {
            "apiVersion": body.get("apiVersion", API_VERSION),  # lists leave both out
            "kind": body.get("kind", SWEEP_KIND),
            "metadata": {**{name: meta[name] for name in KEPT_META if name in meta}, "labels": labels},
            "spec": body["spec"],
            **({"status": body["status"]} if body.get("status") else {}),
        }
        text = json.dumps(kept, separators=(",", ":")).encode()
        self._sweeps[key] = StoredSweep(meta["uid"], version, text, _is_quiescent(body))
        return key

    def drop(self, body: Mapping[str, Any]) -> Key:
        """Drop a sweep that is gone."""
        meta = body["metadata"]
        key = meta["namespace"], meta["name"]
        self.lose(key, meta["uid"])
        return key

    def lose(self, key: Key, uid: str) -> None:
        """Drop a sweep that is known to be gone, and no later one of its name."""
        stored = self._sweeps.get(key)
        if stored and stored.uid == uid:
            del self._sweeps[key]


def _is_quiescent(body: Mapping[str, Any]) -> bool:
    status = body.get("status") or {}
    is_over = any(c["type"] == "Finished" and c["status"] == "True" for c in status.get("conditions", ()))
    return bool(is_over and is_observed(body) and body["spec"].get("ttlSecondsAfterFinished") is None)
