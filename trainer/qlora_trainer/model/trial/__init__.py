"""A trial in Prepare: a toy of the base's class is loaded, adapted and trained on the CPU as the base will be."""
