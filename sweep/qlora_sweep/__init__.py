"""Decisions of a sweep: which trials to create, resume and suspend, and when it is over. No I/O.

One implementation serves the operator and ``qlora sweep``. All state is in the trials, so that whoever drives a sweep
may be killed at any time.
"""
