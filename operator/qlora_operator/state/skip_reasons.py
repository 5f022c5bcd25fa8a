"""Reasons why the operator leaves an object out."""

from __future__ import annotations

NOT_OWNED, UNREADABLE = "NotOwned", "Unreadable"
"""Why an object is left out: it has the operator's labels and not its controller; it is larger or other than can be."""
