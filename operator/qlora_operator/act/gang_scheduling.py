"""Find out which ways of starting all pods of an attempt or none the cluster offers.

Native: Kubernetes makes a Workload and a PodGroup of an Indexed Job by itself where its gates are on (KEP-4671).
"""

from __future__ import annotations

import logging

from qlora_api.spec import Gang
from qlora_operator.kube.client import Api

log = logging.getLogger(__name__)

GROUPS = {"kueue.x-k8s.io": Gang.KUEUE, "scheduling.volcano.sh": Gang.VOLCANO}
NATIVE_GROUP, NATIVE_RESOURCE = "scheduling.k8s.io", "podgroups"


async def discover_gangs(api: Api) -> frozenset[Gang]:
    """Look at the API groups that the cluster serves."""
    groups = {g["name"]: g for g in (await api.get("/apis"))["groups"]}
    found = {gang for name, gang in GROUPS.items() if name in groups}
    for version in groups.get(NATIVE_GROUP, {}).get("versions", ()):
        resources = (await api.get(f"/apis/{version['groupVersion']}"))["resources"]
        if any(r["name"] == NATIVE_RESOURCE for r in resources):
            found.add(Gang.NATIVE)
    log.info("gang scheduling offered here: %s", ", ".join(sorted(found)) or "none")
    return frozenset(found)
