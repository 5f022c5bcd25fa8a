"""Helpers of tests: limits, ports, waits, counted work, and processes without the cost of their imports."""
