"""Sort what the API server or the Job controller says when it makes nothing, and add what to do. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator

from qlora_api.status import Reason
from qlora_operator.manifests.profiles import UNKNOWN_PROFILE

_QUOTA = re.compile(
    r"exceeded quota: (?P<name>\S+), requested: (?P<requested>\S+), used: (?P<used>\S+), limited: (?P<limited>\S+)"
)
_NOT_SAID = re.compile(r"failed quota: (?P<name>[^:\s]+): must specify (?P<what>.+)")
_BY_RESOURCE = (
    (re.compile(r"^pods$"), "ask for fewer workers in spec.parallelism"),
    (re.compile(r"^count/"), "delete finished jobs"),
    (re.compile(r"/"), "ask for fewer GPUs in spec.parallelism"),
    (re.compile(r"^cpu$"), "lower trainer.cpu or prepare.cpu, values of the operator's chart"),
    (re.compile(r"^memory$"), "lower trainer.memory or prepare.memory, values of the operator's chart"),
    (re.compile(r"^ephemeral-storage$"), "lower trainer.ephemeralStorage or cacheSizeLimit, values of the chart"),
)
"""Further remedies, by the resource that a quota has too little of."""
_LIMITS = "a LimitRange of this namespace must allow trainer.cpu and trainer.memory, values of the operator's chart"
_REMEDIES = (
    (
        "status unknown for quota",
        Reason.QUOTA_EXCEEDED,
        "the quota is new and not counted yet; the operator retries",
    ),
    (UNKNOWN_PROFILE, Reason.MISSING_REFERENCE, ""),
    (
        "no PriorityClass with name",
        Reason.MISSING_REFERENCE,
        "create it, or correct spec.scheduling.priorityClassName",
    ),
    (
        "serviceaccount",
        Reason.REFUSED,
        "create it in this namespace, or correct trainer.serviceAccountName, a value of the chart",
    ),
    ("is being terminated", Reason.REFUSED, "the namespace is being deleted"),
    (
        "violates PodSecurity",
        Reason.REFUSED,
        "the namespace's Pod Security level must allow what the operator's chart adds to pods",
    ),
    ("usage per Container", Reason.REFUSED, _LIMITS),
    ("usage per Pod", Reason.REFUSED, _LIMITS),
    ("tolerations", Reason.REFUSED, "correct spec.scheduling.tolerations"),
    ("spec.nodeSelector", Reason.REFUSED, "correct spec.scheduling.nodeSelector"),
    (
        "admission webhook",
        Reason.REFUSED,
        "change the job so that the webhook admits it, or ask those who run the webhook",
    ),
    (
        "ValidatingAdmissionPolicy",
        Reason.REFUSED,
        "change the job so that the policy admits it, or ask those who made the policy",
    ),
    (
        "cannot create resource",
        Reason.REFUSED,
        "the operator's role lacks this permission: install the chart's roles (rbac.create)",
    ),
)
"""A part by which a message is known, its reason, and what helps; empty where the message says so itself."""


def explain_refusal(message: str) -> tuple[Reason, str]:
    """Return the reason for a message of the API server, and the message with a remedy."""
    if quota := _QUOTA.search(message):
        return Reason.QUOTA_EXCEEDED, f"{message}; {_quota_words(quota)}"
    if "exceeded quota" in message:
        return Reason.QUOTA_EXCEEDED, f"{message}; free some of the quota, or ask for fewer GPUs in spec.parallelism"
    if missing := _NOT_SAID.search(message):
        if "limits.cpu" in missing["what"]:
            return Reason.REFUSED, f"{message}; have trainer.limitCpu set to true, a value of the operator's chart"
        text = f"ResourceQuota {missing['name']} requires {missing['what']} for every container"
        return Reason.REFUSED, f"{message}; {text}: add a LimitRange with defaults to the namespace"
    found = ((reason, remedy) for part, reason, remedy in _REMEDIES if part in message)
    reason, remedy = next(found, (Reason.REFUSED, ""))
    return reason, f"{message}; {remedy}" if remedy else message


def _quota_words(quota: re.Match[str]) -> str:
    """Return which resource a quota has too little of, and what helps."""
    requested, used, limited = (dict(_amounts(quota[part])) for part in ("requested", "used", "limited"))
    short = [
        f"{name} ({amount} requested, {used.get(name, '?')} of {limited.get(name, '?')} used)"
        for name, amount in requested.items()
    ]
    plain = re.sub(r"^(requests|limits)\.", "", next(iter(requested), ""))
    other = next((words for pattern, words in _BY_RESOURCE if pattern.search(plain)), "")
    text = f"ResourceQuota {quota['name']} has too little {', '.join(short)}: free some of the quota"
    return f"{text}, or {other}" if other else text


def _amounts(text: str) -> Iterator[tuple[str, str]]:
    for part in text.split(","):
        name, _, amount = part.partition("=")
        yield name, amount
