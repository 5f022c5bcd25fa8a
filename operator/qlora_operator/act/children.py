"""Create and delete what belongs to jobs: child Jobs, keys, network policies, and a namespace's shared Service."""

from __future__ import annotations

import asyncio
import base64
import secrets
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from qlora_operator.kube.client import Api, ApiError, Object
from qlora_operator.manifests.render import service
from qlora_operator.names import KEY_ENTRY, SERVICE
from qlora_operator.state.cache import Key, Known, ObjectCache
from qlora_operator.state.observed import ObservedJob
from qlora_operator.state.ownership import is_same_object

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


class Children:
    """Creates children with POST (docs/decisions/0007) and deletes them by UID. Made Jobs go into the cache at once."""

    def __init__(self, cache: ObjectCache, api: Api) -> None:
        self._cache, self._api = cache, api
        self._unread: defaultdict[Key, set[str]] = defaultdict(set)
        """Names of what was created of the kinds that cannot be read."""
        self._service_locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.services: set[str] = set()
        """Namespaces that have the shared Service. Its watch takes out those from which somebody deletes it."""

    def forget(self, key: Key) -> None:
        """Forget what was created for a job that needs no more."""
        self._unread.pop(key, None)

    async def create(self, key: Key, bodies: Iterable[Object]) -> bool:
        """Create what a decision asks for, in this order, except what is there already.

        Return whether a Job is not as a new one is: a queue has suspended it, or it was there. No watch tells of that
        again.

        Raises:
            ApiError: one was refused; those after it are not created.

        """
        unusual = False
        for body in bodies:
            if body["kind"] == "Service":
                await self._create_service(key, body)
            elif body["kind"] in UNREAD:
                await self._create_unread(key, body)
            else:
                created = await self._create(key, body)
                if created["kind"] == "Job":
                    self._cache.take_child(created)
                    unusual = bool(created["spec"].get("suspend") or created.get("status"))
        return unusual

    async def delete(self, key: Key, known: Known, children: Iterable[ObservedJob]) -> None:
        """Delete child Jobs."""
        for child in children:
            await self.delete_once(known, f"/apis/batch/v1/namespaces/{key[0]}/jobs/{child.name}", child.uid)

    async def delete_once(self, known: Known, path: str, uid: str) -> None:
        """Delete an object, and remember that it was: its watch says so later."""
        if await self._api.delete(path, uid):
            known.deleted |= {uid}

    async def delete_unused_service(self, namespace: str) -> None:
        """Delete the shared Service with the last job of its namespace, and not while another job makes sure of it."""
        if namespace not in self.services:
            return
        async with self._service_locks[namespace]:
            if any(key[0] == namespace and known.job for key, known in self._cache):
                return
            await self._delete_service(namespace)
            self.services.discard(namespace)

    async def _delete_service(self, namespace: str) -> None:
        """Delete the shared Service, and nothing else that has its name by now."""
        path = f"/api/v1/namespaces/{namespace}/services/{SERVICE}"
        try:
            there = await self._api.get(path)
        except ApiError as error:
            if error.status != 404:
                raise
            return
        if is_same_object(service(namespace), there):
            await self._api.delete(path, there["metadata"]["uid"])

    async def _create_service(self, key: Key, body: Object) -> None:
        async with self._service_locks[key[0]]:
            if key[0] not in self.services:
                await self._create(key, body)
                self.services.add(key[0])

    async def _create_unread(self, key: Key, body: Object) -> None:
        """Create what the operator may create and not read. Its name has the job's UID: what is there is the job's."""
        name, created = body["metadata"]["name"], self._unread[key]
        if name in created:
            return
        try:
            await self._api.create(collection_of(body, key[0]), with_new_key(body))
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise
        created.add(name)

    async def _create(self, key: Key, body: Object) -> Object:
        collection = collection_of(body, key[0])
        try:
            return await self._api.create(collection, body)
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise
            return await self._existing(collection, body)

    async def _existing(self, collection: str, body: Object) -> Object:
        """Return the object under a child's name, if it is this job's and not of an earlier job of the same name."""
        name = body["metadata"]["name"]
        there = await self._api.get(f"{collection}/{name}")
        if not is_same_object(body, there):
            text = f'a {body["kind"]} named "{name}" exists that does not belong to this job'
            remedy = "the operator waits until it is deleted: delete it, or give the job another name"
            raise ApiError(409, "Conflict", f"{text}; {remedy}")
        there.setdefault("kind", body["kind"])
        return there
