"""Read what others wrote: JSON of any depth, and text that could control a terminal."""
