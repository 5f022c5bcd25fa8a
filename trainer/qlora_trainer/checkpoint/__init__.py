"""Write, verify, read and reshard checkpoints."""
