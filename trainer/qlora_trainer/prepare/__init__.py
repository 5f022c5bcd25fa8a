"""Prepare a job before a GPU is held: python -m qlora_trainer.prepare CONFIG.json. Imports nothing itself."""
