"""Post Events on jobs and sweeps."""

from __future__ import annotations

import logging

from qlora_api.job import QLoRAJob
from qlora_api.sweep.sweep import QLoRASweep
from qlora_operator.decide.decision import Note
from qlora_operator.decide.events import event_of
from qlora_operator.kube.client import TRANSIENT, Api, ApiError

log = logging.getLogger(__name__)


async def post_event(api: Api, regarding: QLoRAJob | QLoRASweep, note: Note) -> None:
    """Post an Event. Losing one loses nothing that status does not say."""
    meta = regarding.metadata
    path = f"/apis/events.k8s.io/v1/namespaces/{meta.namespace}/events"
    try:
        await api.create(path, event_of(regarding, note, api.clock.now()))
    except (ApiError, *TRANSIENT) as error:
        log.info("%s/%s: an Event could not be posted: %s", meta.namespace, meta.name, error)
