"""Reconcile QLoRASweeps: create and change their trials, and write their status."""
