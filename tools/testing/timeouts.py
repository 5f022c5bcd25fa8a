"""Limit how long a test waits for an event: one generous limit, so that no test fails because a machine is slow."""

PATIENCE_SECONDS = 600.0
