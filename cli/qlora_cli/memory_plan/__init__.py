"""Predict memory and time of a job: ``qlora plan``."""
