"""Fetch models and rows, check model files, and authenticate what a run writes. Imports no torch."""
