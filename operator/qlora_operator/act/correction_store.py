"""Keep this cluster's corrections of predicted memory in a ConfigMap that the chart owns."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping

from qlora_api.spec import QLoRAJobSpec
from qlora_api.status import QLoRAJobStatus
from qlora_operator.config import OperatorConfig
from qlora_operator.decide.memory_correction import CorrectionKey, Learned, is_news, learn, ratio_of, read
from qlora_operator.kube.client import TRANSIENT, Api, ApiError

log = logging.getLogger(__name__)


class Corrections:
    """The factors, held here and kept in the ConfigMap. Nothing waits for it: without it all factors are 1.

    Args:
        api: the operator's calls.
        config: the operator's settings.
        show: told all factors when one has changed.

    """

    def __init__(
        self, api: Api, config: OperatorConfig, show: Callable[[Mapping[tuple[str, str], float]], None]
    ) -> None:
        self._api, self._config, self._show = api, config, show
        namespace, _, name = config.memory_config_map.partition("/")
        self._path = f"/api/v1/namespaces/{namespace}/configmaps/{name}" if name else ""
        self._learned: dict[CorrectionKey, Learned] = {}
        self._written: dict[CorrectionKey, Learned] = {}
        self._lock = asyncio.Lock()

    def of(self, spec: QLoRAJobSpec) -> float:
        """For a job; 1 where nothing is learned."""
        place = CorrectionKey.of(spec, self._config) if self._learned else None
        return self._learned[place].correction if place in self._learned else 1.0

    async def refresh(self) -> None:
        """Read the ConfigMap: at the start, and now and then, since a person may have changed it."""
        if not self._path:
            return
        async with self._lock:
            try:
                found = read((await self._api.get(self._path)).get("data") or {})
            except (ApiError, *TRANSIENT) as error:
                log.warning("the memory corrections cannot be read: %s", error)
                return
            for place in found.keys() | self._written.keys():
                if found.get(place) != self._written.get(place):
                    self._learned[place] = found.get(place, Learned())
            self._written = found
            self._tell()

    async def take(self, spec: QLoRAJobSpec, status: QLoRAJobStatus) -> None:
        """Learn from a job that has just ended; write down what has changed enough."""
        place, ratio = CorrectionKey.of(spec, self._config), ratio_of(status)
        if not self._path or place is None or ratio is None:
            return
        async with self._lock:
            after = self._learned[place] = learn(self._learned.get(place, Learned()), ratio)
            self._tell()
            if not is_news(self._written.get(place), after):
                return
            text = json.dumps({"correction": round(after.correction, 4), "jobs": after.jobs})
            try:
                await self._api.patch(self._path, {"data": {str(place): text}})
            except (ApiError, *TRANSIENT) as error:
                log.warning("the memory corrections cannot be written: %s", error)  # with the next job, then
                return
            self._learned |= read({str(place): text})
            self._written[place] = self._learned[place]

    def _tell(self) -> None:
        self._show({(place.gpu, place.quantization): learned.correction for place, learned in self._learned.items()})
