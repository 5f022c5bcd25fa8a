"""Findings about one namespace: what its jobs name, what keeps their pods from starting, what they are cut off from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qlora_api.pod_reasons import IMAGE_REASONS
from qlora_cli.doctor.findings import Finding, fault, note, ok, unknown
from qlora_cli.doctor.references import missing_keys
from qlora_cli.jobs.job_view import is_seen, view
from qlora_cli.kube.names import PART_OF_OPERATOR

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from qlora_cli.doctor.cluster_snapshot import ClusterSnapshot
    from qlora_cli.jobs.job_view import JobView
    from qlora_cli.kube.api_client import Object

UNSEEN_SECONDS = 30
"""An operator that runs takes up a job within one."""
_TRAINER = {"app.kubernetes.io/managed-by": "qlora-operator", "app.kubernetes.io/component": "trainer"}


def references(snapshot: ClusterSnapshot) -> Iterator[Finding]:
    """Secrets, claims, queues and priority classes that jobs name."""
    if not snapshot.named:
        yield ok("references", "no unfinished job names a Secret, claim, queue or priority class")
        return
    good = 0
    for named, answer in snapshot.named:
        who = f'job "{named.job}" names it in spec.{named.field}'
        if answer.denied:
            yield unknown("references", f"you may not get {named.kind} {named.name} ({who})")
        elif answer.missing:
            yield fault(
                "references",
                f"{named.kind} {named.name} is not in namespace {snapshot.namespace}, and {who}"
                if named.kind != "PriorityClass"
                else f"PriorityClass {named.name} is not there, and {who}",
                _create(named.kind, named.name, snapshot.namespace, named.scheme),
            )
        elif named.kind == "Secret" and (keys := missing_keys(answer.value, named.scheme)):
            yield fault(
                "references",
                f"Secret {named.name} has no {', '.join(keys)}, which {named.scheme}:// needs, and {who}",
                f"add {', '.join(keys)} to it, under exactly these names: they become the trainer's environment",
            )
        else:
            good += 1
    if good == len(snapshot.named):
        yield ok("references", f"all {good} objects that unfinished jobs name are there")


def _create(kind: str, name: str, namespace: str, scheme: str) -> str:
    if kind == "Secret":
        keys = {"s3": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"), "hf": ("HF_TOKEN",)}.get(
            scheme, ("NAME",)
        )
        literals = " ".join(f"--from-literal={key}=…" for key in keys)
        return f"kubectl create secret generic {name} -n {namespace} {literals}"
    if kind == "PersistentVolumeClaim":
        return f"create the claim, or correct the job's pvc://{name}/… source"
    return f"create the {kind}, or take it out of the job's spec.scheduling"


def storage(snapshot: ClusterSnapshot) -> Iterator[Finding]:
    """Endpoints of object storage that Secrets name."""
    for url, secret, trouble in snapshot.endpoints:
        if not trouble:
            yield ok("storage", f"{url} (Secret {secret}) is there")
        else:
            yield fault(
                "storage",
                f"{url} (AWS_ENDPOINT_URL of Secret {secret}): {trouble}",
                f"correct the URL in Secret {secret}, or start the object storage; pods must reach it by this name",
            )


def images(snapshot: ClusterSnapshot) -> Iterator[Finding]:
    """Trainer images that cannot be pulled, by pods' own status and by events of pods that are gone."""
    if snapshot.pods.denied and snapshot.events.denied:
        yield unknown("image", "you may not list pods and events")
        return
    told: dict[str, str] = {}
    for pod in snapshot.pods.items:
        for container in (pod.get("status") or {}).get("containerStatuses") or ():
            waiting = (container.get("state") or {}).get("waiting") or {}
            if waiting.get("reason") in IMAGE_REASONS:
                told[container.get("image", "")] = f"{waiting['reason']}: {waiting.get('message', '')}".rstrip(": ")
    for event in snapshot.events.items:
        message = event.get("message") or ""
        about = event.get("involvedObject") or {}
        if (
            about.get("kind") == "Pod"
            and event.get("reason") in ("Failed", "ErrImageNeverPull", "InspectFailed")
            and "image" in message
        ):
            image = message.partition('image "')[2].partition('"')[0]
            if image:
                told.setdefault(image, message)
    for image, message in told.items():
        yield fault(
            "image",
            f"the image {image} cannot be pulled ({' '.join(message.split())[:200]})",
            "correct the chart's values trainer.image.repository and tag, or name a pull secret of this namespace in "
            "trainer.image.pullSecrets",
        )
    if not told:
        yield ok("image", "no trainer waits for its image")


