"""Decide about attempts: what each was, how it ended, with how many workers and how long to stop. Pure."""
