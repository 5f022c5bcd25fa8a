"""From what was read to findings. Pure: no clock, nothing is asked."""

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
"""Kubernetes. podFailurePolicy is stable from here on."""
INSTALL = f"helm upgrade --install qlora {CHART} -n qlora-system --create-namespace"
GANGS = {"Kueue": "kueue.x-k8s.io", "Volcano": "scheduling.volcano.sh"}


def run_checks(seen: ClusterSnapshot, version: str) -> list[Finding]:
    """Everything, in the order in which one would mend it. ``version``: this command line's."""
    return [
        *_cluster(seen),
        *_rights(seen),
        *check_crd.crd(seen, INSTALL),
        *_operator(seen, version),
        *_admission(seen),
        *_gpus(seen),
        *check_profiles.profiles(seen),
        *_gang(seen),
        *check_jobs.references(seen),
        *check_jobs.storage(seen),
        *check_jobs.images(seen),
        *check_jobs.network(seen),
        *_monitors(seen),
        *check_jobs.quotas(seen),
        *check_jobs.jobs(seen),
    ]


def _cluster(seen: ClusterSnapshot) -> Iterator[Finding]:
    numbers = seen.version.removeprefix("v").split(".")
    known = len(numbers) > 1 and numbers[0].isdecimal() and numbers[1].isdecimal()
    if known and (int(numbers[0]), int(numbers[1])) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        text = f"Kubernetes {seen.version} is older than {wanted}"
        yield fault("cluster", text, f"upgrade the cluster to {wanted} or newer")
        return
    who = f", you are {seen.user}" if seen.user else ""
    yield ok("cluster", f"{seen.server} answers, Kubernetes {seen.version}{who}")


def _rights(seen: ClusterSnapshot) -> Iterator[Finding]:
    lacking = [(verb, what, use) for verb, _, what, use in RIGHTS if seen.rights.get((verb, what)) is False]
    if not seen.rights:
        yield unknown("rights", "the cluster does not say what you may do")
    elif lacking:
        verbs = ", ".join(f"{verb} {what}" for verb, what, _ in lacking)
        uses = ", ".join(dict.fromkeys(use for _, _, use in lacking))
        reads = all(verb in ("get", "list", "watch") for verb, _, _ in lacking)
        role = "view" if reads else "edit"
        who = seen.user or "YOU"
        yield fault(
            "rights",
            f"you may not {verbs} in namespace {seen.namespace}: {uses} will be refused",
            f"have an administrator run: kubectl create rolebinding qlora-{role} --clusterrole={role} "
            f"--user={who} -n {seen.namespace}",
        )
    else:
        yield ok("rights", f"all that this command line does is allowed you in namespace {seen.namespace}")


# --------------------------------------------------------------------------------------------------------- the operator


def _operator(seen: ClusterSnapshot, version: str) -> Iterator[Finding]:
    if seen.deployments.denied:
        yield unknown("operator", "you may not list Deployments of other namespaces; jobs below show whether it works")
        return
    if not seen.deployments.items:
        yield fault("operator", "there is no Deployment of the operator in this cluster", f"install it: {INSTALL}")
        return
    yield from _several_operators(seen)
    deployment = seen.deployments.items[0]
    meta, status = deployment["metadata"], deployment.get("status") or {}
    place = _place(deployment)
    if deployment["spec"].get("replicas", 1) == 0:
        command = f"kubectl scale deployment {meta['name']} -n {meta['namespace']} --replicas=1"
        yield fault("operator", f"{place} is scaled to 0", command)
        return
    if not status.get("availableReplicas"):
        yield _unavailable(seen, place, meta["namespace"])
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
    served = (seen.config.value or {}).get("namespaces") or []
    if served and seen.namespace not in served:
        yield fault(
            "operator",
            f"it serves only namespaces {', '.join(served)}, and not {seen.namespace}",
            f"add {seen.namespace} to the chart's value namespaces, or use another namespace",
        )


def _place(deployment: Object) -> str:
    return f"{deployment['metadata']['namespace']}/{deployment['metadata']['name']}"


