"""Run a QLoRAJob on this machine, with processes in place of pods."""
