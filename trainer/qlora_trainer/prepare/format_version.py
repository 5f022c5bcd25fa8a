"""The version of tokenized rows, apart from what tokenizes them: it is asked for without importing that."""

FORMAT_VERSION = 10
"""Counts up when the same rows and settings come to give other tokens, packs, files or receipts."""
