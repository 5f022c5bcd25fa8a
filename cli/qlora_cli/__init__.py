"""The command line ``qlora``: validate and explain manifests, and run a QLoRAJob on this machine.

Nothing here imports torch; the trainer is started as a process.
"""
