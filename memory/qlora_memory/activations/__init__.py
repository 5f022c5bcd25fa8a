"""Bytes of activations: forward and backward passes on a tape."""
