"""Tell lost nodes, of those whose pods were evicted and do not end."""

from __future__ import annotations

import time

from qlora_operator.kube.client import Api, ApiError

NODE_SECONDS = 5.0
"""Time for which a node's state, once read, is reused."""


class LostNodes:
    """Looks at nodes, and keeps for a moment what it saw."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._known: dict[str, tuple[float, bool]] = {}

    async def is_lost(self, node: str) -> bool:
        """Return whether a node is gone or not ready. Asked only of nodes whose pods were evicted and do not end."""
        at, lost = self._known.get(node, (-NODE_SECONDS, False))
        if time.monotonic() - at < NODE_SECONDS:
            return lost
        try:
            body = await self._api.get(f"/api/v1/nodes/{node}")
            ready = next((c["status"] for c in body["status"].get("conditions", ()) if c["type"] == "Ready"), "Unknown")
            lost = ready != "True"
        except ApiError as error:
            if error.status not in (403, 404):
                raise
            lost = error.status == 404  # without the right to look, the pod's overdue end tells later
        self._known[node] = (time.monotonic(), lost)
        return lost
