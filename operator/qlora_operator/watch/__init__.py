"""Observe the cluster and wake jobs. Nothing is decided here."""
