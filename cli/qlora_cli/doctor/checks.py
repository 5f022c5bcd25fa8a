"""Derive findings from a snapshot of the cluster, without I/O."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any

from qlora_api.pod_reasons import IMAGE_REASONS
from qlora_cli.doctor import check_crd, check_jobs, check_profiles
from qlora_cli.doctor.cluster_snapshot import RIGHTS, ClusterSnapshot
from qlora_cli.doctor.findings import Finding, fault, note, ok, unknown
from qlora_cli.kube.names import CHART

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qlora_cli.kube.api_client import Object

OLDEST = (1, 31)
"""Oldest supported version of Kubernetes: the first in which podFailurePolicy is stable."""
INSTALL = f"helm upgrade --install qlora {CHART} -n qlora-system --create-namespace"
GANGS = {"Kueue": "kueue.x-k8s.io", "Volcano": "scheduling.volcano.sh"}


def run_checks(snapshot: ClusterSnapshot, version: str) -> list[Finding]:
    """Run all checks, in the order in which faults should be fixed. ``version`` is that of this command line."""
    return [
        *_cluster(snapshot),
        *_rights(snapshot),
        *check_crd.crds(snapshot, INSTALL),
        *_operator(snapshot, version),
        *_admission(snapshot),
        *_gpus(snapshot),
        *check_profiles.profiles(snapshot),
        *_gang(snapshot),
        *check_jobs.references(snapshot),
        *check_jobs.storage(snapshot),
        *check_jobs.images(snapshot),
        *check_jobs.network(snapshot),
        *_monitors(snapshot),
        *check_jobs.quotas(snapshot),
        *check_jobs.jobs(snapshot),
    ]


def _cluster(snapshot: ClusterSnapshot) -> Iterator[Finding]:
    numbers = snapshot.version.removeprefix("v").split(".")
    known = len(numbers) > 1 and numbers[0].isdecimal() and numbers[1].isdecimal()
    if known and (int(numbers[0]), int(numbers[1])) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        text = f"Kubernetes {snapshot.version} is older than {wanted}"
        yield fault("cluster", text, f"upgrade the cluster to {wanted} or newer")
        return
    who = f", you are {snapshot.user}" if snapshot.user else ""
    yield ok("cluster", f"{snapshot.server} answers, Kubernetes {snapshot.version}{who}")


def _rights(snapshot: ClusterSnapshot) -> Iterator[Finding]:
    lacking = [(verb, what, use) for verb, _, what, use in RIGHTS if snapshot.rights.get((verb, what)) is False]
    if not snapshot.rights:
        yield unknown("rights", "the cluster does not report your permissions")
    elif lacking:
        verbs = ", ".join(f"{verb} {what}" for verb, what, _ in lacking)
        uses = ", ".join(dict.fromkeys(use for _, _, use in lacking))
        reads = all(verb in ("get", "list", "watch") for verb, _, _ in lacking)
        role = "view" if reads else "edit"
        who = snapshot.user or "YOU"
        yield fault(
            "rights",
            f"you may not {verbs} in namespace {snapshot.namespace}: {uses} will be refused",
            f"have an administrator run: kubectl create rolebinding qlora-{role} --clusterrole={role} "
            f"--user={who} -n {snapshot.namespace}",
        )
    else:
        yield ok("rights", f"you have all permissions that this command line needs in namespace {snapshot.namespace}")


# --------------------------------------------------------------------------------------------------------- the operator


def _operator(snapshot: ClusterSnapshot, version: str) -> Iterator[Finding]:
    if snapshot.deployments.denied:
        yield unknown("operator", "you may not list Deployments of other namespaces; jobs below show whether it works")
        return
    if not snapshot.deployments.items:
        yield fault("operator", "there is no Deployment of the operator in this cluster", f"install it: {INSTALL}")
        return
    yield from _several_operators(snapshot)
    deployment = snapshot.deployments.items[0]
    meta, status = deployment["metadata"], deployment.get("status") or {}
    place = _place(deployment)
    if deployment["spec"].get("replicas", 1) == 0:
        command = f"kubectl scale deployment {meta['name']} -n {meta['namespace']} --replicas=1"
        yield fault("operator", f"{place} is scaled to 0", command)
        return
    if not status.get("availableReplicas"):
        yield _unavailable(snapshot, place, meta["namespace"])
        return
    theirs = (meta.get("labels") or {}).get("app.kubernetes.io/version", "")
    if theirs and version and theirs != version:
        yield note(
            "operator",
            f"{place} is of version {theirs}, this command line of {version}",
            "upgrade the older of the two",
        )
    else:
        yield ok("operator", f"{place} is available{f', version {theirs}' if theirs else ''}")
    served = (snapshot.config.value or {}).get("namespaces") or []
    if served and snapshot.namespace not in served:
        yield fault(
            "operator",
            f"it serves only namespaces {', '.join(served)}, and not {snapshot.namespace}",
            f"add {snapshot.namespace} to the chart's value namespaces, or use another namespace",
        )


def _place(deployment: Object) -> str:
    return f"{deployment['metadata']['namespace']}/{deployment['metadata']['name']}"


def _several_operators(snapshot: ClusterSnapshot) -> Iterator[Finding]:
    """Yield pairs of operators that serve the same namespace."""
    known = zip(snapshot.deployments.items, snapshot.configs, strict=False)
    served = [(_place(d), frozenset(c.value.get("namespaces") or ())) for d, c in known if c.there]
    for (first, its), (second, others) in combinations(served, 2):
        shared = its & others if its and others else its | others
        if shared or not (its and others):
            where = f"namespaces {', '.join(sorted(shared))}" if shared else "all namespaces"
            yield fault(
                "operator",
                f"{first} and {second} both serve {where}; each replaces what the other one writes",
                "uninstall one, or give each its own namespaces by the chart's value namespaces",
            )
    if len(snapshot.deployments.items) > max(len(served), 1):
        places = ", ".join(map(_place, snapshot.deployments.items))
        yield unknown("operator", f"there are several: {places}; you may not read which namespaces each of them serves")


def _unavailable(snapshot: ClusterSnapshot, place: str, namespace: str) -> Finding:
    """Return the reason why the operator's pod does not run, as its status gives it."""
    for pod in snapshot.operator_pods.items:
        for container in (pod.get("status") or {}).get("containerStatuses") or ():
            waiting = (container.get("state") or {}).get("waiting") or {}
            ended = (container.get("lastState") or {}).get("terminated") or {}
            name = pod["metadata"]["name"]
            if waiting.get("reason") in IMAGE_REASONS:
                text = f"{place} cannot start: {waiting['reason']}: {waiting.get('message', '')}".rstrip(": ")
                return fault(
                    "operator", text, "correct the chart's values image.repository, image.tag and image.pullSecrets"
                )
            if waiting.get("reason") == "CrashLoopBackOff":
                last = f", exit code {ended['exitCode']}" if "exitCode" in ended else ""
                text = f"{place} starts and ends again (CrashLoopBackOff{last})"
                return fault("operator", text, f"kubectl logs {name} -n {namespace} --previous says why")
        for condition in (pod.get("status") or {}).get("conditions") or ():
            if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
                text = f"{place} finds no node: {condition.get('message', '')}"
                return fault("operator", text, "free a node, or change the chart's nodeSelector and tolerations")
    return fault("operator", f"{place} is not available", f"kubectl describe pods -n {namespace} says why")


