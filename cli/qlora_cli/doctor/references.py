"""Check what jobs name: Secrets, claims, queues, priority classes, and a Secret's endpoint of object storage."""

from __future__ import annotations

import base64
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from qlora_cli.kube.names import core_path
from qlora_storage.store_settings import ENDPOINTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from qlora_cli.doctor.answer import Answer
    from qlora_cli.kube.api_client import Object

CONNECT_SECONDS = 3.0
NEEDED_KEYS = {
    "s3": (("AWS_ACCESS_KEY_ID",), ("AWS_SECRET_ACCESS_KEY",)),
    "gs": (("GOOGLE_SERVICE_ACCOUNT_KEY",),),
    "az": (
        ("AZURE_STORAGE_ACCOUNT_NAME",),
        ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN", "AZURE_CLIENT_SECRET"),
    ),
    "hf": (("HF_TOKEN",),),
    "MLflow": (("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME"),),
    "WandB": (("WANDB_API_KEY",),),
}
"""Keys that a Secret must hold for a URI scheme or a tracking tool: one of each group."""


@dataclass(frozen=True)
class ReferencedObject:
    """One object that a job names."""

    kind: str
    name: str
    path: str
    job: str
    field: str
    """Below spec."""
    scheme: str = ""
    """Scheme of the URI that a Secret's credentials are for, or the type of a tracking tool."""


def of_jobs(jobs: Sequence[Object], namespace: str) -> list[ReferencedObject]:
    """Every object that jobs name, once."""
    found: dict[tuple[str, str, str], ReferencedObject] = {}
    for job in jobs:
        for named in _of_job(job, namespace):
            found.setdefault((named.kind, named.name, named.scheme), named)
    return list(found.values())


def _of_job(job: Object, namespace: str) -> Iterator[ReferencedObject]:
    name, spec = job["metadata"]["name"], job.get("spec") or {}
    train = (spec.get("dataset") or {}).get("train") or {}
    groups = (
        ("model", spec.get("model") or {}, "source"),
        ("dataset.train", train, "source"),
        ("output", spec.get("output") or {}, "destination"),
        *((f"tracking[{number}]", sink, "folder") for number, sink in enumerate(spec.get("tracking") or ())),
    )
    for field, group, key in groups:
        uri = str(group.get(key, ""))
        scheme, _, rest = uri.partition("://")
        if secret := group.get("credentials"):
            path = core_path(namespace, "secrets", secret)
            kind = scheme or str(group.get("type", ""))
            yield ReferencedObject("Secret", secret, path, name, f"{field}.credentials", kind)
        if scheme == "pvc":
            claim = rest.partition("/")[0]
            path = core_path(namespace, "persistentvolumeclaims", claim)
            yield ReferencedObject("PersistentVolumeClaim", claim, path, name, f"{field}.{key}")
    scheduling = spec.get("scheduling") or {}
    if priority := scheduling.get("priorityClassName"):
        path = f"/apis/scheduling.k8s.io/v1/priorityclasses/{priority}"
        yield ReferencedObject("PriorityClass", priority, path, name, "scheduling.priorityClassName")
    if (queue := scheduling.get("queue")) and scheduling.get("gang") in (None, "Auto", "Kueue"):
        path = f"/apis/kueue.x-k8s.io/v1beta1/namespaces/{namespace}/localqueues/{queue}"
        yield ReferencedObject("LocalQueue", queue, path, name, "scheduling.queue")


def missing_keys(secret: Object, scheme: str) -> list[str]:
    """Keys that a Secret should have for a scheme and has not; of alternatives the first."""
    there = (secret.get("data") or {}).keys()
    return [group[0] for group in NEEDED_KEYS.get(scheme, ()) if not there & set(group)]


def endpoints(
    named: Iterable[tuple[ReferencedObject, Answer]], get: Callable[[str], Answer]
) -> Iterator[tuple[str, str, str]]:
    """Endpoints of object storage that Secrets name: URL, the Secret, and what is wrong, if anything."""
    told = set()
    for each, answer in named:
        if each.kind != "Secret" or not answer.there:
            continue
        url = _endpoint(answer.value)
        if url and url not in told:
            told.add(url)
            yield url, each.name, _trouble(url, each, get)


def _endpoint(secret: Object) -> str:
    data: dict[str, Any] = secret.get("data") or {}
    for name in ENDPOINTS:
        if name in data:
            return base64.b64decode(data[name]).decode(errors="replace").strip()
    return ""


def _trouble(url: str, named: ReferencedObject, get: Callable[[str], Answer]) -> str:
    """Return what is wrong with an endpoint: in the cluster its Service, elsewhere its port, as seen from here."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme not in ("http", "https") or not host:
        return "is no URL of the form https://host:port"
    before, is_service, _ = f"{host}.".partition(".svc.")  # what follows is the cluster's domain
    service = before.rstrip(".").split(".")
    inside = bool(is_service) or (len(service) == 1 and service[0] != "localhost")
    if inside:
        here = named.path.split("/")[4]
        namespace = service[1] if len(service) > 1 else here
        answer = get(core_path(namespace, "services", service[0]))
        return f"there is no Service {service[0]} in namespace {namespace}" if answer.missing else ""
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        return f"does not answer from this machine ({error})"
    return ""
