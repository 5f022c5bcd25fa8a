"""Published adapters and merged models: fetch, verify, merge, generate with them."""
