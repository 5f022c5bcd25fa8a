"""``qlora doctor``: what keeps jobs from running here, and what to do about it.

``look`` reads everything at once and decides nothing; ``judge`` decides from what was read and asks nothing.
"""
