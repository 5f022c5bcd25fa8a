"""Measure what quantization does to each layer of a base: ``python -m qlora_trainer.inspection``."""
