"""The shape of a base model, from its configuration and its safetensors headers."""
