"""``qlora doctor``: what keeps jobs from running here, and what to do about it.

``read_cluster`` reads everything at once and decides nothing; ``run_checks`` decides from what was read and asks
nothing.
"""
