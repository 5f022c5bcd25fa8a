"""Choose how all pods of an attempt start or none, by what the cluster offers. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from qlora_api.spec import Gang, SchedulingSpec


def choose_gang(scheduling: SchedulingSpec, configured: Gang, offered: Iterable[Gang]) -> Gang:
    """The job's own choice, else the operator's, else by what is there: a named queue's, native, Volcano, none."""
    choice = scheduling.gang if scheduling.gang is not Gang.AUTO else configured
    if choice is not Gang.AUTO:
        return choice
    there = set(offered)
    if scheduling.queue and Gang.KUEUE in there:
        return Gang.KUEUE
    for gang in (Gang.NATIVE, Gang.VOLCANO):
        if gang in there:
            return gang
    return Gang.NONE


def cannot_start(scheduling: SchedulingSpec, gang: Gang, offered: Iterable[Gang]) -> str:
    """Return why pods could never start by a choice; empty where they can."""
    if gang is Gang.KUEUE and scheduling.queue is None:  # by the operator's setting: the API refuses it in a job
        return (
            "spec.scheduling.queue: must name a LocalQueue of Kueue in the job's namespace, since this operator starts "
            "gangs by Kueue, which leaves a job without one suspended; or set spec.scheduling.gang to Native, Volcano "
            "or None"
        )
    if gang is Gang.NONE or gang in set(offered):
        return ""
    there = ", ".join(sorted(offered)) or "none"
    return (
        f"gang {gang.value} (spec.scheduling.gang, or the operator's own setting) is not offered by this cluster: "
        f"install it, or choose Auto or None; offered here: {there}"
    )
