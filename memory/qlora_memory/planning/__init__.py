"""Choose what fits a GPU, say what would, and what it costs."""
