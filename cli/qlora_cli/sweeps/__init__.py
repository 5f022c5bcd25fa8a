"""Sweeps on this machine: one trial after the other, each as a run of 'qlora run'."""
