"""Decide what is to be done from what was observed. Pure: no clock, no I/O."""
