"""Mixtures of experts: weights in 4 bits, products over the experts that tokens visit, and adapters on them."""
