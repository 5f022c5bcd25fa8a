"""Chat templates at work, in a child with bounds: light to import."""
