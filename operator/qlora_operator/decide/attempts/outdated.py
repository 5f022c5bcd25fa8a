"""Find waiting Jobs whose template is outdated, and decide which release of the operator recreates them. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qlora_operator.decide.decision import Context, Note
from qlora_operator.manifests.template_hash import template_hash
from qlora_operator.state.observed import JobState, ObservedJob


def is_outdated(context: Context, job: ObservedJob, wanted: Callable[[], dict[str, Any]]) -> bool:
    """Return whether a Job's pods are made of something else than is wanted now: spec or settings were corrected.

    Where this release of the operator could not make the Job, one that another release made is.
    """
    if job.deleting or job.state not in (JobState.ACTIVE, JobState.SUSPENDED):
        return False
    if context.observed.create_error:
        return is_contested(context, job)
    return bool(job.template) and job.template != template_hash(wanted())


def is_contested(context: Context, job: ObservedJob) -> bool:
    """Return whether another release of the operator made a Job, while this one ran and for the spec as it is now.

    Such a Job is left alone, or two releases with different settings would delete each other's for ever. What another
    release made before this process began, or for an earlier generation of the spec, is made anew, and only once: the
    new Job is neither. So a release that is gone leaves nothing behind that cannot be corrected.
    """
    return (
        job.operator not in ("", context.config.release)
        and job.uid not in context.observed.inherited
        and job.generation >= (context.job.metadata.generation or 0)
    )


def contested_note(job: ObservedJob) -> Note:
    """Say that a Job is left to another release."""
    text = f'release "{job.operator}" of the operator also serves this namespace, with other settings'
    remedy = "let only one release serve each namespace (namespaces, a value of the chart)"
    return Note("Warning", "ServedTwice", f"Job {job.name} is left unchanged: {text}; {remedy}")
