"""Render the manifests of what the operator makes for a job. Pure: no clock, no I/O."""