def _several_operators(seen: ClusterSnapshot) -> Iterator[Finding]:
    """Give the operators that serve a namespace together. Each of its own namespaces may have one."""
    known = zip(seen.deployments.items, seen.configs, strict=False)
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
    if len(seen.deployments.items) > max(len(served), 1):
        places = ", ".join(map(_place, seen.deployments.items))
        yield unknown("operator", f"there are several: {places}; you may not read which namespaces each of them serves")


def _unavailable(seen: ClusterSnapshot, place: str, namespace: str) -> Finding:
    """Return why the operator's pod does not run, in its own words."""
    for pod in seen.operator_pods.items:
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


def _admission(seen: ClusterSnapshot) -> Iterator[Finding]:
    if seen.policies.denied or seen.bindings.denied:
        yield unknown("admission", "you may not list ValidatingAdmissionPolicies")
        return
    names = [policy["metadata"]["name"] for policy in seen.policies.items]
    bound = {binding["spec"]["policyName"] for binding in seen.bindings.items}
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


def _gpus(seen: ClusterSnapshot) -> Iterator[Finding]:
    config = seen.config.value or {}
    resource = config.get("gpuResource") if config else "nvidia.com/gpu"
    if not resource:
        yield ok("gpus", "the operator is configured to train on CPUs")
        return
    if seen.nodes.denied:
        yield unknown("gpus", f"you may not list nodes; whether they have {resource} shows when a job waits")
        return
    counts = {node["metadata"]["name"]: _count(node, resource) for node in seen.nodes.items}
    having = {name: count for name, count in counts.items() if count}
    if not having:
        yield fault(
            "gpus",
            f"none of {len(counts)} nodes offers {resource}",
            "install the device plugin (or GPU operator) of your hardware, or set the chart's gpuResource otherwise",
        )
        return
    usable = {n["metadata"]["name"] for n in seen.nodes.items if _is_usable(n)} & having.keys()
    if not usable:
        yield fault(
            "gpus",
            f"no node with {resource} is ready: {', '.join(sorted(having))}",
            "kubectl describe node says why; kubectl uncordon one that is cordoned",
        )
        return
    total, most = sum(having[name] for name in usable), max(having[name] for name in usable)
    yield ok("gpus", f"{total} {resource} on {len(usable)} ready nodes, up to {most} on one")
    yield from check_jobs.too_wide(seen, most)


def _count(node: Object, resource: str) -> int:
    text = str(((node.get("status") or {}).get("allocatable") or {}).get(resource, "0"))
    return int(text) if text.isdecimal() else 0


def _is_usable(node: Object) -> bool:
    conditions = (node.get("status") or {}).get("conditions") or ()
    ready = any(c.get("type") == "Ready" and c.get("status") == "True" for c in conditions)
    return ready and not (node.get("spec") or {}).get("unschedulable")


def _gang(seen: ClusterSnapshot) -> Iterator[Finding]:
    """Check what starts all pods of a job at once, and whether what is configured is there."""
    if not seen.groups.there:
        yield unknown("gang", "the API groups cannot be listed")
        return
    names = {group["name"] for group in seen.groups.items}
    offered = [gang for gang, group in GANGS.items() if group in names]
    if any(r["name"] == "podgroups" for r in seen.gang_resources.items):
        offered.insert(0, "Native")
    wanted: Any = (seen.config.value or {}).get("gang", "Auto")
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


def _monitors(seen: ClusterSnapshot) -> Iterator[Finding]:
    names = {group["name"] for group in seen.groups.items}
    if "monitoring.coreos.com" not in names:
        yield note(
            "monitoring", "the Prometheus operator's API is not served; metrics are there to be scraped all the same"
        )
    elif seen.monitors.denied:
        yield unknown("monitoring", "you may not list PodMonitors of all namespaces")
    elif seen.monitors.items:
        yield ok("monitoring", f"PodMonitor {seen.monitors.items[0]['metadata']['name']} scrapes all ranks")
    else:
        yield note(
            "monitoring",
            "no PodMonitor scrapes the trainers",
            "set the chart's value metrics.podMonitor.enabled to true",
        )
