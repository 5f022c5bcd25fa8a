"""Reasons why the operator leaves an object out."""

from __future__ import annotations

NOT_OWNED, UNREADABLE = "NotOwned", "Unreadable"
"""Reasons why an object is ignored: it has the operator's labels but another controller; it cannot be read."""