def network(snapshot: ClusterSnapshot) -> Iterator[Finding]:
    """Policies that cut trainers off from each other, from storage, or from the operator."""
    if snapshot.network_policies.denied:
        yield unknown("network", "you may not list NetworkPolicies")
        return
    ours = [p for p in snapshot.network_policies.items if _is_ours(p)]
    if ours:
        yield ok("network", f"NetworkPolicy {ours[0]['metadata']['name']} restricts trainers to what they need")
        return
    policies = [p for p in snapshot.network_policies.items if _selects_trainers(p)]
    value = f"add {snapshot.namespace} to the chart's value networkPolicy.trainers.namespaces"
    if shut := [way for way in ("Ingress", "Egress") if _is_shut(policies, way)]:
        name = next(p["metadata"]["name"] for p in policies if _rules(p, shut[0]) == [])
        effect = "storage is out of reach" if "Egress" in shut else "progress is not seen"
        text = f"NetworkPolicy {name} cuts trainers off ({', '.join(shut)}): workers cannot meet, {effect}"
        yield fault("network", text, f"{value}, which allows what trainers need")
    else:
        text = f"no NetworkPolicy of the operator restricts trainers in namespace {snapshot.namespace}"
        yield note("network", text, f"{value}, if the cluster enforces policies")


def _is_ours(policy: Object) -> bool:
    name, _, value = PART_OF_OPERATOR.partition("=")
    return bool((policy["metadata"].get("labels") or {}).get(name) == value)


def _selects_trainers(policy: Object) -> bool:
    selector: Mapping[str, Any] = (policy.get("spec") or {}).get("podSelector") or {}
    return not selector.get("matchExpressions") and (selector.get("matchLabels") or {}).items() <= _TRAINER.items()


def _is_shut(policies: Sequence[Object], way: str) -> bool:
    """Return whether a direction is forbidden altogether: some policy restricts it, and none allows anything."""
    rules = [_rules(policy, way) for policy in policies]
    return any(r == [] for r in rules) and not any(rules)


def _rules(policy: Object, way: str) -> list[Any] | None:
    """Return the rules of a policy in a direction; None where it says nothing about it."""
    spec = policy.get("spec") or {}
    kinds = spec.get("policyTypes") or ["Ingress", *(["Egress"] if "egress" in spec else [])]
    return list(spec.get(way.lower()) or ()) if way in kinds else None


def quotas(snapshot: ClusterSnapshot) -> Iterator[Finding]:
    """Quotas of GPUs that are used up."""
    for quota in snapshot.quotas.items:
        status = quota.get("status") or {}
        hard, used = status.get("hard") or {}, status.get("used") or {}
        for resource, most in hard.items():
            if "gpu" in resource and str(most).isdecimal() and str(used.get(resource, "0")).isdecimal():
                left = int(most) - int(used.get(resource, "0"))
                if left <= 0:
                    text = f"ResourceQuota {quota['metadata']['name']}: all {most} {resource} are used"
                    yield note("quota", text, "wait for a job to end, suspend one, or have the quota raised")
                else:
                    yield ok("quota", f"{left} of {most} {resource} are left")


def too_wide(snapshot: ClusterSnapshot, most: int) -> Iterator[Finding]:
    """Jobs whose pods want more GPUs than any node has."""
    for job in snapshot.jobs.items:
        wanted = ((job.get("spec") or {}).get("parallelism") or {}).get("gpusPerWorker") or 1
        if wanted > most and not view(job).is_finished:
            yield fault(
                "gpus",
                f'job "{job["metadata"]["name"]}" wants {wanted} GPUs in one pod, and no node has more than {most}',
                f"a new job with spec.parallelism.gpusPerWorker of at most {most}, and more workers",
            )


def _is_old(job: JobView, snapshot: ClusterSnapshot) -> bool:
    return job.created is not None and (snapshot.now - job.created).total_seconds() > UNSEEN_SECONDS


def jobs(snapshot: ClusterSnapshot) -> Iterator[Finding]:
    """Jobs that wait for a hand, and jobs that nobody has looked at."""
    if snapshot.jobs.denied:
        yield unknown("jobs", f"you may not list jobs in namespace {snapshot.namespace}")
        return
    if not snapshot.jobs.there:
        return
    waiting = [view(job) for job in snapshot.jobs.items]
    unseen = [
        v.name for v, job in zip(waiting, snapshot.jobs.items, strict=True) if not is_seen(job) and _is_old(v, snapshot)
    ]
    if unseen:
        yield fault(
            "jobs",
            f"no operator has taken up {', '.join(unseen[:3])}",
            "see 'operator' above: it does not run, does not serve this namespace, or its log says why",
        )
    stuck = [job for job in waiting if job.needs_attention]
    for job in stuck:
        yield fault("jobs", f'job "{job.name}" waits ({job.reason}): {job.message}', f"qlora show {job.name}")
    if not stuck and not unseen:
        yield ok("jobs", f"none of {len(waiting)} jobs in namespace {snapshot.namespace} waits for a hand")
