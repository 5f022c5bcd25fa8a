"""Keys of messages that rows have and chat templates read."""

from __future__ import annotations

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Names of a message's reasoning; the first is the one that most templates read."""
