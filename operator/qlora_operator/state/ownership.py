"""Tell what the operator made from what others made under its names. Pure."""

from __future__ import annotations

from typing import Any

Object = dict[str, Any]
SERVICE_FIELDS = ("clusterIP", "selector", "publishNotReadyAddresses", "externalName", "externalIPs")
"""Fields that decide where a Service without an owner leads."""


def is_same_object(wanted: Object, there: Object) -> bool:
    """Return whether an object that exists is the one that was to be made: controlled by the same owner, by UID.

    The shared Service of a namespace has no owner: it must lead where the operator's leads.
    """
    if wanted["kind"] == "Service":
        labels, spec = there["metadata"].get("labels") or {}, there["spec"]
        return wanted["metadata"]["labels"].items() <= labels.items() and all(
            spec.get(name) == wanted["spec"].get(name) for name in SERVICE_FIELDS
        )
    return controller_uid(wanted) is not None and controller_uid(wanted) == controller_uid(there)


def controller_uid(body: Object) -> str | None:
    """UID of the controller; None where there is none."""
    owners = body["metadata"].get("ownerReferences") or ()
    return next((owner["uid"] for owner in owners if owner.get("controller")), None)
