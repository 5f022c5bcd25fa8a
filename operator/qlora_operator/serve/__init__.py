"""Serve metrics and health over HTTP."""
