"""Publish adapters, and verify published ones."""
