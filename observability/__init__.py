"""Dashboards, alert rules and the reference of metrics, as code."""
