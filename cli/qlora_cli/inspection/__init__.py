"""``qlora inspect``: what quantization does to each layer of a base."""
