"""Decisions on QLoRASweeps: which trials to create, suspend and resume, and what status says. Pure."""