def _admission(snapshot: ClusterSnapshot) -> Iterator[Finding]:
    if snapshot.policies.denied or snapshot.bindings.denied:
        yield unknown("admission", "you may not list ValidatingAdmissionPolicies")
        return
    names = [policy["metadata"]["name"] for policy in snapshot.policies.items]
    bound = {binding["spec"]["policyName"] for binding in snapshot.bindings.items}
    unbound = [name for name in names if name not in bound]
    if names and not unbound:
        yield ok("admission", f"policy {names[0]} is bound")
        return
    half = f"{unbound[0]} has no binding" if unbound else "is missing"
    yield fault(
        "admission",
        f"the operator's admission policy {half}: whoever may create jobs can use any Secret there through one",
        f"set the chart's value admissionPolicy.enabled to true: {INSTALL}",
    )


# ------------------------------------------------------------------------------------------------------------- hardware


def _gpus(snapshot: ClusterSnapshot) -> Iterator[Finding]:
    config = snapshot.config.value or {}
    resource = config.get("gpuResource") if config else "nvidia.com/gpu"
    if not resource:
        yield ok("gpus", "the operator is configured to train on CPUs")
        return
    if snapshot.nodes.denied:
        yield unknown("gpus", f"you may not list nodes; whether they have {resource} shows when a job waits")
        return
    counts = {node["metadata"]["name"]: _count(node, resource) for node in snapshot.nodes.items}
    having = {name: count for name, count in counts.items() if count}
    if not having:
        yield fault(
            "gpus",
            f"none of {len(counts)} nodes offers {resource}",
            "install the device plugin (or GPU operator) of your hardware, or set the chart's gpuResource otherwise",
        )
        return
    usable = {n["metadata"]["name"] for n in snapshot.nodes.items if _is_usable(n)} & having.keys()
    if not usable:
        yield fault(
            "gpus",
            f"no node with {resource} is ready: {', '.join(sorted(having))}",
            "kubectl describe node says why; kubectl uncordon one that is cordoned",
        )
        return
    total, most = sum(having[name] for name in usable), max(having[name] for name in usable)
    yield ok("gpus", f"{total} {resource} on {len(usable)} ready nodes, up to {most} on one")
    yield from check_jobs.too_wide(snapshot, most)


