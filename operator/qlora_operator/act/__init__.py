"""Reconcile: apply decisions to the cluster and write status."""