def _count(node: Object, resource: str) -> int:
    text = str(((node.get("status") or {}).get("allocatable") or {}).get(resource, "0"))
    return int(text) if text.isdecimal() else 0


def _is_usable(node: Object) -> bool:
    conditions = (node.get("status") or {}).get("conditions") or ()
    ready = any(c.get("type") == "Ready" and c.get("status") == "True" for c in conditions)
    return ready and not (node.get("spec") or {}).get("unschedulable")


def _gang(snapshot: ClusterSnapshot) -> Iterator[Finding]:
    """Check what starts all pods of a job at once, and whether what is configured is there."""
    if not snapshot.groups.there:
        yield unknown("gang", "the API groups cannot be listed")
        return
    names = {group["name"] for group in snapshot.groups.items}
    offered = [gang for gang, group in GANGS.items() if group in names]
    if any(r["name"] == "podgroups" for r in snapshot.gang_resources.items):
        offered.insert(0, "Native")
    wanted: Any = (snapshot.config.value or {}).get("gang", "Auto")
    if wanted not in ("Auto", "None") and wanted not in offered:
        yield fault(
            "gang",
            f"the operator is configured for {wanted}, and this cluster serves {', '.join(offered) or 'none'}",
            f"install {wanted}, or set the chart's value gang to Auto",
        )
    elif offered:
        chosen = offered[0] if wanted == "Auto" else wanted
        yield ok("gang", f"pods of a job start together by {chosen} (served: {', '.join(offered)})")
    else:
        yield note(
            "gang",
            "nothing here starts all pods of a job together: two jobs of several workers can hold each other's GPUs",
            "before jobs of several workers compete, install Kueue or Volcano, or switch on Kubernetes' own gangs",
        )


def _monitors(snapshot: ClusterSnapshot) -> Iterator[Finding]:
    names = {group["name"] for group in snapshot.groups.items}
    if "monitoring.coreos.com" not in names:
        yield note(
            "monitoring", "the Prometheus operator's API is not served; metrics are there to be scraped all the same"
        )
    elif snapshot.monitors.denied:
        yield unknown("monitoring", "you may not list PodMonitors of all namespaces")
    elif snapshot.monitors.items:
        yield ok("monitoring", f"PodMonitor {snapshot.monitors.items[0]['metadata']['name']} scrapes all ranks")
    else:
        yield note(
            "monitoring",
            "no PodMonitor scrapes the trainers",
            "set the chart's value metrics.podMonitor.enabled to true",
        )
